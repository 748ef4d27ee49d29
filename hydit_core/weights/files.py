"""Opening weights: safetensors, torch files and folders of either, read lazily and never executed."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import torch

from ..dtypes import SAFETENSORS_DTYPES
from ..errors import WeightsError
from ..facts import METADATA_KEY
from ..untrusted import is_plain_name, parse_json, read_json
from .mapped import Entry, MappedSource
from .pickles import is_named, open_pickle
from .source import MergedSource, TensorSource
from .unpacking import unpacking
from .views import unwrapped

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_STANDARD_NAMES = (
    "diffusion_pytorch_model.",
    "model.",
    "pytorch_model.",
    "adapter_model.",
    *(f"pytorch_model_{key}." for key in ("ema", "module", "distill", "merge")),
    "mp_rank_00",
)
_SHARD = re.compile(r"-\d{5}-of-(?!00001\.)\d{5}\.")
_AGAIN = " download or save it again"
_HEADER_LIMIT = 100_000_000
_MOST_TENSORS = 1_000_000
_LONGEST_NOTE = 1_000_000
_MOST_DIMENSIONS = 16
_LONGEST = 1 << 48
_LONGEST_NAME = 1000
_FOREIGN = {
    b"<": "an HTML or XML page (a failed download?)",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself (run git lfs pull)",
    b"GGUF": "a GGUF file, whose formats ComfyUI itself does not read: take the model's safetensors, and "
    "make a small file of it with `python -m hydit_core.weights quantize`",
    **dict.fromkeys(
        (b"ftrt", b"ptrt"),
        "an engine of TensorRT, compiled for one kind of GPU and one size: take the weights that it was "
        "built from; --compile makes them faster, too",
    ),
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}
_ONNX = re.compile(rb"\x08[\x01-\x20](\x12|:)")  # the field of its version, then its producer or graph
_ONNX_TEXT = "an ONNX graph, which holds its weights in another form: take those that it was exported from"
# Files of weights that are no weights files here, for folders that hold nothing else.
_OTHER_SUFFIXES = (".gguf", ".engine", ".plan", ".trt", ".onnx")


def open_tensors(path: str | os.PathLike[str], *, load_key: str | None = None) -> TensorSource:
    """Open a weights file, or a folder of them, without reading its tensors.

    Layers that are quantised in ComfyUI's formats appear as ordinary weights (:mod:`.unpacking`).

    The content decides what a file is, not its suffix. In a folder: an ``*.index.json`` with its shards,
    else the one safetensors or torch file, else Tencent's ``pytorch_model_{load_key}.pt`` or DeepSpeed's
    ``mp_rank_00_model_states.pt``.

    Args:
        load_key: ``ema``, ``module``, ``distill`` ...: which weights of a torch file with several sets.

    Raises:
        WeightsError: if it is missing, damaged, or holds no tensors.
    """
    return unpacking(_open(Path(path), load_key))


def _open(path: Path, load_key: str | None = None) -> TensorSource:
    """As it is stored."""
    if path.is_dir():
        return _open_folder(path, load_key)
    if not path.exists():
        raise WeightsError(f"{path} does not exist")
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    if not head:
        raise WeightsError(f"{path} is empty (0 bytes);{_AGAIN}")
    if head[8:9] != b"{":
        for magic, name in _FOREIGN.items():
            if head.lstrip().startswith(magic):
                raise WeightsError(f"{path} is {name}; expected a weights file")
        if _ONNX.match(head):
            raise WeightsError(f"{path} is {_ONNX_TEXT}; expected a weights file")
    if head[257:262] == b"ustar":
        raise WeightsError(f"{path} is a tar archive; expected a weights file, unpacked")
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[8:9] != b"{"):
        return unwrapped(open_pickle(path, load_key=load_key))
    source = SafetensorsSource(path)
    _refuse_key(path, load_key)
    return unwrapped(source)


def _refuse_key(path: Path, load_key: str | None) -> None:
    """What is asked for is not taken for granted where there is no choice."""
    if load_key is not None and not is_named(path, load_key):
        raise WeightsError(
            f"{path} has no weights under {load_key!r}: it holds one set, as safetensors do, so that "
            "none need be chosen"
        )


class SafetensorsSource(MappedSource):
    """A memory-mapped safetensors file."""

    def __init__(self, path: Path) -> None:
        try:
            with open(path, "rb") as file:
                start, header = _read_header(file, path)
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise WeightsError(f"cannot read {path}: {error.strerror}") from error
        _check_names(path, header)
        metadata = _metadata(header.pop("__metadata__", None))
        entries = {key: _entry(path, key, value, start, size - start) for key, value in header.items()}
        _check_ranges(path, entries, start, size)
        note = entries.pop(METADATA_KEY, None)
        super().__init__(path, entries, metadata)
        if note is not None:
            self.metadata = {METADATA_KEY: _note(path, note), **metadata}


def _note(path: Path, entry: Entry) -> str:
    """What a file says about itself in a tensor of bytes, as ComfyUI's own nodes drop our metadata."""
    if entry.dtype != torch.uint8 or entry.end - entry.begin > _LONGEST_NOTE:
        raise WeightsError(
            f"{path}: tensor {METADATA_KEY} is {entry.dtype} {entry.shape}; expected at most "
            f"{_LONGEST_NOTE} bytes of text"
        )
    with open(path, "rb") as file:
        file.seek(entry.begin)
        return file.read(entry.end - entry.begin).decode("utf-8", "replace")


