"""The transformer block and the final layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionFn, CrossAttention, ImageContext, Options, Rope, SelfAttention
from .config import DiTConfig


class Mlp(nn.Module):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, dim: int, hidden: int, operations: Any, **factory: Any):
        super().__init__()
        self.fc1 = operations.Linear(dim, hidden, **factory)
        self.fc2 = operations.Linear(hidden, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, N, D) -> (B, N, D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """A HunyuanDiT block: skip, shifted self-attention, cross-attention to text, MLP.

    The names are Tencent's: ``norm3`` comes before the cross-attention, ``norm2`` before the MLP.
    PyTorch's layer norm computes its statistics and affine part in float32 whatever the input's dtype, so
    the float32 norms of the paper need no casts.
    """

    def __init__(
        self,
        config: DiTConfig,
        attention: AttentionFn,
        operations: Any,
        *,
        skip: bool = False,
        **factory: Any,
    ):
        super().__init__()
        dim, heads = config.hidden_size, config.num_heads
        self.norm1 = operations.LayerNorm(dim, eps=1e-6, **factory)
        self.default_modulation = nn.Sequential(nn.SiLU(), operations.Linear(dim, dim, **factory))
        self.attn1 = SelfAttention(dim, heads, attention, operations, **factory)
        self.norm3 = operations.LayerNorm(dim, eps=1e-6, **factory)
        self.attn2 = CrossAttention(dim, config.text_dim, heads, attention, operations, **factory)
        self.norm2 = operations.LayerNorm(dim, eps=1e-6, **factory)
        self.mlp = Mlp(dim, config.mlp_hidden, operations, **factory)
        if skip:
            self.skip_norm = operations.LayerNorm(2 * dim, eps=1e-6, **factory)
            self.skip_linear = operations.Linear(2 * dim, dim, **factory)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        vector: Tensor,
        rope: Rope,
        skip: Tensor | None = None,
        options: Options = None,
        images: ImageContext | None = None,
    ) -> Tensor:
        """``x``, ``skip`` (B, N, D), ``text`` (B, L, text_dim), ``vector`` (B, D) -> (B, N, D)."""
        if skip is not None:
            x = self.skip_linear(self.skip_norm(torch.cat((x, skip), dim=-1)))
        shift = self.default_modulation(vector)[:, None]  # (B, 1, D)
        x = x + self._attend(self.norm1(x) + shift, rope, options)
        x = x + self._attend_text(self.norm3(x), text, rope, options, images)
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor, rope: Rope, options: Options) -> Tensor:
        """Self-attention; subclasses override this and :meth:`_attend_text` to change inputs and outputs."""
        return self.attn1(x, rope, options)

    def _attend_text(
        self, x: Tensor, text: Tensor, rope: Rope, options: Options, images: ImageContext | None
    ) -> Tensor:
        return self.attn2(x, text, rope, options, images=images)


class FinalLayer(nn.Module):
    """Modulated norm and projection of every token to its patch."""

    def __init__(self, dim: int, patch_values: int, operations: Any, **factory: Any):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), operations.Linear(dim, 2 * dim, **factory))
        self.linear = operations.Linear(dim, patch_values, **factory)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """``x`` (B, N, D), ``vector`` (B, D) -> (B, N, patch_values)."""
        shift, scale = self.adaLN_modulation(vector)[:, None].chunk(2, dim=-1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
