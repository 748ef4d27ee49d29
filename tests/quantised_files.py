"""Quantised files of tests, their numbers written out here and not by hydit_core."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

Layer = tuple[dict[str, Tensor], dict[str, object], Tensor]
FP8, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def hadamard(size: int) -> Tensor:
    """The regular Hadamard matrix of a power of 4 in float64, orthogonal."""
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64)
    matrix = four
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix / len(matrix) ** 0.5


def rotation(columns: int, group: int) -> Tensor:
    """The matrix of all columns, (C, C)."""
    return torch.block_diag(*[hadamard(group)] * (columns // group))


def int8_layer(weight: Tensor, *, rows: bool = True, group: int = 0) -> Layer:
    """The tensors of a layer by suffix, its description, and what it means, in float64."""
    turn = rotation(weight.shape[1], group) if group else torch.eye(weight.shape[1], dtype=torch.float64)
    turned = weight.double() @ turn
    scale = (turned.abs().amax(1, keepdim=True) if rows else turned.abs().max()) / 127
    scale = scale.float()
    values = (turned / scale).round()
    note: dict[str, object] = {"format": "int8_tensorwise"}
    if group:
        note |= {"convrot": True, "convrot_groupsize": group}
    tensors = {"weight": values.to(torch.int8), "weight_scale": scale}
    return tensors, note, (values * scale.double()) @ turn.T


def fp8_layer(weight: Tensor, dtype: torch.dtype = FP8) -> Layer:
    """As :func:`int8_layer`, with one scale."""
    scale = (weight.abs().max() / torch.finfo(dtype).max).float()
    values = (weight / scale).to(dtype)
    note = {"format": str(dtype).removeprefix("torch.")}
    return {"weight": values, "weight_scale": scale}, note, values.double() * scale.double()


def note_tensor(note: object) -> Tensor:
    return torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def rewrite(
    source: Path, out: Path, layers: dict[str, Layer], spelling: str = "tensors"
) -> dict[str, Tensor]:
    """``source`` with some layers quantised, in one of ComfyUI's three spellings; returns what they mean."""
    tensors, metadata = load_file(source), metadata_of(source)
    meaning, notes = {}, {}
    for name, (parts, note, weight) in layers.items():
        old = spelling == "scaled_fp8"
        for suffix, tensor in parts.items():
            tensors[f"{name}.{'scale_weight' if old and suffix == 'weight_scale' else suffix}"] = tensor
        meaning[f"{name}.weight"], notes[name] = weight, note
        if spelling == "tensors":
            tensors[f"{name}.comfy_quant"] = note_tensor(note)
    if spelling == "metadata":
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": notes})
    if spelling == "scaled_fp8":
        prefix = next(iter(layers)).partition("blocks.")[0]
        tensors[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=next(iter(layers.values()))[0]["weight"].dtype)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, out, metadata)
    return meaning
