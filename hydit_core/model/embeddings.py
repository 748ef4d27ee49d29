"""Embedders that turn latents, timesteps and text features into tokens and vectors."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

SINUSOID_DIM = 256


def timestep_embedding(t: Tensor, dim: int = SINUSOID_DIM) -> Tensor:
    """Sinusoids of ``t`` (B,) as (B, dim) float32, cosines first (GLIDE, Nichol et al. 2021).

    Always float32: in bfloat16 the timestep 801 would become 800.
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * k / half)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimestepEmbedder(nn.Module):
    """The timestep's sinusoids and two linear layers."""

    def __init__(self, dim: int, operations: Any, **factory: Any):
        super().__init__()
        self.mlp = nn.Sequential(
            operations.Linear(SINUSOID_DIM, dim, **factory),
            nn.SiLU(),
            operations.Linear(dim, dim, **factory),
        )

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """``t`` (B,) -> (B, D); the sinusoid is cast to ``dtype`` before the linear layers."""
        return self.mlp(timestep_embedding(t).to(dtype))


class PatchEmbed(nn.Module):
    """Latents cut into patches, one token each."""

    def __init__(self, patch: int, in_channels: int, dim: int, operations: Any, **factory: Any):
        super().__init__()
        self.patch = patch
        self.proj = operations.Conv2d(in_channels, dim, kernel_size=patch, stride=patch, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, C, H, W) -> (B, N, D), row-major; odd sizes are padded circularly, right and bottom."""
        right, bottom = -x.shape[-1] % self.patch, -x.shape[-2] % self.patch
        if right or bottom:
            x = F.pad(x, (0, right, 0, bottom), mode="circular")
        # In memory as in shape: the residual stream keeps this layout, and layer norms would copy another.
        return rearrange(self.proj(x), "b d h w -> b (h w) d").contiguous()


class AttentionPool(nn.Module):
    """One vector from the mT5 rows: their mean attends to itself and to the rows (CLIP's attention pool)."""

    def __init__(self, length: int, dim: int, num_heads: int, out_dim: int, operations: Any, **factory: Any):
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding: nn.Parameter = nn.Parameter(torch.zeros(length + 1, dim, **factory))
        self.k_proj = operations.Linear(dim, dim, **factory)
        self.q_proj = operations.Linear(dim, dim, **factory)
        self.v_proj = operations.Linear(dim, dim, **factory)
        self.c_proj = operations.Linear(dim, out_dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, L, dim) -> (B, out_dim). No mask: padding rows count, as in training."""
        rows = torch.cat((x.mean(dim=1, keepdim=True), x), dim=1)  # (B, L + 1, dim)
        rows = rows + self.positional_embedding.to(device=x.device, dtype=x.dtype)
        # A slice of one row, kept three-dimensional, would make PyTorch copy the weight for every sample
        query = self.q_proj(rows[:, 0])[:, None]
        q, k, v = (
            rearrange(projected, "b rows (heads d) -> b heads rows d", heads=self.num_heads)
            for projected in (query, self.k_proj(rows), self.v_proj(rows))
        )
        pooled = F.scaled_dot_product_attention(q, k, v)
        return self.c_proj(rearrange(pooled, "b heads one d -> b (one heads d)"))
