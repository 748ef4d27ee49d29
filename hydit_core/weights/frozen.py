"""Frozen linear layers, which are stored in few bits and compute in the dtype of their input."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dtypes import STORED, dtype_of
from ..errors import ConfigError
from ..model.dit import DiT
from ..quiet import quiet_imports
from .source import cast

_BITS = {name: 8 * dtype_of(name).itemsize for name in STORED} | {"int8": 8, "nf4": 4}


class FrozenLinear(nn.Linear):
    """A linear layer that is not trained but passes gradients on.

    For the backward pass it keeps the stored weight, not the copy that it computes with: otherwise an 8-bit
    base would need as much memory as a 16-bit one.
    """

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        return _Product.apply(x, self.weight, self.bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # not save_for_backward, which does not accept torchao's tensors
        return F.linear(x, dense(weight, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        return gradient @ dense(ctx.weight, gradient.dtype), None, None


OPERATIONS = SimpleNamespace(
    Linear=FrozenLinear, LayerNorm=nn.LayerNorm, Conv2d=nn.Conv2d, Embedding=nn.Embedding
)
"""Layer classes of a DiT that is not trained."""


def dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A stored weight as an ordinary tensor."""
    for method in ("get_original_weight", "dequantize"):  # torchao's NF4, and its other classes
        if type(weight).__module__.startswith("torchao") and hasattr(weight, method):
            weight = getattr(weight, method)()
    return weight.to(dtype)


@torch.no_grad()
def store(dit: DiT, precision: str) -> None:
    """Store the matrices of a frozen DiT in ``precision``, and everything else in float32.

    Precisions below 16 bits apply only inside the blocks (96 % of DiT-g/2); errors of the other matrices
    would reach every token, so these keep 16 bits.

    Raises:
        ConfigError: as :func:`quantizer` does.
    """
    quantize = quantizer(precision)
    for name, module in dit.named_modules():
        if isinstance(module, FrozenLinear):
            module.weight.requires_grad_(False)
            if _in_few_bits(name, precision):
                quantize(module)
            else:
                module.weight.data = module.weight.data.to(torch.bfloat16)
            if module.bias is not None:
                module.bias.data = module.bias.data.float()
        else:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()


def _in_few_bits(name: str, precision: str) -> bool:
    return _BITS[precision] >= 16 or ".blocks." in f".{name}"


def stored_bytes(dit: DiT, precision: str) -> int:
    """The size of a DiT in memory after :func:`store`."""
    total = 4 * sum(p.numel() for p in dit.parameters())
    for name, module in dit.named_modules():
        if isinstance(module, nn.Linear):
            bits = _BITS[precision] if _in_few_bits(name, precision) else 16
            total -= module.weight.numel() * (32 - bits) // 8
    return total


def quantizer(precision: str) -> Any:
    """The function that stores a layer's weight in ``precision``.

    Raises:
        ConfigError: int8 and nf4 without torchao.
    """
    if precision in STORED:
        dtype = dtype_of(precision)

        def to_dtype(module: nn.Linear) -> None:
            module.weight.data = cast(module.weight.data, dtype)

        return to_dtype
    try:
        with quiet_imports():
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            try:
                from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4
            except ImportError:  # before torchao 0.18
                from torchao.dtypes.nf4tensor import to_nf4
    except ImportError as error:
        raise ConfigError(
            f"lora.base_precision = {precision!r} needs torchao: pip install torchao, or use fp8"
        ) from error

    def to_torchao(module: nn.Linear) -> None:
        module.weight.data = module.weight.data.to(torch.bfloat16)
        if precision == "int8":
            quantize_(module, Int8WeightOnlyConfig())
        elif module.weight.numel() % 64 == 0:  # 64 values share a scale, and up to 256 scales share one
            together = math.gcd(module.weight.numel() // 64, 256)
            packed = to_nf4(module.weight.data, 64, together)
            module.weight = nn.Parameter(packed, requires_grad=False)

    return to_torchao
