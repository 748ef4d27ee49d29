"""The pictures of a dataset on one sheet."""

from __future__ import annotations

from PIL import Image

from ..errors import DataError
from ..images import load_picture
from .manifest import Manifest

_SIDE = 128
_MARGIN = 4
_MOST = 64
_PLAIN, _MISSING = "white", (214, 60, 40)


def thumbnails(manifest: Manifest, most: int = _MOST) -> Image.Image:
    """A sheet of a dataset's pictures, spread over all of them where there are more than ``most``.

    Those with an empty caption have a red frame.
    """
    count = len(manifest)
    rows = [round(i * (count - 1) / max(1, most - 1)) for i in range(most)] if count > most else range(count)
    columns = max(1, round(len(rows) ** 0.5 + 0.49))
    cell = _SIDE + 2 * _MARGIN
    sheet = Image.new("RGB", (columns * cell, -(-len(rows) // columns) * cell), _PLAIN)
    for place, row in enumerate(rows):
        left, top = place % columns * cell, place // columns * cell
        if not manifest.caption(row, 0):
            sheet.paste(_MISSING, (left, top, left + cell, top + cell))
        picture = _small(manifest, row)
        if picture is not None:
            corner = (left + (cell - picture.width) // 2, top + (cell - picture.height) // 2)
            sheet.paste(picture, corner)
    return sheet


def _small(manifest: Manifest, row: int) -> Image.Image | None:
    """A picture, shrunk; None if it cannot be read after all."""
    try:
        file = manifest.picture(row)
        picture = load_picture(file.read(), name=str(file))
    except DataError:
        return None
    picture.thumbnail((_SIDE, _SIDE))
    return picture
