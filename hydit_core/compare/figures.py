"""From pairs of pictures to the figures of a side: means, the worst twentieth, cost, the judge's share."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from .similarity import SMALLEST, decibels, flip, haarpsi, mse, ssim
from .store import Cost, pixels_of

HIGHER_IS_CLOSER = {"psnr": True, "ssim": True, "haarpsi": True, "flip": False}
_WORST = 0.05


@dataclass
class Pair:
    """One picture of a side against the reference's of the same item."""

    name: str
    prompt: str
    seed: int | None
    size: tuple[int, int]
    reference: Path
    picture: Path
    mse: float
    figures: dict[str, float | None]


@dataclass
class Result:
    """One side: its pairs (none for the reference itself), what they cost, and the judge's verdicts.

    ``text_accuracy`` is that of ``read`` pictures that should show a text.
    """

    name: str
    text: str
    settings: dict[str, Any]
    pairs: list[Pair] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    right: int | None = None
    judged: int | None = None
    text_accuracy: float | None = None
    read: int = 0


def measure(name: str, prompt: str, seed: int | None, reference: Path, picture: Path) -> Pair:
    """Compare two pictures. Raises :class:`DataError` if they cannot be read or differ in size."""
    x, y = pixels_of(reference), pixels_of(picture)
    if x.shape != y.shape:
        (h, w), (k, v) = x.shape[1:], y.shape[1:]
        raise DataError(f"{picture} is {v}x{k}, {reference} {w}x{h}: both must have one size")
    if min(x.shape[1:]) < SMALLEST:
        raise DataError(f"{reference} is smaller than {SMALLEST} pixels")
    error = mse(x, y)
    figures = {
        "psnr": decibels(error),
        "ssim": ssim(x, y),
        "haarpsi": haarpsi(x, y),
        "flip": flip(x, y),
    }
    return Pair(name, prompt, seed, (x.shape[2], x.shape[1]), reference, picture, error, figures)


def worst(values: Sequence[float], *, higher_is_closer: bool) -> list[float]:
    """The worst twentieth of the values, at least one."""
    count = max(1, math.ceil(len(values) * _WORST))
    return sorted(values, reverse=not higher_is_closer)[:count]


def summary(result: Result) -> dict[str, Any]:
    """A side's figures: each measure's mean and mean of the worst 5 %; calls, passes, seconds a picture."""
    found: dict[str, Any] = {"pictures": len(result.pairs) or len(result.costs)}
    if result.costs:
        found["calls"] = statistics.fmean(cost.calls for cost in result.costs)
        found["passes"] = statistics.fmean(cost.passes for cost in result.costs)
        found["seconds"] = statistics.median(cost.seconds for cost in result.costs)
    if result.judged is not None:
        found |= {"right": result.right, "judged": result.judged}
    if result.read:
        found |= {"text_accuracy": result.text_accuracy, "read": result.read}
    if not result.pairs:
        return found
    for measure_name, higher in HIGHER_IS_CLOSER.items():
        values = [value for pair in result.pairs if (value := pair.figures[measure_name]) is not None]
        if values:
            low = worst(values, higher_is_closer=higher)
            found[measure_name] = {"mean": statistics.fmean(values), "worst": statistics.fmean(low)}
    errors = [pair.mse for pair in result.pairs]
    low = worst(errors, higher_is_closer=False)
    found["mean_mse"] = statistics.fmean(errors)
    found["psnr_of_mean_mse"] = {
        "mean": decibels(statistics.fmean(errors)),
        "worst": decibels(statistics.fmean(low)),
    }
    return found


def by_closeness(pairs: Sequence[Pair]) -> list[Pair]:
    """The worst first, by mean square error."""
    return sorted(pairs, key=lambda pair: -pair.mse)


Judge = Callable[..., Any]


def verdicts(judge: Judge, pictures: Sequence[tuple[str, Path]]) -> tuple[int, int]:
    """How many ``(prompt, picture)`` a judge finds right, and of how many it can tell."""
    from ..images import load_picture

    found = [judge(load_picture(path), prompt) for prompt, path in pictures]
    told = [bool(one) for one in found if one is not None]
    return sum(told), len(told)
