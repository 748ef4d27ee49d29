"""A page from a template, styles and scripts, and pictures inside it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from PIL import Image

_HERE = Path(__file__).parent
_LARGEST = 1024
_LOSSLESS = 256 * 256


def render(
    folder: Path,
    template: str,
    *,
    styles: Sequence[str],
    scripts: Sequence[str],
    live: bool = False,
    **shown: Any,
) -> str:
    """A page of a template of ``folder``; everything that goes into it is escaped.

    ``styles`` and ``scripts`` are files there. A ``live`` page may ask the server that it comes from; others
    ask nobody, which a content security policy holds them to.
    """
    loader = FileSystemLoader([folder, _HERE])
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["as_json"] = _as_json
    sheets = [_HERE / "base.css", *(folder / name for name in styles)]
    style = "\n".join(sheet.read_text("utf-8") for sheet in sheets)
    code = "\n".join((folder / name).read_text("utf-8") for name in scripts)
    asked = "; connect-src 'self'" if live else ""
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(code)}{asked}"
    made = environment.get_template(template)
    return made.render(style=Markup(style), script=Markup(code), policy=policy, live=live, **shown)


def _hash(text: str) -> str:
    """As a content security policy names an element's text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _as_json(value: Any) -> Markup:
    """For a script element of JSON, which no text in it can end."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def data_url(image: Image.Image, largest: int = _LARGEST) -> str:
    """A picture as WebP, exact where it is small, and no larger than a screen needs."""
    if max(image.size) > largest:
        image = image.copy()
        image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if image.width * image.height <= _LOSSLESS:
        image.save(file, format="WEBP", lossless=True)
    else:
        image.save(file, format="WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
