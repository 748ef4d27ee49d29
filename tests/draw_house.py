"""Draw the library's rooms and their imports into docs/images/house.svg.

    python tests/draw_house.py

A room is a folder of hydit_core or a file at its top; it is one floor above the highest room that it imports.
An arrow that follows from others (a imports b, b imports c, a imports c) is left out; one that skips a floor
is dashed.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable
from html import escape
from pathlib import Path

import imports

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "house.svg"
_WIDTH, _HEIGHT, _ROW = 150, 46, 116
_GAP, _MARGIN = 14, 24
_COLORS = {
    "arrow": "#8a97a8", "box": "#f3f6fa", "line": "#5b6b80", "text": "#17212e", "small": "#55606e",
    "ground": "#ffffff",
}  # fmt: skip


def needed(pairs: Iterable[imports.Arrow]) -> set[imports.Arrow]:
    """Those of ``pairs`` that do not follow from the others."""
    pairs = set(pairs)
    after: dict[str, set[str]] = {}
    for user, used in pairs:
        after.setdefault(user, set()).add(used)

    def reach(name: str) -> set[str]:
        direct = after.get(name, set())
        return direct.union(*(reach(used) for used in direct))

    below = {name: reach(name) for name in after}
    return {
        pair
        for pair in pairs
        if not any(pair.used in below.get(other, ()) for other in after[pair.user] - {pair.used})
    }


def places(floors: dict[str, int], pairs: set[imports.Arrow]) -> dict[str, tuple[float, float]]:
    """The middle of each room; on a floor they stand above the middle of what they import."""
    rows: dict[int, list[str]] = {}
    for name, floor in sorted(floors.items()):
        rows.setdefault(floor, []).append(name)
    widest = max(map(len, rows.values()))
    total = widest * (_WIDTH + _GAP)
    place: dict[str, tuple[float, float]] = {}
    for floor in sorted(rows):
        y = _MARGIN + (max(rows) - floor) * _ROW + _HEIGHT / 2

        def wish(name: str) -> float:
            used = [place[pair.used][0] for pair in pairs if pair.user == name]
            return sum(used) / len(used) if used else total / 2

        names = sorted(rows[floor], key=lambda name: (wish(name), name))
        step = total / len(names)
        for number, name in enumerate(names):
            place[name] = _MARGIN + step * (number + 0.5), y
    return place


def svg() -> str:
    floors, pairs = imports.floors(), needed(imports.between_rooms())
    place = places(floors, pairs)
    files = Counter(map(imports.room, imports.files()))
    width = round(max(x for x, _ in place.values()) + _WIDTH / 2 + _MARGIN)
    height = round(max(y for _, y in place.values()) + _HEIGHT / 2 + _MARGIN)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif">',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{_COLORS["arrow"]}"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="{_COLORS["ground"]}"/>',
    ]
    for user, used in sorted(pairs):
        (x1, y1), (x2, y2) = place[user], place[used]
        y1, y2 = y1 + _HEIGHT / 2, y2 - _HEIGHT / 2
        bend = (y2 - y1) / 2
        long = ' stroke-dasharray="5 4" stroke-opacity="0.7"' if floors[user] - floors[used] > 1 else ""
        parts.append(
            f'<path d="M{x1:.0f} {y1:.0f}C{x1:.0f} {y1 + bend:.0f} '
            f'{x2:.0f} {y2 - bend:.0f} {x2:.0f} {y2:.0f}" '
            f'fill="none" stroke="{_COLORS["arrow"]}" stroke-width="1.2"{long} marker-end="url(#head)"/>'
        )
    for name, (x, y) in sorted(place.items()):
        folder = (imports.LIBRARY / name).is_dir()
        label, about = (f"{name}/", f"{files[name]} files") if folder else (f"{name}.py", "")
        parts.append(
            f'<rect x="{x - _WIDTH / 2:.0f}" y="{y - _HEIGHT / 2:.0f}" width="{_WIDTH}" height="{_HEIGHT}" '
            f'rx="5" fill="{_COLORS["box"]}" stroke="{_COLORS["line"]}" '
            f'stroke-width="{1.8 if folder else 1}"><title>{escape(_about(name))}</title></rect>'
            f'<text x="{x:.0f}" y="{y + (-3 if about else 5):.0f}" font-size="15" text-anchor="middle" '
            f'fill="{_COLORS["text"]}">{escape(label)}</text>'
            f'<text x="{x:.0f}" y="{y + 14:.0f}" font-size="11" text-anchor="middle" '
            f'fill="{_COLORS["small"]}">{about}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def _about(name: str) -> str:
    """The first line of a room's docstring."""
    path = imports.LIBRARY / name
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or name).partition("\n")[0]


if __name__ == "__main__":
    PICTURE.write_text(svg(), "utf-8")
    print(PICTURE)
