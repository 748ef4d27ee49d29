"""The pickle inside a torch file, read without torch's unpickler and without running any of its code.

torch's ``weights_only`` had holes in releases that this library runs on (CVE-2025-32434 below 2.6,
CVE-2026-24747 below 2.10). Here a pickle is data: all its instructions are checked before the first is
executed, and no name in it is ever imported. Tensors become descriptions (:class:`StoredTensor`), plain
dictionaries become dictionaries, and what trainers put beside weights (numpy's numbers, paths, command lines)
becomes a meaningless object. Every other name is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

MAX_BYTES = 16 << 20
"""In one pickle; enough for the names and shapes of about 50,000 tensors."""
MAX_INSTRUCTIONS = 2_000_000
_MAX_DIMENSIONS = 16
# A dictionary of integers above 64 bits can be built so that it needs time that grows with its square.
_MAX_LONG = 9

_ALLOWED = {
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE", "BININT",
    "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "EMPTY_DICT", "EMPTY_LIST",
    "EMPTY_TUPLE", "EMPTY_SET", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "LIST", "DICT", "FROZENSET", "APPEND",
    "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "MEMOIZE",
    "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "BUILD", "BINPERSID",
}  # fmt: skip

# What may be beside weights and is not needed: module -> names. None of it is imported.
_INERT: dict[str, frozenset[str]] = {
    module: frozenset(names.split())
    for module, names in {
        "argparse": "Namespace",
        "builtins": "bool bytearray bytes complex dict float frozenset int list object range set slice str "
        "tuple xrange",
        "_codecs": "encode",
        "collections": "deque",
        "copyreg": "_reconstructor",
        "datetime": "date datetime time timedelta timezone",
        "decimal": "Decimal",
        "fractions": "Fraction",
        "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
        "pathlib._local": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
        "types": "SimpleNamespace",
        "uuid": "SafeUUID UUID",
        "numpy": "dtype ndarray bool_ float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 "
        "uint64",
        "numpy.core.multiarray": "_reconstruct scalar",
        "numpy._core.multiarray": "_reconstruct scalar",
        "numpy.core.numeric": "_frombuffer",
        "numpy._core.numeric": "_frombuffer",
        "torch": "Size Tensor device",
        "torch.nn.parameter": "Buffer Parameter",
        "torch.serialization": "_get_layout",
        "torch.torch_version": "TorchVersion",
    }.items()
}
# Modules' old names, as in pickles of protocol 2.
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_DICTIONARIES = {"OrderedDict", "defaultdict", "Counter"}
_STORAGES: dict[str, torch.dtype | None] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": None,
}
_OTHER_TENSORS = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor on the meta device, without values",
    "_rebuild_wrapper_subclass": "a tensor of a class of its own",
    "_rebuild_device_tensor_from_numpy": "a tensor of another device",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
}


class Refused(Exception):
    """The pickle is well-formed but not accepted; the text completes "FILE holds ..."."""


class ForeignNames(Exception):
    """The pickle names code; the arguments are its names."""


class Storage(NamedTuple):
    """Where numbers are stored: a key, their dtype (None: bytes), how many."""

    key: str
    dtype: torch.dtype | None
    length: int


class StoredTensor(NamedTuple):
    """A tensor as a file describes it; offset and stride count elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def reach(self) -> int:
        """The number of stored elements from the first to the last that it uses."""
        if not math.prod(self.shape):
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))


def read_pickle(stream: io.BytesIO, storages: dict[str, Storage], *, longest: int = _MAX_LONG) -> Any:
    """The value of the pickle that begins at ``stream``'s position, which is then at its end.

    Args:
        storages: every storage that is named is added to it.
        longest: the most bytes of an integer.

    Raises:
        Refused, ForeignNames: it is not accepted.
        Exception: nearly any class, if it is damaged.
    """
    start = stream.tell()
    _look(stream, longest)
    end = stream.tell()
    stream.seek(start)
    value = _Reader(io.BytesIO(stream.read(end - start)), storages).load()
    stream.seek(end)
    return value


def _look(stream: io.BytesIO, longest: int) -> None:
    """Check the instructions without executing them."""
    foreign: list[str] = []
    argument: Any
    for number, (code, argument, _) in enumerate(pickletools.genops(stream)):
        if number > MAX_INSTRUCTIONS:
            raise Refused(f"a pickle of more than {MAX_INSTRUCTIONS:,} instructions")
        if code.name not in _ALLOWED:
            raise Refused(f"a pickle with the instruction {code.name}, which tensors do not need")
        if code.name.endswith("BINPUT") and argument > number:
            raise ValueError("a memo index beyond the pickle")
        if code.name == "LONG1" and argument.bit_length() >= 8 * longest:
            raise Refused("a whole number of more than 64 bits")
        if code.name == "GLOBAL":
            module, _, name = argument.partition(" ")
            module = _PYTHON_2.get(module, module)
            _refuse_other(module, name)
            if not _known(module, name):
                foreign.append(f"{module}.{name}")
    if foreign:
        raise ForeignNames(*dict.fromkeys(foreign))


