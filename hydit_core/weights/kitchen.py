"""Quantised weights that stay so in memory: tensors of the library comfy-kitchen, ComfyUI's own."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..quiet import quiet_imports
from . import int8_products
from .packed import INT8, Packed, Scheme, pack

ADVICE = "pip install comfy-kitchen, or hydit[quant], keeps them in 8 bits"

_LEAST_CUDA = 13


@lru_cache(maxsize=1)
def is_available() -> bool:
    """Whether comfy-kitchen is installed."""
    return importlib.util.find_spec("comfy_kitchen") is not None


@lru_cache(maxsize=1)
def _tensors() -> Any:
    """Its module of tensors, with the kernels chosen as ComfyUI chooses them."""
    with quiet_imports():
        import comfy_kitchen
        from comfy_kitchen import tensor

    version = torch.version.cuda
    if version is None or int(version.partition(".")[0]) < _LEAST_CUDA:
        comfy_kitchen.registry.disable("cuda")
    comfy_kitchen.registry.disable("triton")
    if int8_products.is_faster():
        int8_products.register(comfy_kitchen)
    return tensor


def is_quantised(tensor: object) -> bool:
    """Whether a tensor is one of comfy-kitchen's."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False  # first, for torch.compile cannot look into names
    return type(tensor).__module__.startswith("comfy_kitchen.") or hasattr(tensor, "_qdata")


def keep(packed: Packed, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A stored weight as a tensor of shape (R, C) that is ``dtype`` to all that ask, and 8 bits in memory."""
    tensors, scheme = _tensors(), packed.scheme
    layout = "TensorWiseINT8Layout" if scheme.format == INT8 else "TensorCoreFP8Layout"
    rotation = {"convrot": True, "convrot_groupsize": scheme.group} if scheme.group else {}
    parameters = tensors.get_layout_class(layout).Params(
        scale=packed.scale.to(device),
        orig_dtype=dtype,
        orig_shape=tuple(packed.values.shape),
        **rotation,
    )
    made: Tensor = tensors.QuantizedTensor(packed.values.to(device), layout, parameters)
    return made


def scheme_of(weight: Any) -> Scheme:
    """How a kept weight is stored."""
    params = weight._params
    form = INT8 if weight._qdata.dtype == torch.int8 else str(weight._qdata.dtype).removeprefix("torch.")
    group = params.convrot_groupsize if getattr(params, "convrot", False) else 0
    return Scheme(form, rows=params.scale.numel() > 1, group=group)


def packed_of(weight: Any) -> Packed:
    """A kept weight as it is stored; shares its memory."""
    return Packed(weight._qdata, weight._params.scale, scheme_of(weight))


@torch.no_grad()
def put(weight: Any, value: Tensor) -> None:
    """Write a matrix in float32 into a kept weight: quantised again, as it was."""
    made = keep(pack(value, scheme_of(weight)), weight.dtype, weight.device)
    weight._qdata, weight._params = made._qdata, made._params  # type: ignore[attr-defined]


def moved(parameter: Tensor, move: Any) -> nn.Parameter:
    """A kept parameter after ``move``, which takes it to another device or dtype."""
    return nn.Parameter(move(parameter.data), requires_grad=False)
