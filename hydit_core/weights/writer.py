"""Atomic, streaming writing of safetensors files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import torch

from ..dtypes import SAFETENSORS_NAMES
from ..errors import WeightsError
from ..new_files import atomic_path
from .packing import PackedSource
from .source import TensorSource, as_source

_ALIGNMENT = 64

Progress = Callable[[int, int], object]
"""``(bytes written, bytes in all)``, called after each tensor."""


def save_safetensors(
    path: str | os.PathLike[str],
    tensors: TensorSource | Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    progress: Progress | None = None,
) -> None:
    """Write a safetensors file atomically, one tensor after another.

    What is quantised in the source is written so, in ComfyUI's format. At most one tensor of a lazy source is
    in memory at a time. Widest dtypes come first, then names in order, so that every tensor is aligned to its
    element size and equal content gives equal bytes.

    Raises:
        WeightsError: if the format lacks a dtype, or the file cannot be written.
    """
    source: TensorSource = PackedSource(as_source(tensors))
    order = sorted(source.keys(), key=lambda key: (-source.dtype(key).itemsize, key))
    header = _header(source, order, dict(metadata or {}))
    done, total = 0, sum(source.nbytes(key) for key in order)
    with atomic_path(path) as temporary, open(temporary, "xb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for key in order:
            _write_tensor(file, key, source)
            done += source.nbytes(key)
            if progress is not None:
                progress(done, total)


def _header(source: TensorSource, order: list[str], metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for key in order:
        dtype = source.dtype(key)
        if dtype not in SAFETENSORS_NAMES:
            raise WeightsError(f"{source.path}: {key} has dtype {dtype}, which safetensors cannot hold")
        end = offset + source.nbytes(key)
        shape = list(source.shape(key))
        entries[key] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-(len(text) + 8) % _ALIGNMENT)


def _write_tensor(file: BinaryIO, key: str, source: TensorSource) -> None:
    tensor = source.get(key)
    if tuple(tensor.shape) != source.shape(key) or tensor.dtype != source.dtype(key):
        raise WeightsError(
            f"{source.path}: {key} is {tensor.dtype} {tuple(tensor.shape)},"
            f" its header says {source.dtype(key)} {source.shape(key)}"
        )
    if tensor.numel():
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        file.write(flat.numpy().data)
