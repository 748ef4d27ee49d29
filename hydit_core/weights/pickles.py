"""Weights in ``torch.save`` files, and which of the tensors in one are the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from ..errors import WeightsError
from .mapped import Entry, MappedSource
from .pickle_reader import ForeignNames, Refused, StoredTensor
from .torch_file import TorchFile

LOAD_KEYS = ("ema", "module", "state_dict", "model_state_dict", "model", "distill", "merge", "params")
"""Where trainers put the weights inside the saved dictionary, preferred ones first."""
_IP_ADAPTER = {"image_proj", "ip_adapter"}
"""The parts of other models' IP-Adapters, which are told by their names."""
_MOST_NAMED_TWICE = 4
_LONGEST_NAME = 1000
_DEEPEST = 3

Tensors = dict[str, StoredTensor]


def open_pickle(path: Path, *, load_key: str | None = None) -> MappedSource:
    """Open a ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file in either of torch's formats.

    It is mapped, so nothing is read until a tensor is used. torch's own unpickler is not used, see
    :mod:`.pickle_reader`.

    Args:
        load_key: which of several sets of weights to take (``ema``, ``module`` ...); by default the first
            of :data:`LOAD_KEYS` that the file has.

    Raises:
        WeightsError: if the file holds other objects, no tensors, or not that key.
    """
    file = _load(path)
    tensors, used = _find_tensors(file.value, path, load_key)
    metadata = {"hydit.load_key": used} if used else {}
    if len(choices := _choices(file.value)) > 1:
        metadata["hydit.load_keys"] = ", ".join(choices)
    return MappedSource(path, _entries(file, tensors), metadata)


def is_named(path: PurePath, load_key: str) -> bool:
    """Whether a file is one set of weights by its name, as Tencent's ``pytorch_model_module.pt`` is."""
    return path.stem.endswith(f"_{load_key}")


def _load(path: Path) -> TorchFile:
    try:
        return TorchFile(path)
    except ForeignNames as error:
        raise WeightsError(
            f"{path} holds objects that only running its code could restore ({', '.join(error.args[:8])});"
            " refused, because such a file can run anything. Ask its author for a safetensors file,"
            " or a file that holds nothing but the state dict."
        ) from None
    except Refused as error:
        raise WeightsError(f"{path} holds {error}; it cannot be read") from None
    except Exception as error:  # damaged bytes can raise nearly anything
        raise WeightsError(
            f"{path} cannot be read as a torch file of tensors; it is damaged, incomplete or something else"
            f" ({_reason(error)}). Download or save it again."
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _entries(file: TorchFile, tensors: Tensors) -> dict[str, Entry]:
    """Where each tensor is in the file.

    Raises:
        WeightsError: names are too long, or many tensors share the same few bytes.
    """
    entries = {}
    for name, tensor in tensors.items():
        if len(name) > _LONGEST_NAME:
            raise WeightsError(f"{file.path}: a tensor's name has {len(name):,} characters ({name[:40]}...)")
        begin, end = file.place(tensor)
        stride = None if _contiguous(tensor) else tensor.stride
        entries[name] = Entry(tensor.dtype, tensor.shape, begin, end, stride)
    named = sum(entry.end - entry.begin for entry in entries.values())
    if named > _MOST_NAMED_TWICE * file.size:
        raise WeightsError(
            f"{file.path}: its tensors name {named:,} bytes, the file has {file.size:,}: many are the same "
            "bytes, so it is not a checkpoint"
        )
    return entries


def _contiguous(tensor: StoredTensor) -> bool:
    expected = 1
    for size, step in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _tensors_of(value: Any) -> Tensors:
    if not isinstance(value, Mapping):
        return {}
    return {key: v for key, v in value.items() if isinstance(key, str) and isinstance(v, StoredTensor)}


def _find_tensors(
    loaded: Any, path: Path, load_key: str | None, depth: int = _DEEPEST
) -> tuple[Tensors, str]:
    """The flat state dict inside what was saved, and the keys that led to it."""
    if depth < 0:
        raise WeightsError(f"{path} holds dictionaries in dictionaries without an end")
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path} holds a {type(loaded).__name__}; expected a dictionary of tensors")
    choices = _choices(loaded)
    if load_key is not None:
        if load_key in choices:
            tensors, rest = _find_tensors(loaded[load_key], path, None, depth - 1)
            return tensors, f"{load_key}.{rest}" if rest else load_key
        if is_named(path, load_key):
            return _find_tensors(loaded, path, None, depth)
        one = "it is one plain state dict" if _tensors_of(loaded) else "it holds no tensors"
        found = f"it has {', '.join(choices)}" if choices else one
        raise WeightsError(f"{path} has no weights under {load_key!r}; {found}")
    tensors = _tensors_of(loaded)
    if _IP_ADAPTER.issubset(choices):
        tensors = {
            f"{key}.{name}": value for key in choices for name, value in _tensors_of(loaded[key]).items()
        }
        return tensors, ""
    # A checkpoint may hold tensors besides its weights (a step counter, a random state).
    for key in (*LOAD_KEYS, *(() if tensors else choices)):
        if key in choices:
            tensors, rest = _find_tensors(loaded[key], path, None, depth - 1)
            return tensors, f"{key}.{rest}" if rest else key
    if not tensors:
        raise WeightsError(f"{path} holds no tensors" + _zero_hint(path))
    if not any(size for tensor in tensors.values() for size in [tensor.reach]):
        raise WeightsError(f"{path} holds tensors without values" + _zero_hint(path))
    return tensors, ""


def _choices(loaded: Any) -> list[str]:
    """The keys with tensors under them."""
    seen: set[tuple[int, int]] = set()
    items = loaded.items() if isinstance(loaded, Mapping) else ()
    return [key for key, value in items if isinstance(key, str) and _holds_tensors(value, seen)]


def _holds_tensors(value: Any, seen: set[tuple[int, int]], depth: int = _DEEPEST) -> bool:
    """``seen`` holds the dictionaries without tensors: a file can name one of them a million times."""
    if not isinstance(value, Mapping) or depth == 0 or (id(value), depth) in seen:
        return False
    if _tensors_of(value) or any(_holds_tensors(inner, seen, depth - 1) for inner in value.values()):
        return True
    seen.add((id(value), depth))
    return False


def _zero_hint(path: Path) -> str:
    """For a shard of DeepSpeed's ZeRO, what it is and where the weights are; else an empty text."""
    if "optim_states" in path.name:
        return (
            "; it is an optimizer shard of DeepSpeed. With ZeRO 1 and 2 the weights are in "
            "mp_rank_00_model_states.pt; with ZeRO 3 join the shards with the zero_to_fp32.py beside them"
        )
    if "zero_pp_rank" in path.name or "model_states" in path.name:
        return (
            "; it is one process's share of a DeepSpeed ZeRO 3 checkpoint: join the shards with the "
            "zero_to_fp32.py beside them"
        )
    return ""
