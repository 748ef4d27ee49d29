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
from . import kitchen, unread
from .packed import INT8, Scheme, pack
from .source import cast

_BITS = {name: 8 * dtype_of(name).itemsize for name in STORED} | {"int8": 8, "nf4": 4}


class FrozenLinear(nn.Linear):
    """A linear layer that is not trained but passes gradients on.

    For the backward pass it keeps the stored weight, not the copy that it computes with: otherwise an 8-bit
    base would need as much memory as a 16-bit one.

    Attributes:
        in_8_bits: an int8 weight that a file brought is multiplied in int8, with inputs that are rounded to
            8 bits row by row, as ComfyUI does; never where a gradient is asked for.
    """

    in_8_bits = False

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        if x.requires_grad and torch.is_grad_enabled():
            return _Product.apply(x, self.weight, self.bias)
        return _product(x, self.weight, self.bias, in_8_bits=self.in_8_bits)

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenLinear:
        # torch moves a parameter by its data, which comfy-kitchen's tensors do not have
        weight = self.weight
        if not kitchen.is_quantised(weight):
            return super()._apply(fn, recurse)
        del self.weight
        try:
            super()._apply(fn, recurse)
        finally:
            self.weight = kitchen.moved(weight, fn)
        return self


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # not save_for_backward, which does not accept torchao's tensors
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        return gradient @ dense(ctx.weight, gradient.dtype), None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, *, in_8_bits: bool = False) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    if in_8_bits and kitchen.is_quantised(weight) and kitchen.scheme_of(weight).format == INT8:
        with torch.no_grad():
            return F.linear(x, weight, bias)
    return F.linear(x, dense(weight, x.dtype), bias)


def freeze_kept(model: nn.Module, *, in_8_bits: bool) -> None:
    """Make the layers of a model whose weights are kept quantised compute with them, frozen."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and kitchen.is_quantised(module.weight):
            module.__class__ = FrozenLinear  # which adds nothing to the layer but how it computes
            module.in_8_bits = in_8_bits  # type: ignore[assignment]
            module.weight.requires_grad_(False)


OPERATIONS = SimpleNamespace(
    Linear=FrozenLinear, LayerNorm=nn.LayerNorm, Conv2d=nn.Conv2d, Embedding=nn.Embedding
)
"""Layer classes of a DiT that is not trained."""


def dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A stored weight as an ordinary tensor."""
    if type(weight) in (Tensor, nn.Parameter):
        return weight.to(dtype)
    if kitchen.is_quantised(weight):
        return kitchen.packed_of(weight).dense().to(dtype)
    for method in ("get_original_weight", "dequantize"):  # torchao's NF4, and its other classes
        if type(weight).__module__.startswith("torchao") and hasattr(weight, method):
            weight = getattr(weight, method)()
    return weight.to(dtype)


@torch.no_grad()
def store(dit: DiT, precision: str | None, *, default: str = "fp32") -> None:
    """Store the matrices of a frozen DiT in ``precision``, and everything else in float32.

    None is ``default`` for what is not quantised, and leaves the rest as it is. Precisions below 16 bits hold
    only inside the blocks (96 % of DiT-g/2): errors of the other matrices would reach every token, so these
    keep 16 bits.

    Raises:
        ConfigError: as :func:`quantizer` does.
    """
    keeps, precision = precision is None, precision or default
    quantize = quantizer(precision)
    for name, module in dit.named_modules():
        if isinstance(module, FrozenLinear):
            module.weight.requires_grad_(False)
            _read_what_stays_whole(module, keeps, _BITS[precision] < 16 and _in_few_bits(name, precision))
            if kitchen.is_quantised(module.weight) and not keeps:
                module.weight = nn.Parameter(dense(module.weight, torch.float32), requires_grad=False)
            module.in_8_bits = False
            if kitchen.is_quantised(module.weight):
                pass  # as in the file
            elif _in_few_bits(name, precision):
                quantize(module)
            else:
                module.weight.data = module.weight.data.to(torch.bfloat16)
            if module.bias is not None:
                module.bias.data = module.bias.data.float()
        else:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()


def _read_what_stays_whole(module: FrozenLinear, keeps: bool, narrow: bool) -> None:
    """A weight in fewer than 16 bits is of a class that knows no parts: each process reads all of it."""
    values = unread.values_of(module.weight)
    if isinstance(values, unread.Stored) and (narrow or (values.packed and keeps)):
        read = values.kept() if values.packed and keeps else values.whole()
        module.weight = nn.Parameter(read, requires_grad=False)


def _in_few_bits(name: str, precision: str) -> bool:
    return _BITS[precision] >= 16 or ".blocks." in f".{name}"


def stored_bytes(dit: DiT, precision: str | None, *, default: str = "fp32") -> int:
    """The size of a DiT in memory after :func:`store`."""
    narrow = _matrices(dit, precision, default)
    return 4 * sum(p.numel() for p in dit.parameters()) - sum(n * (32 - bits) // 8 for n, bits in narrow)


def splittable_bytes(dit: DiT, precision: str | None, *, default: str = "fp32") -> int:
    """Of :func:`stored_bytes`, what is in ordinary tensors of 16 bits or more."""
    few = sum(n * bits // 8 for n, bits in _matrices(dit, precision, default) if bits < 16)
    return stored_bytes(dit, precision, default=default) - few


def _matrices(dit: DiT, precision: str | None, default: str) -> list[tuple[int, int]]:
    """Of each linear layer how many weights it has, and the bits of one after :func:`store`."""
    keeps, precision = precision is None, precision or default
    found = []
    for name, module in dit.named_modules():
        if isinstance(module, nn.Linear):
            bits = _BITS[precision] if _in_few_bits(name, precision) else 16
            kept = kitchen.is_quantised(module.weight) or unread.stays_packed(module.weight)
            found.append((module.weight.numel(), 8 if keeps and kept else bits))
    return found


def quantizer(precision: str) -> Any:
    """The function that stores a layer's weight in ``precision``.

    Raises:
        ConfigError: nf4 without torchao, int8 without comfy-kitchen and torchao.
    """
    if precision in STORED:
        dtype = dtype_of(precision)

        def to_dtype(module: nn.Linear) -> None:
            module.weight.data = cast(module.weight.data, dtype)

        return to_dtype
    if precision == "int8" and kitchen.is_available():
        return _to_int8
    try:
        with quiet_imports():
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            try:
                from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4
            except ImportError:  # before torchao 0.18
                from torchao.dtypes.nf4tensor import to_nf4
    except ImportError as error:
        needs = "comfy-kitchen" if precision == "int8" else "torchao"
        raise ConfigError(
            f"lora.base_precision = {precision!r} needs {needs}: pip install {needs}, or use fp8"
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


def _to_int8(module: nn.Linear) -> None:
    packed = pack(module.weight.data, Scheme(INT8, rows=True))
    kept = kitchen.keep(packed, torch.bfloat16, module.weight.device)
    module.weight = nn.Parameter(kept, requires_grad=False)
