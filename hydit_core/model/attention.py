"""Self-attention over image tokens, cross-attention to text, and the default attention function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from .rope import apply_rope

Rope = tuple[Tensor, Tensor]
Options = Mapping[str, Any] | None


class AttentionFn(Protocol):
    """``q`` (B, N, heads, head_dim), ``k`` and ``v`` (B, M, heads, head_dim) -> (B, N, heads * head_dim).

    Softmax of q k^T / sqrt(head_dim), unmasked. ``options`` is what the model's forward was given.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, options: Options = None) -> Tensor: ...


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, options: Options = None) -> Tensor:
    """PyTorch's scaled dot-product attention as an :class:`AttentionFn`; ``options`` are not used."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(-2)


class SelfAttention(nn.Module):
    """Attention among image tokens with normalized, rotated queries and keys."""

    def __init__(self, dim: int, num_heads: int, attention: AttentionFn, operations: Any, **factory: Any):
        super().__init__()
        self.num_heads = num_heads
        self.attention = attention
        self.Wqkv = operations.Linear(dim, 3 * dim, **factory)
        self.q_norm = operations.LayerNorm(dim // num_heads, eps=1e-6, **factory)
        self.k_norm = operations.LayerNorm(dim // num_heads, eps=1e-6, **factory)
        self.out_proj = operations.Linear(dim, dim, **factory)

    def forward(self, x: Tensor, rope: Rope, options: Options = None) -> Tensor:
        """``x`` (B, N, D) -> (B, N, D)."""
        q, k, v = self.Wqkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (B, N, heads, head_dim)
        q = apply_rope(self.q_norm(q), *rope).to(v.dtype)
        k = apply_rope(self.k_norm(k), *rope).to(v.dtype)
        return self.out_proj(self.attention(q, k, v, options=options))


class CrossAttention(nn.Module):
    """Attention from image tokens to text rows; only the queries have positions."""

    def __init__(
        self, dim: int, text_dim: int, num_heads: int, attention: AttentionFn, operations: Any, **factory: Any
    ):
        super().__init__()
        self.num_heads = num_heads
        self.attention = attention
        self.q_proj = operations.Linear(dim, dim, **factory)
        self.kv_proj = operations.Linear(text_dim, 2 * dim, **factory)
        self.q_norm = operations.LayerNorm(dim // num_heads, eps=1e-6, **factory)
        self.k_norm = operations.LayerNorm(dim // num_heads, eps=1e-6, **factory)
        self.out_proj = operations.Linear(dim, dim, **factory)

    def forward(self, x: Tensor, text: Tensor, rope: Rope, options: Options = None) -> Tensor:
        """``x`` (B, N, D), ``text`` (B, L, text_dim) -> (B, N, D)."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1))  # (B, N, heads, head_dim)
        k, v = self.kv_proj(text).unflatten(-1, (2, self.num_heads, -1)).unbind(2)  # (B, L, heads, head_dim)
        q = apply_rope(self.q_norm(q), *rope).to(v.dtype)
        k = self.k_norm(k).to(v.dtype)
        return self.out_proj(self.attention(q, k, v, options=options))
