"""Pictures of every kind as RGB, and the resize, crop and flip that make them fit a training size."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from ..errors import DataError
from .config import Size

_ORIENTATION_TAG = 0x0112
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, MemoryError)
"""What Pillow raises for pictures that are truncated, damaged, too large or no pictures at all."""


def load_picture(source: Path | bytes, alpha_color: str = "white", *, name: str | None = None) -> Image.Image:
    """Decode a picture file to 8-bit RGB as a viewer would show it.

    The EXIF orientation is applied; transparency (an alpha channel, or a transparent palette entry
    or color) is laid on ``alpha_color``; CMYK, grayscale, palette and 16-bit pictures are converted;
    of an animation the first frame is taken. Embedded color profiles are not applied.

    ``source`` is a path or the encoded file itself, for which ``name`` appears in errors.
    Raises :class:`DataError` naming the file if it is missing or cannot be decoded.
    """
    shown = name or (str(source) if isinstance(source, Path) else "picture")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            picture = ImageOps.exif_transpose(opened)
            picture.load()
        return _to_rgb(picture, alpha_color)
    except _UNREADABLE as error:
        raise DataError(f"cannot read picture {shown}: {_reason(error)}") from error


def load_alpha(source: bytes, *, name: str) -> Image.Image | None:
    """How opaque each pixel of a picture file is, 8-bit gray as a viewer would show it; None: all of it.

    Raises :class:`DataError` as :func:`load_picture` does.
    """
    try:
        with Image.open(io.BytesIO(source)) as opened:
            picture = ImageOps.exif_transpose(opened)
            picture.load()
        return picture.convert("RGBA").getchannel("A") if _is_transparent(picture) else None
    except _UNREADABLE as error:
        raise DataError(f"cannot read picture {name}: {_reason(error)}") from error


def probe_size(source: Path | bytes, *, name: str | None = None) -> Size:
    """(width, height) as :func:`load_picture` would return it, from the file's header.

    Raises :class:`DataError` if it is missing or no picture. A file cut off after its header passes:
    only decoding finds that.
    """
    shown = name or (str(source) if isinstance(source, Path) else "picture")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            width, height = opened.size
            # Asking a PNG without an early EXIF chunk for its EXIF would decode all of it.
            has_exif = opened.format != "PNG" or "exif" in opened.info
            orientation = opened.getexif().get(_ORIENTATION_TAG, 1) if has_exif else 1
    except _UNREADABLE as error:
        raise DataError(f"cannot read picture {shown}: {_reason(error)}") from error
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):
        return "not a picture in a known format"
    return str(error) or type(error).__name__


def _is_transparent(picture: Image.Image) -> bool:
    return "A" in picture.getbands() or "a" in picture.getbands() or "transparency" in picture.info


def _to_rgb(picture: Image.Image, alpha_color: str) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit gray, which Pillow opens as "I;16..." or "I"
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit gray levels are outside 0..65535")
        picture = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("floating-point pictures have no defined white; save it with 8 or 16 bits")
    if _is_transparent(picture):
        rgba = picture.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (*ImageColor.getrgb(alpha_color)[:3], 255))
        picture = Image.alpha_composite(background, rgba)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


@dataclass(frozen=True)
class Geometry:
    """How a picture becomes a training picture: resize to ``resized``, crop ``size`` at
    (``left``, ``top``) of the resized picture, then flip. All in pixels, (width, height).

    A control picture that belongs to a picture goes through the same geometry.
    """

    original: Size
    resized: Size
    left: int
    top: int
    size: Size
    flip: bool = False

    @classmethod
    def cover(cls, original: Size, size: Size, *, fraction: float = 0.5, flip: bool = False) -> Geometry:
        """Scale ``original`` to just cover ``size`` and crop what sticks out of the longer side.

        ``fraction`` in [0, 1) says where: 0 the left or top, 0.5 the center.
        """
        scale = max(size[0] / original[0], size[1] / original[1])
        width = max(size[0], round(original[0] * scale))
        height = max(size[1], round(original[1] * scale))
        left, top = (min(int(fraction * (slack + 1)), slack) for slack in (width - size[0], height - size[1]))
        return cls(original, (width, height), left, top, size, flip)

    def apply(self, picture: Image.Image) -> Image.Image:
        """Transform ``picture``, whose own size may differ from ``original`` (a smaller control map)."""
        if picture.size != self.resized:
            picture = picture.resize(self.resized, Image.Resampling.LANCZOS)
        width, height = self.size
        picture = picture.crop((self.left, self.top, self.left + width, self.top + height))
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else picture


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """RGB picture -> (3, H, W) float32 in [-1, 1]."""
    values = torch.from_numpy(np.array(picture, dtype=np.uint8))
    return values.permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1.0).contiguous()
