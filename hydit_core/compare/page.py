"""The page: a table of figures, and pairs with a slider. It is one file, and asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from PIL import Image

from .figures import Pair, Result
from .sheet import GAIN, as_image, difference
from .store import pixels_of, write_text

_HERE = Path(__file__).parent
_LARGEST = 1024
_LOSSLESS = 256 * 256


def render(template: str, script: str, **shown: Any) -> str:
    """A page of this folder's template with its script; everything that goes into it is escaped."""
    loader = FileSystemLoader(_HERE)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    style, style_hash = _own("page.css")
    code, code_hash = _own(script)
    policy = f"default-src 'none'; img-src data:; style-src '{style_hash}'; script-src '{code_hash}'"
    return environment.get_template(template).render(style=style, script=code, policy=policy, **shown)


def _own(name: str) -> tuple[Markup, str]:
    """A style or script of this folder, and its hash as a content security policy names it."""
    text = (_HERE / name).read_text("utf-8")
    return Markup(text), "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def data_url(image: Image.Image) -> str:
    """A picture as WebP, exact where it is small, and no larger than a screen needs."""
    if max(image.size) > _LARGEST:
        image = image.copy()
        image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if image.width * image.height <= _LOSSLESS:
        image.save(file, format="WEBP", lossless=True)
    else:
        image.save(file, format="WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


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
            "page.html",
            "page.js",
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
