"""Training sizes of different shapes, and which of them a picture goes to."""

from __future__ import annotations

import numpy as np

from ..errors import ConfigError
from ..images import Size, parse_size
from .config import BucketConfig, DataConfig


def generate_buckets(
    base: int, step: int, *, min_side: int | None = None, max_side: int | None = None
) -> list[Size]:
    """Tencent/HunyuanDiT's sizes around ``base`` x ``base``, as (width, height): 33 for 1024 and 64.

    From the square, one side grows and the other shrinks by ``step`` until the growing side is at
    ``max_side`` (default 2 x base) and the shrinking one at ``min_side`` (default base / 2).
    """
    low, high = min_side or base // 2, max_side or base * 2
    if not low <= base <= high:
        raise ConfigError(f"buckets: min_side {low} <= resolution {base} <= max_side {high} does not hold")
    tall: list[Size] = []
    short, long = base, base
    while short - step >= low or long + step <= high:
        short = short - step if short - step >= low else short
        long = long + step if long + step <= high else long
        tall.append((short, long))
    return [(base, base), *tall, *((h, w) for w, h in tall)]


def bucket_sizes(config: DataConfig) -> list[Size]:
    """All sizes that a run trains, (width, height), without duplicates of one aspect ratio."""
    buckets: BucketConfig = config.buckets
    if not buckets.enabled:
        return [config.fixed_size]
    if not buckets.sizes:
        assert isinstance(config.resolution, int)
        return generate_buckets(
            config.resolution, buckets.step, min_side=buckets.min_side, max_side=buckets.max_side
        )
    sizes = [parse_size(text) for text in buckets.sizes]
    by_ratio: dict[float, Size] = {}
    for size in sizes:
        other = by_ratio.setdefault(size[0] / size[1], size)
        if other is not size:
            raise ConfigError(
                f"buckets.sizes: {other[0]}x{other[1]} and {size[0]}x{size[1]} have the same aspect ratio, "
                "so no picture could be told which to take; keep one"
            )
    return sizes


def assign_buckets(widths: np.ndarray, heights: np.ndarray, sizes: list[Size]) -> np.ndarray:
    """Index into ``sizes`` of the nearest aspect ratio, (n,) int64.

    Nearness is measured on the logarithm, so a picture and the same picture turned by 90 degrees
    lose the same share of their pixels.
    """
    ratios = np.log([w / h for w, h in sizes])
    ascending = np.argsort(ratios, kind="stable")
    middles = (ratios[ascending][1:] + ratios[ascending][:-1]) / 2
    wanted = np.log(np.asarray(widths, dtype=np.float64) / np.asarray(heights, dtype=np.float64))
    return ascending[np.searchsorted(middles, wanted)]
