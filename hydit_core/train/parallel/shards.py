"""The tensors of a checkpoint as parts: every process writes its own, and any number of processes reads them.

The format of torch.distributed.checkpoint's safetensors files, which say in their headers where each part
lies in its tensor. Names are ``part/name``: ``weights/dit.blocks.0.norm1.weight``. Nothing is exchanged to
write them but a few words through the processes' store, so that threads can do it beside the training.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor

from ...errors import HyditError, WeightsError
from ...weights.writer import save_safetensors
from ..distributed import Processes
from .copies import is_part, own

FOLDER = "shards"
_PLACES = "DCP_SHARDING_INFO"
Tensors = dict[str, dict[str, Tensor]]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class NotSaved(HyditError):
    """Parts could not be written, or are not what was written."""


class Parts(NamedTuple):
    """What one process writes of a checkpoint's tensors, by their names in the files."""

    tensors: dict[str, Tensor]
    offsets: dict[str, list[int]]
    """Where each begins in its whole."""
    shapes: Shapes
    """Of all wholes."""


def flat(tensors: Tensors) -> dict[str, Tensor]:
    """``part/name`` -> tensor."""
    return {f"{part}/{name}": t.detach() for part, named in tensors.items() for name, t in named.items()}


def nested(tensors: Mapping[str, Tensor]) -> Tensors:
    """The reverse of :func:`flat`."""
    found: Tensors = {}
    for full, tensor in tensors.items():
        part, _, name = full.partition("/")
        found.setdefault(part, {})[name] = tensor
    return found


def parts_of(tensors: Tensors, processes: Processes) -> Parts:
    """This process's parts; of what several hold alike, one of them has it."""
    everything = flat(tensors)
    parts = Parts({}, {}, {name: (tuple(t.shape), t.dtype) for name, t in everything.items()})
    for name, tensor in everything.items():
        local, offsets = _mine(tensor, processes)
        if local is not None:
            parts.tensors[name], parts.offsets[name] = local, offsets
    return parts


def _mine(tensor: Any, processes: Processes) -> tuple[Tensor | None, list[int]]:
    if not is_part(tensor):
        return (tensor if processes.is_main else None), [0] * tensor.ndim
    place = tensor.device_mesh.get_coordinate()
    if any(at for at, kind in zip(place, tensor.placements, strict=True) if kind.is_replicate()):
        return None, []
    (chunk,) = tensor.__create_chunk_list__()
    local = own(tensor)
    return (local if local.numel() else None), list(chunk.offsets)


# -- writing -----------------------------------------------------------------------------------------


def write(folder: Path, parts: Parts, processes: Processes, number: int) -> dict[str, Any]:
    """The first process: write its parts and wait for all others'; returns size and SHA-256 of each file.

    ``number`` counts the checkpoints of these processes. What was written is read back: every tensor has to
    be there, whole.

    Raises:
        NotSaved: a process could not write its parts, or not all of them are there.
        OSError: this process could not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processes.post(_place(number), str(folder))
    told = [_written(folder, parts, processes.rank)]
    told += [json.loads(processes.posted(_report(number, rank))) for rank in range(1, processes.world)]
    for rank, one in enumerate(told):
        if "error" in one:
            raise NotSaved(f"{folder}: process {rank}: {one['error']}")
    if described(folder) != parts.shapes:
        raise NotSaved(
            f"{folder}: not all parts are there: every process has to write into the same folder, so "
            "run.output_dir needs to be on a disk that all machines share"
        )
    return {name: entry for one in told for name, entry in one.items()}


def write_beside(parts: Parts, processes: Processes, number: int) -> None:
    """Another process: write its parts to where the first one says; that one hears how it went."""
    folder = processes.posted(_place(number))
    if not folder:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        told = _written(Path(folder), parts, processes.rank)
    except Exception as error:
        told = {"error": str(error)}
    processes.post(_report(number, processes.rank), json.dumps(told))


def give_up(processes: Processes, number: int) -> None:
    """The first process: tell those who wait to write that there will be no such checkpoint."""
    processes.post(_place(number), "")


def _place(number: int) -> str:
    return f"checkpoint-{number}"


def _report(number: int, rank: int) -> str:
    return f"checkpoint-{number}-of-{rank}"


def _written(folder: Path, parts: Parts, rank: int) -> dict[str, Any]:
    """Size and SHA-256 of the file that was written, by its name; nothing where there are no parts."""
    if not parts.tensors:
        return {}
    path = folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
    # Sorted: after a resume, states come in another order, and equal content is to give equal bytes.
    offsets = {name: {"saved_offsets": parts.offsets[name]} for name in sorted(parts.offsets)}
    places = json.dumps(offsets)
    try:
        save_safetensors(path, parts.tensors, {_PLACES: places, "DCP_VERSION": "1.0", "format": "pt"})
    except WeightsError as error:
        return {"error": str(error)}
    return {path.name: {"size": path.stat().st_size, "sha256": sha256(path)}}


# -- reading -----------------------------------------------------------------------------------------


def described(folder: Path) -> Shapes:
    """Shape and dtype of each tensor all of which is there."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    found = {}
    for name, stored in HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata.items():
        parts: Any = stored
        if sum(math.prod(chunk.sizes) for chunk in parts.chunks) == math.prod(parts.size):
            found[name] = (tuple(parts.size), parts.properties.dtype)
    return found


def read(
    folder: Path, target: Callable[[str, tuple[int, ...], torch.dtype], Tensor] | None = None
) -> Tensors:
    """The tensors in ``folder``, each by itself, without the other processes.

    ``target`` makes what a tensor (by its name after the ``/``) is read into: a part of a model reads nothing
    but that part. Default: all of it.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    targets: dict[str, Any] = {}
    for full, (shape, dtype) in described(folder).items():
        name = full.partition("/")[2]
        targets[full] = torch.empty(shape, dtype=dtype) if target is None else target(name, shape, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process that reads
        dcp.load(targets, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return nested(targets)


class Stored:
    """The tensors in a folder of parts, each put together when it is asked for."""

    def __init__(self, folder: Path) -> None:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
        self._metadata: Mapping[str, Any] = metadata.state_dict_metadata
        self._files: dict[str, list[tuple[str, Any]]] = {}
        for index, stored in metadata.storage_data.items():
            self._files.setdefault(index.fqn, []).append((stored.relative_path, index.offset))
        # Opened once: their headers are long.
        paths = {path for places in self._files.values() for path, _ in places}
        self._opened = {path: safe_open(path, framework="pt") for path in paths}

    def __contains__(self, name: str) -> bool:
        return name in self._metadata

    def get(self, name: str) -> Tensor:
        """A tensor by its name in the files."""
        stored = self._metadata[name]
        whole = torch.empty(stored.size, dtype=stored.properties.dtype)
        for path, offset in self._files[name]:
            part = self._opened[path].get_tensor(name)
            place = tuple(slice(start, start + size) for start, size in zip(offset, part.shape, strict=True))
            whole[place] = part
        return whole


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
