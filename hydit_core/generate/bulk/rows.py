"""What one row of a table of prompts asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...errors import ConfigError
from ...facts import RULES, Rule, whole
from ..drawing import check_text

PROMPTS = ("prompt", "caption", "text")
NEGATIVES = ("negative", "negative_prompt")
NUMBERS: dict[str, Rule] = {
    "seed": whole(0, 2**64 - 1),
    **{name: RULES["defaults"][name] for name in ("width", "height", "steps", "cfg")},
}
"""The columns of numbers, and what each may be. Empty cells are as if the column were not there."""
COLUMNS = (*PROMPTS, *NEGATIVES, *NUMBERS)
_NEGATIVE = RULES["defaults"]["negative"]


class Shape(NamedTuple):
    """What pictures must have in common to be drawn in one batch; None: as for all rows."""

    width: int | None = None
    height: int | None = None
    steps: int | None = None
    cfg: float | None = None


@dataclass(frozen=True)
class Row:
    """A picture to draw. ``number`` counts the rows of the table from 0; ``where`` is its place there."""

    number: int
    where: str
    prompt: str
    seed: int
    negative: str | None
    shape: Shape


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be drawn, and why."""

    number: int
    reason: str


def row_of(values: Mapping[str, Any], number: int, where: str, seed: int) -> Row:
    """Row ``number`` of a table at ``where`` ("prompts.csv, line 7"); rows without a seed get ``seed``.

    Raises :class:`ConfigError` that names the place.
    """
    numbers = {name: _number(values.get(name), name, where) for name in NUMBERS}
    own = numbers.pop("seed")
    prompt = _text(values, PROMPTS, where)
    negative = _text(values, NEGATIVES, where)
    if not prompt:
        wanted = " or ".join(PROMPTS)
        raise ConfigError(f"{where}: no prompt; expected a text in {wanted}, found {_found(values)}")
    if negative is not None and not _NEGATIVE.test(negative):
        raise ConfigError(f"{where}: the negative prompt is no {_NEGATIVE.words.removeprefix('a ')}")
    return Row(number, where, prompt, seed if own is None else int(own), negative, Shape(**numbers))  # type: ignore[arg-type]


def _text(values: Mapping[str, Any], names: tuple[str, ...], where: str) -> str | None:
    """The first of these columns that is not empty, without white space around it; an empty one may stay."""
    given = [(name, values[name]) for name in names if not _is_empty(values.get(name))]
    if not given:
        return None
    name, value = next(((name, value) for name, value in given if value != ""), given[0])
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {name} holds {type(value).__name__}, expected a text")
    try:
        check_text(value)
    except ConfigError:
        raise ConfigError(f"{where}: {name} is not valid text") from None
    return value.strip()


def _number(value: Any, name: str, where: str) -> int | float | None:
    """A cell of a column of numbers: a number, also one that a table keeps as a float or as text."""
    if _is_empty(value) or (isinstance(value, str) and not value.strip()):
        return None
    kept = value.item() if hasattr(value, "item") else value
    if isinstance(kept, str):
        try:
            kept = float(kept) if name == "cfg" else int(kept)
        except ValueError:
            kept = value
    if isinstance(kept, float) and kept.is_integer() and name != "cfg":
        kept = int(kept)
    rule = NUMBERS[name]
    if not rule.test(kept):
        raise ConfigError(f"{where}: {name} is {str(value)[:40]}; expected {rule.words}")
    return float(kept) if name == "cfg" else kept


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _found(values: Mapping[str, Any]) -> str:
    return ", ".join(str(name)[:40] for name in list(values)[:20]) or "nothing"
