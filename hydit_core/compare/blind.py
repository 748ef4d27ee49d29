"""The blind sheet: pairs without names for a person to judge, the key beside it, and what answers say."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError
from ..pages.render import data_url, render
from ..untrusted import read_json, read_text
from .figures import Pair, Result
from .page import HERE, STYLES
from .sheet import as_image
from .store import pixels_of, write_text

SHEET, KEY = "blind.html", "blind-key.json"
_FORMAT = 1
_SIDES = ("left", "right", "same")


class Counts(NamedTuple):
    """How often each side was preferred, and how often neither; ``unanswered`` pairs have no line."""

    side: int
    reference: int
    same: int
    unanswered: int


def write_blind(out: Path, reference: str, result: Result, count: int, seed: int) -> list[Path]:
    """Write the sheet of up to ``count`` pairs, and its key.

    Which pairs, in which order, and which side is on the left is drawn from ``seed``. The sheet says
    nothing of it: the pictures are encoded anew, without what their files remember.
    """
    draw = random.Random(seed)
    pairs = draw.sample(result.pairs, min(count, len(result.pairs)))
    left = [draw.choice((reference, result.name)) for _ in pairs]
    items = [_item(pair, name == reference) for pair, name in zip(pairs, left, strict=True)]
    text = render(HERE, "blind.html", styles=STYLES, scripts=("blind.js",), items=items)
    key = {
        "format": _FORMAT,
        "reference": reference,
        "side": result.name,
        "seed": seed,
        "left": left,
        "pictures": [pair.name for pair in pairs],
    }
    write_text(out / SHEET, text)
    write_text(out / KEY, json.dumps(key, ensure_ascii=False, indent=1))
    return [out / SHEET, out / KEY]


def _item(pair: Pair, reference_left: bool) -> dict[str, Any]:
    paths = [pair.reference, pair.picture] if reference_left else [pair.picture, pair.reference]
    left, right = (data_url(as_image(pixels_of(path))) for path in paths)
    return {"prompt": pair.prompt, "left": left, "right": right}


def count_answers(answers: Path, key: Path) -> tuple[str, str, Counts]:
    """Count a file of answers, one line a pair: its number and ``left``, ``right`` or ``same``.

    Returns:
        the names of reference and side, and the counts.

    Raises:
        ConfigError: a file cannot be read, or a line is no answer to this sheet.
    """
    found = read_json(key, error=ConfigError)
    names = (found.get("reference"), found.get("side"))
    left = found.get("left")
    if (
        not all(isinstance(name, str) for name in names)
        or not isinstance(left, list)
        or any(name not in names for name in left)
    ):
        raise ConfigError(f"{key}: not the key of a blind sheet; give the {KEY} that was written with it")
    chosen: dict[int, str] = {}
    for number, line in enumerate(read_text(answers, error=ConfigError).splitlines(), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"\s*(\d{1,9})[\s:.,]+(left|right|same)\s*", line.lower())
        where = f"{answers}, line {number}"
        if not match or not 1 <= (index := int(match[1])) <= len(left):
            raise ConfigError(
                f"{where}: {line.strip()[:60]!r} is no answer; write a number from 1 to {len(left)} and "
                f"one of {', '.join(_SIDES)}: 1 left"
            )
        if chosen.setdefault(index, match[2]) != match[2]:
            raise ConfigError(f"{where}: pair {index} has two answers")
    preferred = [_preferred(left[index - 1], answer, names) for index, answer in chosen.items()]
    counts = Counts(
        preferred.count(names[1]),
        preferred.count(names[0]),
        preferred.count(None),
        len(left) - len(chosen),
    )
    return str(names[0]), str(names[1]), counts


def _preferred(left: str, answer: str, names: Sequence[str | None]) -> str | None:
    if answer == "same":
        return None
    return left if answer == "left" else next(name for name in names if name != left)


def wilson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """The confidence interval of a binomial share (Wilson 1927); (0, 1) without trials."""
    if not trials:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    share, scale = successes / trials, 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def verdict(reference: str, side: str, counts: Counts) -> str:
    """The counts in words, with the interval of the share that preferred the side."""
    decided = counts.side + counts.reference
    low, high = wilson(counts.side, decided)
    lines = [
        f"{side} preferred: {counts.side}, {reference} preferred: {counts.reference}, no difference: "
        f"{counts.same}, unanswered: {counts.unanswered}"
    ]
    if decided:
        shown = "no difference is shown" if low <= 0.5 <= high else "that is no chance"
        lines.append(
            f"where one was preferred, it was {side} in {counts.side / decided:.0%} "
            f"(95 % interval: {low:.0%} to {high:.0%}); {shown}"
        )
    return "\n".join(lines)
