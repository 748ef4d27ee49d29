"""The tensors of a checkpoint as parts: every process writes its own, and any number of processes reads them.

torch.distributed.checkpoint in safetensors files, which say in their headers where each part lies in its
tensor. Names are ``part/name``: ``weights/dit.blocks.0.norm1.weight``.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from ...errors import HyditError
from ..distributed import Processes

FOLDER = "shards"
Tensors = dict[str, dict[str, Tensor]]


class NotSaved(HyditError):
    """Parts could not be written, or are not what was written."""


def write(folder: Path, tensors: Tensors, processes: Processes) -> dict[str, Any]:
    """Write the parts of this process, together with all others; returns size and SHA-256 of each file.

    What was written is read back: every tensor has to be there, whole.

    Raises :class:`NotSaved`, in the first process only.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    flat = {f"{part}/{name}": t.detach() for part, named in tensors.items() for name, t in named.items()}
    told: list[str] = []
    try:
        dcp.save(flat, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
        files = sorted(folder.glob("*.safetensors"))
        for path in files[processes.rank :: processes.world]:
            told.append(json.dumps({"file": path.name, "size": path.stat().st_size, "sha256": sha256(path)}))
    except dcp.api.CheckpointException as error:
        causes = "; ".join(f"process {rank}: {cause[0]}" for rank, cause in error.failures.items())
        told = [json.dumps({"error": causes})]
    except OSError as error:
        told = [json.dumps({"error": f"process {processes.rank}: {error}"})]
    records = [json.loads(line) for line in processes.gather(told)]
    if not processes.is_main:
        return {}
    for record in records:
        if "error" in record:
            raise NotSaved(f"{folder}: {record['error']}")
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in flat.items()}
    if described(folder) != shapes:
        raise NotSaved(
            f"{folder}: not all parts are there: every process has to write into the same folder, so "
            "run.output_dir needs to be on a disk that all machines share"
        )
    return {record["file"]: {"size": record["size"], "sha256": record["sha256"]} for record in records}


def described(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
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

    flat: dict[str, Any] = {}
    for full, (shape, dtype) in described(folder).items():
        name = full.partition("/")[2]
        flat[full] = torch.empty(shape, dtype=dtype) if target is None else target(name, shape, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process that reads
        dcp.load(flat, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    found: Tensors = {}
    for full, tensor in flat.items():
        part, _, name = full.partition("/")
        found.setdefault(part, {})[name] = tensor
    return found


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