def _read_header(file: Any, path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data starts, and the header; the error says what is wrong with a damaged file."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    peek = file.read(1)
    if size >= 10 and peek == b"{" and length > _HEADER_LIMIT:
        raise WeightsError(
            f"{path}: a safetensors header of {length:,} bytes; up to {_HEADER_LIMIT:,} are read;{_AGAIN}"
        )
    if size < 10 or peek != b"{" or length <= 0:
        raise WeightsError(
            f"{path} is not a weights file: neither safetensors nor a torch file ({size:,} bytes);{_AGAIN}"
        )
    if length > size - 8:
        raise WeightsError(
            f"{path} is truncated: its header alone needs {length + 8:,} bytes, the file has {size:,};"
            f"{_AGAIN}"
        )
    try:
        header = parse_json(peek + file.read(length - 1), "header", max_values=10 * _MOST_TENSORS)
    except WeightsError as error:
        raise WeightsError(f"{path}: the safetensors header is damaged ({error});{_AGAIN}") from None
    return 8 + length, header


def _metadata(value: Any) -> dict[str, str]:
    return {str(key): str(text) for key, text in value.items()} if isinstance(value, dict) else {}


def _entry(path: Path, key: str, value: Any, start: int, available: int) -> Entry:
    try:
        name, shape = value["dtype"], tuple(value["shape"])
        begin, end = value["data_offsets"]
        if not all(type(n) is int for n in (begin, end, *shape)) or len(shape) > _MOST_DIMENSIONS:
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise WeightsError(f"{path}: the header entry of {key} is damaged;{_AGAIN}") from None
    if not isinstance(name, str) or name not in SAFETENSORS_DTYPES:
        raise WeightsError(f"{path}: {key} has dtype {name}, which is not supported")
    dtype = SAFETENSORS_DTYPES[name]
    if end > available:
        raise WeightsError(
            f"{path} is truncated: {key} ends at byte {start + end:,}, the file has {start + available:,};"
            f"{_AGAIN}"
        )
    if (
        min((begin, *shape)) < 0
        or max((0, *shape)) > _LONGEST
        or end - begin != math.prod(shape) * dtype.itemsize
    ):
        raise WeightsError(f"{path}: the header entry of {key} is damaged;{_AGAIN}")
    return Entry(dtype, shape, start + begin, start + end)


def _check_names(path: Path, header: dict[str, Any]) -> None:
    if len(header) > _MOST_TENSORS:
        raise WeightsError(f"{path} holds {len(header):,} tensors; up to {_MOST_TENSORS:,} are read")
    if longest := max((key for key in header if len(key) > _LONGEST_NAME), key=len, default=None):
        raise WeightsError(
            f"{path}: a tensor's name has {len(longest):,} characters ({longest[:40]}...); up to "
            f"{_LONGEST_NAME:,} are read"
        )


def _check_ranges(path: Path, entries: dict[str, Entry], start: int, size: int) -> None:
    """Tensors must fill the file without a gap, as the safetensors library demands, so that nothing hides."""
    reached, before = start, "the header"
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < reached:
            raise WeightsError(f"{path}: {before} and {key} overlap, it is damaged;{_AGAIN}")
        if entry.begin > reached:
            gap = f"{entry.begin - reached:,} bytes between {before} and {key}"
            raise WeightsError(f"{path}: {gap} belong to no tensor, it is damaged;{_AGAIN}")
        reached, before = entry.end, key
    if reached < size:
        raise WeightsError(
            f"{path}: {size - reached:,} bytes after the last tensor belong to none, it is damaged;{_AGAIN}"
        )


def _weight_files(folder: Path) -> list[Path]:
    """The weights files of a folder, with the one to take first in front."""
    return sorted((p for p in folder.iterdir() if p.is_file() and p.suffix in SUFFIXES), key=_preference)


def has_weights(folder: Path) -> bool:
    """Whether a folder itself holds weights files."""
    return folder.is_dir() and bool(_weight_files(folder))


def refuse_other_formats(folder: Path) -> None:
    """Raise :class:`WeightsError` that names a file of another format in a folder without weights files."""
    for place in (folder, folder / "transformer"):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if path.suffix.lower() in _OTHER_SUFFIXES and path.is_file():
                _open(path)


def _open_folder(folder: Path, load_key: str | None) -> TensorSource:
    files = [p for p in _weight_files(folder) if not _SHARD.search(p.name)]
    if index := _index(folder, files):
        _refuse_key(index.parent, load_key)
        return _open_shards(index)
    if shard := next((p for p in _weight_files(folder) if not files), None):
        raise WeightsError(
            f"{folder} holds shards ({shard.name}, ...) but no index that names them;"
            " download the .index.json"
        )
    if load_key is not None:
        files = [p for p in files if is_named(p, load_key)] or files
    if not files:
        refuse_other_formats(folder)
        raise WeightsError(f"{folder} holds no weights; expected one of *{', *'.join(SUFFIXES)} in it")
    if len(files) > 1 and _preference(files[0])[2] >= 2 * len(_STANDARD_NAMES):
        shown = ", ".join(p.name for p in files[:8])
        raise WeightsError(f"{folder} holds {len(files)} weights files; name one of them: {shown}")
    return _open(files[0], load_key)


def _index(folder: Path, files: list[Path]) -> Path | None:
    """The index of the shards to take, if any; an index without its shards yields to complete files.

    (Downloads that skip a format or a variant often include its index.)
    """
    found = {*folder.glob("*.index.json"), *folder.glob("*.index.*.json")}
    indexes = sorted(found, key=_preference)
    complete = [path for path in indexes if not _missing_shards(path)]
    if not complete:
        return indexes[0] if indexes and not files else None
    plain = any(path.suffix == ".safetensors" for path in files)
    return None if plain and ".safetensors" not in complete[0].name else complete[0]


def preferred_weights(files: Iterable[PurePath], load_key: str | None = None) -> list[PurePath]:
    """The weights to take of a folder's, known by name alone: one file, or all shards of one.

    Several files, where none has the name that such a file usually has.
    """
    files = sorted(files, key=lambda path: _preference(_unsharded(path)))
    if load_key is not None:
        files = [path for path in files if is_named(path, load_key)] or files
    if not files:
        return []
    first = files[0]
    if mark := _SHARD.search(first.name):
        return [path for path in files if path.name.startswith(first.name[: mark.start()] + "-")]
    usual = _preference(first)[2] < 2 * len(_STANDARD_NAMES)
    return [first] if usual else [path for path in files if path.suffix == first.suffix]


def _unsharded(path: PurePath) -> PurePath:
    """``model-00001-of-00002.safetensors`` -> ``model.safetensors``."""
    return path.with_name(_SHARD.sub(".", path.name))


def _preference(path: PurePath) -> tuple[bool, bool, int, str]:
    """The order in which the files of a folder are tried: by format, then plain before variants."""
    name = path.name
    torch_format = ".safetensors" not in name
    unwanted = any(word in name for word in ("optim", "zero_pp_rank", "training_args", "scheduler"))
    rank = next((i for i, stem in enumerate(_STANDARD_NAMES) if name.startswith(stem)), len(_STANDARD_NAMES))
    variant = name.removesuffix(".index.json").count(".") > 1
    return unwanted, torch_format, 2 * rank + variant, name


def _read_index(index: Path) -> tuple[dict[str, Any], list[str]]:
    """What an index says, and the names of its shards."""
    try:
        content = read_json(index)
        names = set(content["weight_map"].values())
    except (KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{index} is damaged: no weight_map in it; download it again") from error
    if strange := [name for name in names if not is_plain_name(name)]:
        raise WeightsError(
            f"{index}: {str(strange[0])[:100]!r} does not name a file in this folder, where shards must be"
        )
    return content, sorted(names)


def _missing_shards(index: Path) -> list[str]:
    return [name for name in _read_index(index)[1] if not os.path.isfile(index.parent / name)]


def _open_shards(index: Path) -> TensorSource:
    content, names = _read_index(index)
    if missing := _missing_shards(index):
        shown = ", ".join(missing[:5])
        raise WeightsError(f"{index.parent} lacks {len(missing)} of {len(names)} shards: {shown}")
    shards = [_open(index.parent / name) for name in names]
    merged = MergedSource(shards, path=index.parent, metadata=_metadata(content.get("metadata")))
    lost = [key for key in content["weight_map"] if key not in merged]
    if lost:
        raise WeightsError(f"{index.parent}: {len(lost)} tensors of the index are missing, first {lost[0]}")
    return merged
