"""Self-attention over image tokens, cross-attention to text, and the default attention function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .rope import apply_rope

Rope = tuple[Tensor, Tensor]
Options = Mapping[str, Any] | None
_SHORT = 128 * 128
"""Up to so many pairs of tokens, plain products train faster on a CPU than PyTorch's fused kernel."""


class AttentionFn(Protocol):
    """``q`` (B, N, heads, head_dim), ``k`` and ``v`` (B, M, heads, head_dim) -> (B, N, heads * head_dim).

    Softmax of q k^T / sqrt(head_dim), unmasked. ``options`` is what the model's forward was given.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, options: Options = None) -> Tensor: ...


class Attended(NamedTuple):
    """More that the queries of a cross-attention attend to, beside the text: a picture.

    ``keys`` and ``values`` (B, M, heads, head_dim), the keys normalized; ``mask`` (B or 1, N, 1) multiplies
    the result at each image token.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Attended:
        """On another device, and in another dtype."""
        mask = None if self.mask is None else self.mask.to(device, dtype)
        return Attended(self.keys.to(device, dtype), self.values.to(device, dtype), mask)


class ImageContext(NamedTuple):
    """What one block attends to beside the text.

    ``text_scale`` multiplies what it gets from the text. The attention function gets ``options`` for the
    pictures, None: those that it gets for the text.
    """

    attended: Sequence[Attended] = ()
    text_scale: float = 1.0
    options: Options = None

    @property
    def matters(self) -> bool:
        """Whether a block gives anything else with it than without."""
        return bool(self.attended) or self.text_scale != 1


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, options: Options = None) -> Tensor:
    """PyTorch's scaled dot-product attention as an :class:`AttentionFn`; ``options`` are not used.

    Without gradients, :func:`attention_by_products` serves bfloat16 on CPUs where PyTorch's fused kernel is
    slow.
    """
    q, k, v = (rearrange(x, "b n heads d -> b heads n d") for x in (q, k, v))
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and _products_pay(q, k):
        out = attention_by_products(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return rearrange(out, "b heads n d -> b n (heads d)")


def training_attention(q: Tensor, k: Tensor, v: Tensor, *, options: Options = None) -> Tensor:
    """As :func:`sdpa`, but with plain matrix products for short sequences on the CPU.

    For these the backward pass of PyTorch's fused kernel is slow: 79 ms against 9 ms for 32 x 4 heads of 64
    tokens in bfloat16. From about 256 tokens the fused kernel is faster.
    """
    if q.device.type != "cpu" or q.shape[1] * k.shape[1] > _SHORT:
        return sdpa(q, k, v, options=options)
    q, k, v = (rearrange(x, "b n heads d -> b heads n d") for x in (q, k, v))
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1).to(v.dtype)  # (B, heads, N, M)
    return rearrange(weights @ v, "b heads n d -> b n (heads d)")


def _products_pay(q: Tensor, k: Tensor) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False  # before the lengths are looked at, which would tie a graph to them
    return q.shape[-2] * k.shape[-2] >= 2**18 and _cpu_multiplies_bfloat16_outside_tiles()


@cache
def _cpu_multiplies_bfloat16_outside_tiles() -> bool:
    """True on CPUs with AVX512-BF16 and no AMX (False where PyTorch cannot tell).

    There the fused kernel multiplies bfloat16 at the speed of float32, plain matrix products at 2-3 times it.
    """
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16")) and not capabilities.get("amx_bf16")


def attention_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in slices of the score matrix that fit a core's cache; heads first, (B, heads, N, head_dim).

    For inference. The scores are rounded to the dtype of ``q`` before the softmax.
    """
    scale, width = q.shape[-1] ** -0.5, q.shape[-1]
    batch, q, k = q.shape[:2], q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)
    v = F.pad(v, (0, -width % 32)).flatten(0, 1)  # the product is much faster with whole vectors
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    bias = q.new_empty(())  # ignored through beta = 0
    rows = max(32, 2**19 // k.shape[-1])
    heads = max(8, torch.get_num_threads())
    for i in range(0, len(q), heads):
        some = slice(i, i + heads)
        for j in range(0, q.shape[1], rows):
            scores = torch.baddbmm(bias, q[some, j : j + rows], k[some], beta=0, alpha=scale)
            torch.softmax(scores, -1, out=scores)
            out[some, j : j + rows] = torch.bmm(scores, v[some])
    return out[..., :width].unflatten(0, batch)


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

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        options: Options = None,
        *,
        keys: Tensor | None = None,
        values: Tensor | None = None,
    ) -> Tensor:
        """``x`` (B, N, D) -> (B, N, D); ``keys`` and ``values`` (B, N, D) default to ``x``."""
        q, k, v = self._project(x)
        if keys is not None and keys is not x:
            k = self._project(keys)[1]
        if values is not None and values is not x:
            v = self._project(values)[2]
        q = apply_rope(self.q_norm(q), *rope).to(v.dtype)
        k = apply_rope(self.k_norm(k), *rope).to(v.dtype)
        return self.out_proj(self.attention(q, k, v, options=options))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each (B, N, heads, head_dim)."""
        parts = rearrange(
            self.Wqkv(x), "b n (three heads d) -> three b n heads d", three=3, heads=self.num_heads
        )
        return parts.unbind()


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

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        rope: Rope,
        options: Options = None,
        *,
        values: Tensor | None = None,
        images: ImageContext | None = None,
    ) -> Tensor:
        """``x`` (B, N, D), ``text`` (B, L, text_dim) -> (B, N, D); ``values`` default to ``text``.

        What ``images`` holds is attended to by the same queries, set by set, and added before the last
        projection.
        """
        q = rearrange(self.q_proj(x), "b n (heads d) -> b n heads d", heads=self.num_heads)
        k, v = self._project(text)
        if values is not None and values is not text:
            v = self._project(values)[1]
        q = apply_rope(self.q_norm(q), *rope).to(v.dtype)
        k = self.k_norm(k).to(v.dtype)
        out = self.attention(q, k, v, options=options)
        return self.out_proj(out if images is None else self._with_images(out, q, images, options))

    def _with_images(self, out: Tensor, q: Tensor, images: ImageContext, options: Options) -> Tensor:
        """``out`` (B, N, D), attended to the text, with what is attended to pictures."""
        if images.text_scale != 1:
            out = out * images.text_scale
        options = options if images.options is None else images.options
        for keys, values, mask in images.attended:
            more = self.attention(q, keys.to(q.dtype), values.to(q.dtype), options=options)
            out = out + (more if mask is None else more * mask.to(more.dtype))
        return out

    def _project(self, text: Tensor) -> tuple[Tensor, ...]:
        """Keys and values, each (B, L, heads, head_dim)."""
        parts = rearrange(
            self.kv_proj(text), "b l (two heads d) -> two b l heads d", two=2, heads=self.num_heads
        )
        return parts.unbind()
