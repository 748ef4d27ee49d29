"""LoHa and LoKr over a linear layer, as LyCORIS defines them (Yeh et al. 2023), for training.

The change of a layer is as large as its weight. peft and lycoris-lora compute it and keep it for the
backward pass, for each layer anew; here a LoKr multiplies by its two matrices one after the other, and a LoHa
computes its change again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AdaptedLinear(nn.Module):
    """A frozen linear layer and what is trained over it.

    Attributes:
        factors: what is trained, by the names that LyCORIS has for it in files.
        scale: the factor on the change, alpha / rank.
        rank_dropout: the share of the change's rows that a call in training leaves out.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        shapes: Mapping[str, tuple[int, int]],
        scale: float,
        *,
        rank_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        device = base_layer.weight.device
        self.factors = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(shape, device=device)) for name, shape in shapes.items()}
        )
        self.scale = scale
        self.rank_dropout = rank_dropout
        self._disable_adapters = False  # peft's name, so that one switch serves all kinds

    @property
    def weight(self) -> Tensor:
        """The base's: what others ask a linear layer for its dtype by."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        result: Tensor = self.base_layer(x)
        if self._disable_adapters:
            return result
        kind = x.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            x = x.to(next(iter(self.factors.values())).dtype)
        change = self.change(x) * self.scale
        if self.training and self.rank_dropout:
            # On the CPU, so that a run draws the same on every device.
            drawn = torch.rand(change.shape[-1], device="meta" if kind == "meta" else "cpu")
            change = change * (drawn >= self.rank_dropout).to(change)
        return result + change.to(result.dtype)

    def change(self, x: Tensor) -> Tensor:
        """The product of the change, without its scale, with ``x``."""
        raise NotImplementedError


class LoHaLinear(AdaptedLinear):
    """(``w1_a`` @ ``w1_b``) * (``w2_a`` @ ``w2_b``)."""

    def change(self, x: Tensor) -> Tensor:
        f = self.factors
        changed: Tensor = _LoHaProduct.apply(x, f["w1_a"], f["w1_b"], f["w2_a"], f["w2_b"])
        return changed


class _LoHaProduct(torch.autograd.Function):
    """Keeps the factors alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        ctx.save_for_backward(x, a1, b1, a2, b2)
        return F.linear(x, (a1 @ b1) * (a2 @ b2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, a1, b1, a2, b2 = ctx.saved_tensors
        (gradient,) = gradients
        one, two = a1 @ b1, a2 @ b2
        to_x = gradient @ (one * two).to(gradient.dtype) if ctx.needs_input_grad[0] else None
        whole = (gradient.flatten(0, -2).T @ x.flatten(0, -2).to(gradient.dtype)).to(a1.dtype)
        to_one, to_two = whole * two, whole * one
        return (
            None if to_x is None else to_x.to(x.dtype),
            to_one @ b1.T,
            a1.T @ to_one,
            to_two @ b2.T,
            a2.T @ to_two,
        )


class LoKrLinear(AdaptedLinear):
    """The Kronecker product of ``w1`` and ``w2``, each whole or as ``w1_a`` @ ``w1_b``."""

    def change(self, x: Tensor) -> Tensor:
        columns = sum(f.shape[1] for name, f in self.factors.items() if name in ("w1", "w1_b"))
        inner = self._times("w2", x.unflatten(-1, (columns, -1)))  # (..., columns of w1, rows of w2)
        return self._times("w1", inner.transpose(-1, -2)).transpose(-1, -2).flatten(-2)

    def _times(self, name: str, x: Tensor) -> Tensor:
        if name in self.factors:
            return F.linear(x, self.factors[name])
        return F.linear(F.linear(x, self.factors[f"{name}_b"]), self.factors[f"{name}_a"])
