"""The library's imports, read from its source: between files and between rooms."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

LIBRARY = Path(__file__).resolve().parents[1] / "hydit_core"


class Arrow(NamedTuple):
    """One imports another: files by dotted names from the library's folder (``model.dit``), or rooms."""

    user: str
    used: str


def files() -> dict[str, Path]:
    """Every file of the library by its dotted name."""
    return {
        ".".join(path.relative_to(LIBRARY).with_suffix("").parts): path
        for path in sorted(LIBRARY.rglob("*.py"))
    }


def arrows() -> set[Arrow]:
    """All imports of the library's own files, in functions and for types only as well.

    The public face, ``hydit_core/__init__.py``, counts as nobody: it names what lies anywhere.
    """
    known = files()
    found = set()
    for name, path in known.items():
        if name == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                found.update(Arrow(name, used) for used in _targets(name, node, known))
    return {arrow for arrow in found if arrow.user != arrow.used}


def _targets(user: str, node: ast.ImportFrom, known: Iterable[str]) -> Iterator[str]:
    base = user.split(".")[: -node.level] + (node.module.split(".") if node.module else [])
    for alias in node.names:
        candidates = (".".join([*base, alias.name]), ".".join(base), ".".join([*base, "__init__"]))
        target = next((name for name in candidates if name in known), None)
        assert target is not None, f"{user}: {ast.unparse(node)}"
        yield target


def room(name: str) -> str:
    """The folder of a file, or the file itself where it lies at the top."""
    return name.partition(".")[0]


def between_rooms() -> set[Arrow]:
    pairs = {Arrow(room(user), room(used)) for user, used in arrows()}
    return {pair for pair in pairs if pair.user != pair.used}


def circle(pairs: Iterable[Arrow]) -> list[str]:
    """One way round, if there is any: each imports the next, and the last the first."""
    after: dict[str, list[str]] = {}
    for user, used in sorted(pairs):
        after.setdefault(user, []).append(used)
    done: set[str] = set()

    def follow(name: str, way: list[str]) -> list[str]:
        if name in way:
            return way[way.index(name) :]
        if name in done:
            return []
        for used in after.get(name, []):
            if found := follow(used, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in after if (found := follow(name, []))), [])


def floors() -> dict[str, int]:
    """The floor of each room, from 1: above everything that it imports."""
    pairs = between_rooms()

    @cache
    def floor(name: str) -> int:
        return 1 + max((floor(used) for user, used in pairs if user == name), default=0)

    return {name: floor(name) for name in sorted({room(file) for file in files()} - {"__init__"})}
