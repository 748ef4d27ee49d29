"""Large pictures in overlapping tiles: where they are, and how their results are joined without seams."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import ConfigError


class Box(NamedTuple):
    """A rectangle of a grid of pixels or latents."""

    top: int
    left: int
    height: int
    width: int

    def of(self, values: Tensor, scale: int = 1) -> Tensor:
        """This part of ``values`` (..., H, W), whose grid is ``scale`` times as fine."""
        top, left, height, width = (scale * side for side in self)
        return values[..., top : top + height, left : left + width]


class Tiles:
    """Tiles of one size that cover a grid of ``height`` x ``width``; one tile if the grid is no larger.

    Args:
        height, width: of the grid.
        tile: (height, width) of a tile; what exceeds the grid is cut off.
        overlap: how much neighbors share at least.

    Raises:
        ConfigError: tiles cannot overlap by so much.
    """

    def __init__(self, height: int, width: int, tile: tuple[int, int], overlap: int) -> None:
        if not 0 <= overlap < min(tile):
            raise ConfigError(
                f"tiles of {tile[1]}x{tile[0]} cannot overlap by {overlap}; use 0 to {min(tile) - 1}"
            )
        self.height, self.width, self.overlap = height, width, overlap
        self.tile = min(tile[0], height), min(tile[1], width)
        self.boxes = [
            Box(top, left, *self.tile)
            for top in starts(height, self.tile[0], overlap)
            for left in starts(width, self.tile[1], overlap)
        ]

    def blended(self, parts: Iterable[Tensor], scale: int = 1) -> Tensor:
        """Join each tile's result (..., h * scale, w * scale), in the order of ``boxes``.

        Where tiles overlap, each counts the less, the nearer its border is. One tile is returned as it is.
        """
        if len(self.boxes) == 1:
            (whole,) = parts
            return whole
        total = weights = None
        for box, part in zip(self.boxes, parts, strict=True):
            if total is None or weights is None:
                size = self.height * scale, self.width * scale
                total, weights = part.new_zeros(*part.shape[:-2], *size), part.new_zeros(size)
            rows = ramp(box.top, box.height, self.height, self.overlap, scale).to(part)
            columns = ramp(box.left, box.width, self.width, self.overlap, scale).to(part)
            share = rows[:, None] * columns
            box.of(total, scale).add_(part * share)
            box.of(weights, scale).add_(share)
        assert total is not None and weights is not None
        return total / weights


def overlap_of(tile: tuple[int, int]) -> int:
    """A quarter of a tile's shorter side, in whole patches (latents)."""
    return min(tile) // 8 * 2


def starts(size: int, tile: int, overlap: int) -> list[int]:
    """First positions of tiles that cover ``size``, the last one flush with the end."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def ramp(start: int, length: int, size: int, overlap: int, scale: int) -> Tensor:
    """Blending weights of one tile along one axis, ``length * scale``: linear where it meets a neighbor,
    else 1."""
    pixels = torch.arange(length * scale) + 0.5
    weights = torch.ones(length * scale)
    if overlap and start > 0:
        weights = torch.minimum(weights, pixels / (overlap * scale))
    if overlap and start + length < size:
        weights = torch.minimum(weights, pixels.flip(0) / (overlap * scale))
    return weights
