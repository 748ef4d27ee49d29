"""Files with quantised layers: kept as they are where ComfyUI computes with them, else unpacked."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import comfy.ops
import torch
from torch import Tensor, nn

from ...hydit_core.weights.packing import PackedSource
from ...hydit_core.weights.source import TensorSource
from ...hydit_core.weights.views import Piece, TensorView

log = logging.getLogger(__name__)

MIXED = {"mixed_ops": True}
"""What ComfyUI's loaders note of a file with quantised layers."""


def keeps(source: TensorSource, weight_dtype: str = "default") -> bool:
    """Whether a file's quantised layers stay so: no dtype is asked for, and this ComfyUI has the formats.

    What is unpacked because ComfyUI is too old for it is said in the log.
    """
    schemes = source.schemes()
    if not schemes or weight_dtype != "default":
        return False
    formats = {scheme.format for scheme in schemes.values()}
    if can_keep(formats):
        return True
    log.warning(
        "hydit: %s: %d layers (%s) are unpacked, because this ComfyUI does not compute with them; a newer "
        "one keeps them in 8 bits",
        source.path,
        len(schemes),
        ", ".join(sorted(formats)),
    )
    return False


def can_keep(formats: Iterable[str]) -> bool:
    """Whether this ComfyUI has layers for all these formats."""
    if not hasattr(comfy.ops, "mixed_precision_ops"):  # 0.3.64
        return False
    known = getattr(comfy.ops, "QUANT_ALGOS", {})
    return all(name in known for name in formats)


def operations(stored: torch.dtype, compute: torch.dtype, device: torch.device) -> Any:
    """ComfyUI's layers for a network with quantised ones."""
    config = SimpleNamespace(quant_config=MIXED)
    return comfy.ops.pick_operations(stored, compute, load_device=device, model_config=config)


def entries(source: TensorSource, key: str, device: torch.device) -> dict[str, Tensor]:
    """What ComfyUI's layer of a quantised weight reads from a state dict."""
    packed = PackedSource(TensorView(source, {key: (Piece(key),)}))
    return {name: packed.get(name).clone().to(device) for name in packed}


def place(network: nn.Module, device: torch.device) -> None:
    """Tell ComfyUI's layers, which move what they are given, where it is to be."""
    for module in network.modules():
        if isinstance(arguments := getattr(module, "factory_kwargs", None), dict):
            arguments["device"] = device


def text(source: TensorSource | None, weight_dtype: str = "default") -> str:
    """For a loader's node: ``int8_convrot``, or that it was unpacked; empty for ordinary weights."""
    schemes = (source.schemes() if source is not None else {}).values()
    names = ", ".join(sorted({scheme.name for scheme in schemes}))
    kept = weight_dtype == "default" and can_keep(scheme.format for scheme in schemes)
    return names if not names or kept else f"{names} (unpacked)"
