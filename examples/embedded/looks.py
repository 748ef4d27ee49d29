"""What pictures show, by comparison: the nearest thing, its color, how many parts there are and where.

A thing is compared by its miniature: cropped to what is not white and scaled to 16 x 16 pixels, so that place
and size do not count. ``signatures.npz`` holds the miniatures of all things, so that no icons are needed.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from icons import TINTS
from PIL import Image, ImageChops, ImageDraw, ImageFont
from things import Thing

GRID = 16
SIGNATURES = Path(__file__).resolve().parent / "signatures.npz"
ALIKE = 0.05
"""Things whose miniatures differ by less, in 0..1, are one picture under several names."""


def crop_to_content(picture: Image.Image) -> Image.Image:
    """What is not white, centered on a square white canvas of ``GRID`` pixels."""
    difference = ImageChops.difference(picture, Image.new("RGB", picture.size, "white")).convert("L")
    box = difference.point(lambda v: 255 if v > 40 else 0).getbbox() or (0, 0, *picture.size)
    content = picture.crop(box)
    side = max(content.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(content, ((side - content.width) // 2, (side - content.height) // 2))
    return square.resize((GRID, GRID), Image.Resampling.BOX)


def signature(picture: Image.Image) -> np.ndarray:
    """(GRID, GRID, 3) in 0..1."""
    return np.asarray(crop_to_content(picture.convert("RGB")), np.float32) / 255


class References:
    """The look of every thing and its mirror image: (things, 2, GRID, GRID, 3) in 0..1.

    ``whole``: ids of the things that are one connected part; ``extents``: by id, the larger side of what is
    not white, as a share of the picture, where the thing is shown as ``scenes.standard`` does; ``tinted``:
    those whose color can be seen in a picture's hue.
    """

    def __init__(self, things: Iterable[Thing], path: Path = SIGNATURES) -> None:
        self.things = tuple(things)
        ids = [thing.id for thing in self.things]
        with np.load(path) as stored:
            if stored["ids"].tolist() != ids:
                raise SystemExit(f"{path}: made for other things; run judge.py --write-signatures")
            plain = stored["signatures"].astype(np.float32) / 255
            self.whole = {name for name, whole in zip(ids, stored["whole"], strict=True) if whole}
            self.extents = dict(zip(ids, (stored["extents"] / 255).tolist(), strict=True))
        self.signatures = np.stack([plain, plain[:, :, ::-1]], 1)
        # Most of a tinted thing may stay white or gray: no hue can be asked of a picture of it.
        self.tinted = {
            thing.id
            for thing, look in zip(self.things, plain, strict=True)
            if thing.color and hue_is(Image.fromarray((look * 255).astype(np.uint8)), thing.color)
        }

    def name(self, picture: Image.Image) -> str:
        """The id of the nearest thing."""
        distances = ((self.signatures - signature(picture)) ** 2).mean((2, 3, 4)).min(1)
        return self.things[int(distances.argmin())].id

    def is_nearest(self, picture: Image.Image, thing: Thing) -> bool:
        """Whether nothing is closer to the picture, except things that look like this one."""
        return bool(foreground(picture).any()) and self.name(picture) in self._alike(thing)

    def _alike(self, thing: Thing) -> set[str]:
        own = self.signatures[self.things.index(thing), 0]
        distances = np.sqrt(((self.signatures - own) ** 2).mean((2, 3, 4))).min(1)
        return {self.things[int(i)].id for i in np.flatnonzero(distances < ALIKE)}


def write_references(
    things: Iterable[Thing], pictures: Iterable[Image.Image], path: Path = SIGNATURES
) -> None:
    """Store what the things look like; each picture shows one, as ``scenes.standard`` does."""
    ids, found, whole, extents = [], [], [], []
    for thing, picture in zip(things, pictures, strict=True):
        ids.append(thing.id)
        levels = np.asarray(crop_to_content(picture), np.float32) / 4
        found.append(np.minimum(4 * levels.round(), 255).astype(np.uint8))  # 64 levels: a smaller file
        whole.append(len(components(picture)) == 1)
        extents.append(round(255 * extent(picture)))
    np.savez_compressed(
        path, ids=ids, signatures=np.stack(found), whole=whole, extents=np.asarray(extents, np.uint8)
    )


# -- measures ----------------------------------------------------------------------------


def foreground(picture: Image.Image) -> np.ndarray:
    """(height, width): what is not white."""
    return (255 - np.asarray(picture.convert("RGB"), np.int16)).max(2) > 24


def extent(picture: Image.Image) -> float:
    """The larger side of what is not white, as a share of the picture's smaller one."""
    rows, columns = np.nonzero(foreground(picture))
    if len(rows) == 0:
        return 0.0
    return float(max(np.ptp(rows) + 1, np.ptp(columns) + 1) / min(picture.size))


def middle(picture: Image.Image) -> tuple[float, float]:
    """The middle of what is not white, from the left and from the top, as shares of the picture."""
    rows, columns = np.nonzero(foreground(picture))
    if len(rows) == 0:
        return 0.5, 0.5
    return (columns.min() + columns.max()) / 2 / picture.width, (rows.min() + rows.max()) / 2 / picture.height


def components(picture: Image.Image) -> list[tuple[int, int, int, int]]:
    """Boxes (left, top, right, bottom) of the connected parts, without specks."""
    gap = max(1, round(5 / 256 * min(picture.size)))
    mask = cv2.dilate(foreground(picture).astype(np.uint8), np.ones((gap, gap), np.uint8))
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask)
    parts = [tuple(int(v) for v in part) for part in stats[1:]]
    largest = max((area for *_, area in parts), default=0)
    return [(x, y, x + width, y + height) for x, y, width, height, area in parts if area > 0.15 * largest]


def hue_is(picture: Image.Image, color: str) -> bool:
    """Whether the saturated pixels have a color's hue, within 30 degrees on the median."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)[foreground(picture)] / 255
    if len(pixels) == 0:
        return False
    value, chroma = pixels.max(1), pixels.max(1) - pixels.min(1)
    if color == "black":
        return float(np.median(value)) < 0.4
    saturated = pixels[chroma > 0.2]
    if len(saturated) < 0.2 * len(pixels):
        return False
    wanted = np.exp(2j * np.pi * TINTS[color][0] / 360)
    hues = np.array([colorsys.rgb_to_hsv(*p)[0] for p in saturated[:: max(1, len(saturated) // 500)]])
    return float(np.median(np.abs(np.angle(np.exp(2j * np.pi * hues) / wanted, deg=True)))) < 30


# -- sheets ------------------------------------------------------------------------------


def sheet(pictures: list[Image.Image], titles: list[str], columns: int, path: Path) -> None:
    """A contact sheet; a title line under each picture unless all titles are empty."""
    cell, line = pictures[0].width, 18 if any(titles) else 0
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * (cell + 4), rows * (cell + line + 4)), "white")
    draw = ImageDraw.Draw(canvas)
    font = cjk_font(13)
    for i, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        x, y = (i % columns) * (cell + 4), (i // columns) * (cell + line + 4)
        canvas.paste(picture, (x, y))
        while draw.textlength(title, font) > cell and len(title) > 4:
            title = title.removesuffix("…")[:-1] + "…"
        draw.text((x + 2, y + cell + 1), title, fill="black", font=font)
    canvas.save(path)


def cjk_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in ("wqy-microhei.ttc", "NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "DejaVuSans.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
