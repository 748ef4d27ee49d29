"""The page: a table of figures, and pairs with a slider. It is one file, and asks no network for anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..pages.render import data_url, render
from .figures import Pair, Result
from .sheet import GAIN, as_image, difference
from .store import pixels_of, write_text

HERE = Path(__file__).parent
STYLES = ("page.css",)


def write_pages(path: Path, results: Sequence[Result], found: dict[str, Any], pages_of: int) -> list[Path]:
    """Write ``path`` and, where one page does not hold all, ``page-2.html`` and so on beside it.

    Pictures are in the order of their worst pair, so that the first page shows what is worth a look.
    """
    compared = [result for result in results if result.pairs]
    order = _order(compared)
    count = max(1, -(-len(order) // pages_of))
    paths = [path if number == 0 else path.with_name(f"page-{number + 1}.html") for number in range(count)]
    for number, one in enumerate(paths):
        cards = [_card(name, compared) for name in order[number * pages_of : (number + 1) * pages_of]]
        text = render(
            HERE,
            "page.html",
            styles=STYLES,
            scripts=("page.js",),
            found=found,
            cards=cards,
            compared=[result.name for result in compared],
            has_text=any(result.read for result in results),
            gain=GAIN,
            number=number + 1,
            total=len(order),
            pages=[other.name for other in paths],
        )
        write_text(one, text)
    return paths


def _order(compared: Sequence[Result]) -> list[str]:
    largest: dict[str, float] = {}
    for result in compared:
        for pair in result.pairs:
            largest[pair.name] = max(pair.mse, largest.get(pair.name, 0))
    return sorted(largest, key=lambda name: (-largest[name], name))


def _card(name: str, compared: Sequence[Result]) -> dict[str, Any]:
    pairs: list[tuple[str, Pair]] = [
        (result.name, pair) for result in compared for pair in result.pairs if pair.name == name
    ]
    first = pairs[0][1]
    reference = pixels_of(first.reference)
    shown = []
    for side, pair in pairs:
        pixels = pixels_of(pair.picture)
        shown.append(
            {
                "side": side,
                "figures": pair.figures,
                "picture": data_url(as_image(pixels)),
                "difference": data_url(difference(reference, pixels)),
            }
        )
    return {
        "prompt": first.prompt,
        "seed": first.seed,
        "width": first.size[0],
        "height": first.size[1],
        "reference": data_url(as_image(reference)),
        "sides": shown,
    }
