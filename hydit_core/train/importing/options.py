"""The options of another trainer's file: each is taken once, believed only in its type, and accounted for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import printable
from ..quick.choices import Choice

_SHOWN = 60
_KINDS: Mapping[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_SECRET = re.compile(r"api_?key|passw|secret|credential|(hf|hub|face|access|auth)_?token")
_TRUTH = {"true": True, "on": True, "false": False, "off": False}


@dataclass
class Options:
    """What a file says, what became of it, and what has no counterpart.

    Attributes:
        values: the options by name, tables inside as ``table.option`` or as they are.
        choices: what goes into our configuration, with where it came from.
        notes: what does not, and why, one line each.
    """

    values: dict[str, Any]
    choices: dict[tuple[str, str], Choice] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)

    def take(self, name: str, kind: type) -> Any:
        """The value of an option; None where it is not given, empty, or of another type (noted)."""
        self._seen.add(name)
        value = self.values.get(name)
        if value is None or value == "":
            return None
        found = _converted(value, kind)
        if found is None:
            self.note(name, f"expected {_KINDS[kind]}; left out")
        return found

    def put(self, key: str, value: Any, origin: str) -> None:
        """Set ``table.key`` of our configuration. The first value counts."""
        table, _, last = key.rpartition(".")
        if value is not None:
            self.choices.setdefault((table, last), Choice(table, last, value, origin))

    def copy(self, name: str, key: str, kind: type, change: Callable[[Any], Any] | None = None) -> Any:
        """An option that we have under another name; ``change`` may make another value of it, or None."""
        value = self.take(name, kind)
        if value is not None:
            self.put(key, value if change is None else change(value), name)
        return value

    def choose(self, name: str, key: str, known: Mapping[str, tuple[Any, str]]) -> str | None:
        """An option with names for values: ours for each, with what is different about it."""
        value = self.take(name, str)
        if value is None:
            return None
        found = known.get(_plain(value))
        if found is None:
            self.note(name, "has no counterpart here; left out")
            return None
        ours, but = found
        self.put(key, ours, f"{name} = {shown(value)}{f': {but}' if but else ''}")
        return _plain(value)

    def note(self, name: str, why: str) -> None:
        """Say what becomes of an option."""
        value = self.values.get(name)
        self.notes.append(f"{printable(name)}{'' if value is None else f' = {shown(value)}'}: {why}")

    def leave(self, reasons: Mapping[str, str]) -> None:
        """Options without a counterpart, each with why, or what to do instead; none is told that is off."""
        for name, why in reasons.items():
            if name in self.values and name not in self._seen:
                self._seen.add(name)
                if self.values[name] not in (None, "", False, 0, [], {}, "none", "None", "OFF", "NONE"):
                    self.note(name, why)

    def quiet(self, names: Iterable[str]) -> None:
        """Options that say nothing about what is learned."""
        self._seen.update(names)

    def rest(self) -> None:
        """Name everything that nothing was done with."""
        for name, value in self.values.items():
            if name in self._seen or value in (None, "", False, [], {}):
                continue
            if _SECRET.search(name.lower()):
                self.notes.append(f"{printable(name)}: a secret; left out, and not shown")
            else:
                self.note(name, "unknown here; left out")


def shown(value: Any) -> str:
    """A stranger's value in a message."""
    text = printable(str(value))
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _plain(text: str) -> str:
    return text.strip().lower().rpartition(".")[2].replace("_", "").replace("-", "")


def _converted(value: Any, kind: type) -> Any:
    """A value as its type, also where a form wrote numbers and switches as texts; None if it is not."""
    if kind is str:
        return value if isinstance(value, str) else str(value) if type(value) in (int, float) else None
    if kind is bool:
        if isinstance(value, str):
            return _TRUTH.get(value.strip().lower())
        return bool(value) if value in (0, 1) and isinstance(value, int) else None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number):
        return None
    if kind is float:
        return number
    return int(number) if number == int(number) else None
