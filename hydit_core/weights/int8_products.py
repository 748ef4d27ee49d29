"""Products with int8 weights on CPUs that have no instructions for them: the same integers, by way of floats.

Without VNNI, torch multiplies int8 matrices in a plain loop, some 15 times as slow as floats. A product of
two int8 is at most 2^14, so up to 1024 of them add up exactly in float32.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .packed import hadamard

NAME = "hydit_floats"
"""This way of computing among those of comfy-kitchen."""
_EXACT = 1024


def is_faster() -> bool:
    """Whether this machine's CPU multiplies floats faster than int8."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return supported is not None and not supported()


def register(kitchen: Any) -> None:
    """Let comfy-kitchen compute its ``int8_linear`` on the CPU so; bit for bit what it computes itself."""
    registry = kitchen.registry
    usual = registry.get_constraints("eager", "int8_linear")
    here = dataclasses.replace(usual, default_devices=frozenset({"cpu"}))
    itself = registry.get_implementation("int8_linear", backend="eager")

    def int8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, **more: Any) -> Tensor:
        if more.get("input_act") is not None or more.get("residual") is not None:
            answer: Tensor = itself(x=x, weight=weight, weight_scale=weight_scale, **more)
            return answer
        rows = x.reshape(-1, x.shape[-1])
        if more["convrot"]:
            group = more["convrot_groupsize"]
            rows = (rows.reshape(-1, group) @ hadamard(group).to(rows)).reshape(rows.shape)
        values, scale = kitchen.quantize_int8_rowwise(rows)
        out = product(values, weight) * (scale.float() * weight_scale.float().reshape(1, -1))
        out = out.to(more["out_dtype"])
        if more["bias"] is not None:
            out = out + more["bias"].to(out.dtype)
        return out.reshape(*x.shape[:-1], len(weight))

    registry.register(NAME, SimpleNamespace(int8_linear=int8_linear), {"int8_linear": here})
    registry.set_priority([NAME, *registry._priority])


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` of int8 matrices (M, K) and (N, K), in float32, rounded once."""
    if a.shape[1] <= _EXACT:
        return a.float() @ b.float().T
    total = torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device)
    for of_a, of_b in zip(a.split(_EXACT, 1), b.split(_EXACT, 1), strict=True):
        total += (of_a.float() @ of_b.float().T).to(torch.int32)
    return total.float()