def _refuse_other(module: str, name: str) -> None:
    if module == "torch._utils" and name in _OTHER_TENSORS:
        raise Refused(f"{_OTHER_TENSORS[name]}; plain tensors can be read")


def _known(module: str, name: str) -> bool:
    return (
        name in _INERT.get(module, ())
        or (module == "collections" and name in _DICTIONARIES)
        or (module == "numpy.dtypes" and name.endswith("DType"))
        or (module in ("torch", "torch.storage") and (name in _STORAGES or _dtype(name) is not None))
        or (module == "torch._utils" and name in _FUNCTIONS)
        or (module == "torch._tensor" and name == "_rebuild_from_type_v2")
    )


def _dtype(name: str) -> torch.dtype | None:
    found = vars(torch).get(name)
    return found if isinstance(found, torch.dtype) else None


class _Dict(dict):  # type: ignore[type-arg]
    """An OrderedDict or defaultdict, whose attributes (``_metadata``) are not needed."""

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __setstate__(self, _: Any) -> None:
        pass


class _Nothing:
    """In place of an object that is not needed: accepts everything, keeps nothing, does nothing."""

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any) -> _Nothing:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    extend = add = update = append


class _Function:
    """What REDUCE may call. A pickle cannot change it: each file has its own, and no state is taken."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, _: Any) -> None:
        raise ValueError("state for a function")


class _StorageType(NamedTuple):
    dtype: torch.dtype | None


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> StoredTensor:
    """``_rebuild_tensor`` and ``_v2``: requires_grad, hooks and metadata follow."""
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise ValueError("a tensor without a storage of its dtype")
    return _checked(StoredTensor(storage, storage.dtype, offset, shape, stride), rest[2:])


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *rest: Any
) -> StoredTensor:
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor without a storage and a dtype")
    return _checked(StoredTensor(storage, dtype, offset, shape, stride), rest)


def _checked(tensor: StoredTensor, metadata: tuple[Any, ...]) -> StoredTensor:
    if any(metadata):
        raise Refused("a tensor that is to be conjugated or negated")
    storage, dtype, offset, shape, stride = tensor
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) != len(stride):
        raise ValueError("a tensor without shape and stride")
    numbers = (offset, *shape, *stride)
    if len(shape) > _MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
        raise ValueError("a tensor's shape, stride or offset")
    size = storage.length * (storage.dtype.itemsize if storage.dtype else 1)
    if (offset + tensor.reach) * dtype.itemsize > size:
        raise ValueError("a tensor that reaches beyond its storage")
    if math.prod(shape) > tensor.reach:
        raise Refused(
            f"an expanded tensor: {math.prod(shape):,} values out of {tensor.reach:,} that are stored; save "
            "it after .contiguous()"
        )
    return tensor


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    """``torch.Size``."""
    return tuple(sizes) if isinstance(sizes, tuple | list) else ()


def _of_type(function: Any, _type: Any, arguments: Any, _state: Any) -> Any:
    """``_rebuild_from_type_v2``: a Parameter with attributes."""
    if not isinstance(function, _Function):
        raise ValueError("a tensor that something else makes")
    return function(*arguments)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "_rebuild_tensor": _tensor,
    "_rebuild_tensor_v2": _tensor,
    "_rebuild_tensor_v3": _tensor_v3,
    "_rebuild_parameter": _parameter,
    "_rebuild_parameter_with_state": _parameter,
}


class _Reader(pickle.Unpickler):
    """Python's unpickler without imports: all names come from the tables above."""

    def __init__(self, stream: io.BytesIO, storages: dict[str, Storage]) -> None:
        super().__init__(stream, encoding="latin-1")
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        module = _PYTHON_2.get(module, module)
        _refuse_other(module, name)
        if not _known(module, name):
            raise ForeignNames(f"{module}.{name}")
        if module == "torch._utils":
            return _Function(_FUNCTIONS[name])
        if module == "torch._tensor":
            return _Function(_of_type)
        if module == "collections" and name in _DICTIONARIES:
            return type(name, (_Dict,), {})
        if name in _STORAGES:
            return _StorageType(_STORAGES[name])
        if module == "torch" and name == "Size":
            return _Function(_size)
        if module == "torch" and (dtype := _dtype(name)) is not None:
            return dtype
        # A new class for each: NEWOBJ needs one, and what a pickle may do to it must not outlive this file.
        return type(name, (_Nothing,), {"__slots__": ()})

    def persistent_load(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise ForeignNames("a whole module")
        _, kind, key, _, count, *view = pid
        named = isinstance(kind, _StorageType) and isinstance(key, str)
        if not named or type(count) is not int or not 0 <= count < 1 << 48:
            raise ValueError("a storage without dtype, key or size")
        if any(view):
            raise Refused("storages that are views of others; save it with a newer torch")
        storage = Storage(key, kind.dtype, count)
        if self._storages.setdefault(key, storage) != storage:
            raise ValueError("one storage of two sizes")
        return storage
