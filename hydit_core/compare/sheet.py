"""The contact sheet: of each side the worst and the median pair, with the difference between them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..new_files import write_new
from .figures import Pair, Result, by_closeness
from .store import pixels_of

GAIN = 8
"""How much brighter differences are shown than they are."""
_CELL = 256
_LINE = 18


def as_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in 0..1 -> a picture in 8 bit."""
    levels = (pixels.clamp(0, 1) * 255).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def difference(reference: Tensor, picture: Tensor) -> Image.Image:
    """The absolute difference, :data:`GAIN` times as bright."""
    return as_image((reference - picture).abs() * GAIN)


def write_sheet(path: Path, results: Sequence[Result]) -> None:
    """A row for each side: reference, side and difference, of the worst and of the median pair."""
    rows = [(result, _chosen(result.pairs)) for result in results if result.pairs]
    font = ImageFont.load_default(13)
    canvas = Image.new("RGB", (6 * (_CELL + 4), len(rows) * (_CELL + 2 * _LINE)), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (result, pairs) in enumerate(rows):
        top = row * (_CELL + 2 * _LINE)
        for column, (what, pair) in enumerate(pairs):
            left = column * 3 * (_CELL + 4)
            text = f"{result.name}: {what} of {len(result.pairs)}, {pair.figures['psnr']:.1f} dB"
            draw.text((left + 2, top), text, fill="black", font=font)
            x, y = pixels_of(pair.reference), pixels_of(pair.picture)
            cells = {
                "reference": as_image(x),
                result.name: as_image(y),
                f"difference x {GAIN}": difference(x, y),
            }
            for i, (title, image) in enumerate(cells.items()):
                fitted = _fitted(image)
                canvas.paste(fitted, (left + i * (_CELL + 4), top + _LINE))
                draw.text((left + i * (_CELL + 4) + 2, top + _LINE + _CELL), title, fill="gray", font=font)
    file = io.BytesIO()
    canvas.save(file, format="PNG", optimize=True)
    write_new(path, file.getvalue(), overwrite=True)


def _chosen(pairs: Sequence[Pair]) -> list[tuple[str, Pair]]:
    ordered = by_closeness(pairs)
    return [("worst", ordered[0]), ("median", ordered[len(ordered) // 2])]


def _fitted(image: Image.Image) -> Image.Image:
    scale = _CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
