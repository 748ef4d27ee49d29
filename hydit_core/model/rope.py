"""Two-dimensional rotary positions (RoFormer, Su et al. 2021), stretched over a fixed square grid."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(
    th: int,
    tw: int,
    head_dim: int,
    *,
    base: int = 32,
    scale: tuple[float, float] = (1.0, 1.0),
    shift: tuple[float, float] = (0.0, 0.0),
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for a grid of ``th`` x ``tw`` tokens, each (th*tw, head_dim) float32, row-major.

    Whatever the resolution, the longer side spans ``base`` positions and the shorter one is centered among
    them, as in HunyuanDiT's training (Tencent/HunyuanDiT, ``get_fill_resize_and_crop``).
    ``scale`` multiplies the distances between rows and between columns, ``shift`` moves all of them.
    The first half of a head is rotated by the column, the second by the row; the values come in pairs.
    """
    if th > tw:
        rh, rw = base, round(base / th * tw)
    else:
        rh, rw = round(base / tw * th), base
    # Python's round is half-to-even, as in the code that the weights were trained with
    top, left = round((base - rh) / 2), round((base - rw) / 2)
    rows = top + shift[0] + torch.arange(th, dtype=torch.float32, device=device) * (scale[0] * rh / th)
    columns = left + shift[1] + torch.arange(tw, dtype=torch.float32, device=device) * (scale[1] * rw / tw)

    half = head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
    frequencies = (10000.0**-exponents).repeat_interleave(2)  # (half,)
    angles = torch.cat(
        (
            (columns[:, None] * frequencies).expand(th, tw, half),
            (rows[:, None] * frequencies)[:, None].expand(th, tw, half),
        ),
        dim=-1,
    ).reshape(th * tw, head_dim)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2k, 2k+1) of ``x`` (B, N, heads, head_dim) in float32; returns its shape and dtype.

    A complex product does in one pass what cosine, sine and swapped copies do in many. ``torch.compile``,
    which fuses those but does not support complex numbers, gets the latter.
    """
    cos, sin = cos[:, None, ::2], sin[:, None, ::2]  # (N, 1, head_dim / 2)
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        first, second = pairs.unbind(-1)
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).to(x.dtype)
