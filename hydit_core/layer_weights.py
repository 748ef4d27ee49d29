"""One weight for each residual of a ControlNet or block of a model, written as a list or as a curve."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError
from .untrusted import read_json

PUBLISHED_DECAY = 0.825
"""The base of Tencent's example, ``1.0 * 0.825 ** (19 - i)`` for i = 0..18: later layers weigh more."""


def _decay(base: float, count: int) -> list[float]:
    return [base ** (count - i) for i in range(count)]


def _linear(end: float, count: int) -> list[float]:
    return [end * (i + 1) / count for i in range(count)]


def _ease(end: float, count: int) -> list[float]:
    return [end * x * x * (3 - 2 * x) for x in _linear(1.0, count)]


def _early(weight: float, count: int) -> list[float]:
    return [weight if 2 * i < count else 0.0 for i in range(count)]


def _late(weight: float, count: int) -> list[float]:
    return [0.0 if 2 * i < count else weight for i in range(count)]


CURVES: dict[str, tuple[Callable[[float, int], list[float]], float]] = {
    "uniform": (lambda weight, count: [weight] * count, 1.0),
    "decay": (_decay, PUBLISHED_DECAY),
    "linear": (_linear, 1.0),
    "ease": (_ease, 1.0),
    "only-early": (_early, 1.0),
    "only-late": (_late, 1.0),
}
"""By name: the function from a number and the count to the weights, and the number's default.

``uniform(w)`` is w everywhere; ``decay(b)`` is b ** (n - i); ``linear(w)`` rises to w in equal steps,
``ease(w)`` along a smooth step; ``only-early(w)`` and ``only-late(w)`` are w in one half and 0 in the other.
"""

_CURVE = re.compile(r"([a-z-]+)\s*(?:\(\s*([^()\s]+)\s*\))?")


@dataclass(frozen=True)
class LayerWeights:
    """Weights of a ControlNet's residuals; index i is the residual for skip i, after block i.

    A curve (``curve`` and its ``value``) fits every ControlNet, a list (``values``) only those with as many.
    """

    curve: str = "uniform"
    value: float = 1.0
    values: tuple[float, ...] = ()

    @classmethod
    def parse(cls, source: str | float | Sequence[float] | LayerWeights) -> LayerWeights:
        """Read ``"decay"``, ``"decay(0.9)"``, ``"0.5"``, ``"0.1, 0.2, 1"``, a number or a list of numbers.

        Raises :class:`ConfigError` for anything else, including numbers that are not finite.
        """
        if isinstance(source, LayerWeights):
            return source
        if isinstance(source, (int, float)):
            return cls("uniform", _finite(source, str(source)))
        if not isinstance(source, str):
            numbers = tuple(_finite(value, repr(value)) for value in source)
            if not numbers:
                raise ConfigError("the list of layer weights is empty")
            return cls("", 1.0, numbers)
        text = source.strip()
        if match := _CURVE.fullmatch(text.lower()):
            name, number = match.groups()
            if name in CURVES:
                default = CURVES[name][1]
                return cls(name, default if number is None else _finite(number, text))
        parts = [part for part in re.split(r"[,;\s]+", text.strip("[]() \n")) if part]
        try:
            numbers = tuple(_finite(part, part) for part in parts)
        except ConfigError as error:
            raise ConfigError(
                f"layer weights {text!r}: {error}; expected numbers such as '0.5, 0.8, 1', or one of "
                + ", ".join(f"{name}({default:g})" for name, (_, default) in CURVES.items())
            ) from None
        if not numbers:
            raise ConfigError("layer weights are empty: give numbers, or one of " + ", ".join(CURVES))
        return cls("uniform", numbers[0]) if len(numbers) == 1 else cls("", 1.0, numbers)

    def resolve(self, count: int) -> list[float]:
        """The weights for a ControlNet with ``count`` residuals.

        Raises :class:`ConfigError` if a list has another length, or a curve's values overflow.
        """
        if self.curve:
            try:
                return [_finite(w, str(w)) for w in CURVES[self.curve][0](self.value, count)]
            except (OverflowError, ConfigError):
                raise ConfigError(f"layer weights {self}: too large for {count} layers") from None
        if len(self.values) != count:
            raise ConfigError(
                f"{len(self.values)} layer weights for a ControlNet with {count} layers: give {count} "
                "numbers, one for all, or the name of a curve"
            )
        return list(self.values)

    def __str__(self) -> str:
        """Text that :meth:`parse` reads back."""
        if self.curve:
            return f"{self.curve}({_shown(self.value)})"
        return ", ".join(map(_shown, self.values))


def split_weight(text: str) -> tuple[Path, float]:
    """``FILE:0.7`` -> the path and 0.7; without a number after a colon, the whole text and 1.

    Raises :class:`ConfigError` if what follows the colon is not a number, and only what precedes it exists.
    """
    path, colon, number = text.rpartition(":")
    try:
        return (Path(path), float(number)) if colon and path else (Path(text), 1.0)
    except ValueError:
        if Path(path).expanduser().exists() and not Path(text).expanduser().exists():
            message = f"{text}: {number!r} after the colon is not a number, as in {path}:0.8"
            raise ConfigError(message) from None
        return Path(text), 1.0


def read_each(texts: Sequence[str], option: str, count: int, of: str) -> list[LayerWeights]:
    """Layer weights for each of ``count`` things, from as many texts or one for all; none without any text.

    Raises :class:`ConfigError` for other numbers of texts and unreadable ones; ``of`` names the things.
    """
    check_count(len(texts), option, count, of)
    read = [read_weights(text, option) for text in texts]
    return read * count if len(read) == 1 else read


def check_count(given: int, option: str, count: int, of: str) -> None:
    """Raise :class:`ConfigError` unless an option is given never, once for all, or for each of ``count``."""
    if given not in {0, 1, count}:
        needed = "1" if count == 1 else f"1 or {count}"
        raise ConfigError(f"{option} is given {given} times for {count} {of}: give {needed}")


def read_weights(text: str, option: str) -> LayerWeights:
    """Layer weights from a command line: a text, or the name of a JSON file with a list or a text.

    Raises :class:`ConfigError` that says what can be written; for a file it names ``option``.
    """
    if not text.lower().endswith(".json"):
        return LayerWeights.parse(text)
    try:
        content = read_json(text, kind=object, error=ConfigError)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from None
    if not isinstance(content, (str, int, float, list)) or isinstance(content, bool):
        raise ConfigError(f"{option} {text}: expected a list of numbers, a number or the name of a curve")
    return LayerWeights.parse(content)


def _shown(value: float) -> str:
    """The shortest text that stands for exactly this number."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _finite(value: object, shown: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ConfigError(f"{shown!r} is not a number") from None
    if not math.isfinite(number):
        raise ConfigError(f"{shown!r} is not a finite number")
    return number
