"""Reading pictures of every kind as RGB, their sizes, and fitting them to a size: resize, crop and flip."""

from __future__ import annotations

import contextlib
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, TiffImagePlugin, UnidentifiedImageError

from .errors import ConfigError, DataError

Size = tuple[int, int]
"""A picture's (width, height) in pixels."""

SIZE_MULTIPLE = 8
"""The VAE turns 8 x 8 pixels into one latent, so both sides of every trained size are multiples of 8."""
MIN_SIDE = 16
"""Pixels: a VAE cannot normalize a single latent."""
MAX_SIDE = 16384
"""Pixels: more than any VAE or attention can take."""
PICTURE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
)
"""How the names of pictures in folders end; :func:`load_picture` goes by the content."""


_ORIENTATION_TAG = 0x0112
_WIDTH_TAG, _HEIGHT_TAG = 0x0100, 0x0101
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that turns a picture upright, by its orientation."""
_SWAPPING = (5, 6, 7, 8)

_ASPECT = 0.02
"""How far two aspect ratios may differ and still count as equal: a smaller picture's sides are rounded."""
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_HEAD = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"tEXt", b"zTXt", b"iTXt")
_LONGEST_CHUNK = 1 << 24
_SIZE = re.compile(r"(\d+)\s*[xX×]\s*(\d+)")

CANNY_THRESHOLDS = (100, 200)
_SOFTER = 6.4  # as 320 pixels of 2048: TTPlanet's card says 6 to 8
"""Lower and upper threshold of the published canny ControlNets (Tencent/HunyuanDiT)."""


class Header(NamedTuple):
    """What a picture file's header says: ``size`` is that which :func:`load_picture` would return."""

    size: Size
    transparent: bool


def load_picture(source: Path | bytes, alpha_color: str = "white", *, name: str | None = None) -> Image.Image:
    """Decode a picture file to 8-bit RGB as a viewer would show it.

    The orientation in EXIF or XMP is applied; transparent parts (by an alpha channel, or a transparent
    palette entry or color) are blended with ``alpha_color``; CMYK, grayscale, palette and 16-bit pictures
    are converted; of an animation the first frame is taken. Embedded color profiles are not applied.

    ``source`` is a path, or the encoded file itself, which errors then call ``name``.
    Raises :class:`DataError` naming the file if it is missing or cannot be decoded.
    """
    with _decoding(source, name), _file(source) as file, Image.open(file) as opened:
        return _to_rgb(_upright(opened), alpha_color)


def load_alpha(source: Path | bytes, *, name: str | None = None) -> Image.Image | None:
    """How opaque each pixel of a picture file is, as an upright 8-bit gray picture; None if all of it is.

    Raises :class:`DataError` as :func:`load_picture` does.
    """
    with _decoding(source, name), _file(source) as file, Image.open(file) as opened:
        picture = _upright(opened)
        return picture.convert("RGBA").getchannel("A") if _is_transparent(picture) else None


def load_control(source: Path | bytes, *, name: str | None = None) -> Image.Image:
    """A control picture as RGB: its lines are light, so transparent parts become the dark ground.

    Raises :class:`DataError` as :func:`load_picture` does.
    """
    return load_picture(source, "black", name=name)


def probe(source: Path | bytes, *, name: str | None = None) -> Header:
    """What a picture file's header says, without decoding the picture.

    Raises :class:`DataError` if it is missing or not a picture. A file cut off after its header passes:
    only decoding notices that.
    """
    with _decoding(source, name), _head(source) as head, Image.open(head) as opened:
        return Header(_upright_size(opened), _is_transparent(opened))


def probe_size(source: Path | bytes, *, name: str | None = None) -> Size:
    """(width, height) as :func:`load_picture` would return it; see :func:`probe`."""
    return probe(source, name=name).size


def parse_size(text: str) -> Size:
    """Read ``"WxH"`` (width first); raises ValueError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write width x height, for example '1024x768'")
    return int(match[1]), int(match[2])


def check_size(size: Size) -> Size:
    """Raise ValueError unless both sides are multiples of 8 from :data:`MIN_SIDE` to :data:`MAX_SIDE`."""
    if any(not MIN_SIDE <= side <= MAX_SIDE or side % SIZE_MULTIPLE for side in size):
        raise ValueError(
            f"size {size[0]}x{size[1]}: width and height must be multiples of {SIZE_MULTIPLE}, "
            f"from {MIN_SIDE} to {MAX_SIDE}"
        )
    return size


def same_shape(size: Size, other: Size) -> bool:
    """Whether two sizes have the same proportions, up to the rounding of sides."""
    return abs(size[0] * other[1] - size[1] * other[0]) <= _ASPECT * size[0] * other[1]


def check_shape(what: str, size: Size, picture: Size) -> None:
    """Raise :class:`DataError` unless ``what`` has the proportions of its picture, whatever its size."""
    if not same_shape(size, picture):
        raise DataError(
            f"{what} is {size[0]}x{size[1]}, its picture {picture[0]}x{picture[1]}: "
            "they must have the same shape"
        )


@contextlib.contextmanager
def _decoding(source: Path | bytes, name: str | None) -> Iterator[None]:
    """Turn whatever a damaged picture raises into a :class:`DataError`.

    Pillow's plugins do not agree on what that is: OSError, ValueError, SyntaxError, RuntimeError (AVIF),
    struct.error, zlib.error, KeyError and more.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        shown = name or (str(source) if isinstance(source, Path) else "picture")
        raise DataError(f"cannot read picture {shown}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):
        return "not a picture in a known format"
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    own = isinstance(error, (OSError, ValueError, SyntaxError, Image.DecompressionBombError))
    return text if own and text else f"{type(error).__name__} {text}".strip()


def _file(source: Path | bytes) -> BinaryIO:
    # Not opened by Pillow, which maps files that it opens by name and then swaps the sides of rotated TIFFs.
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")


@contextlib.contextmanager
def _head(source: Path | bytes) -> Iterator[BinaryIO]:
    """The file; a PNG without its pixels, as EXIF or XMP after them would make Pillow decode them."""
    with _file(source) as file:
        yield png_head(file) or file


def png_head(file: BinaryIO) -> BinaryIO | None:
    """A PNG without its pixels, for Pillow to open: chunks after them are found without decoding.

    None, with ``file`` at its start again, if it is not a PNG. Chunks of more than 16 MB are left out.
    """
    if file.read(len(_PNG_SIGNATURE)) != _PNG_SIGNATURE:
        file.seek(0)
        return None
    return io.BytesIO(_PNG_SIGNATURE + b"".join(_chunks_of_head(file)) + _chunk(b"IEND", b""))


def _chunks_of_head(file: BinaryIO) -> Iterator[bytes]:
    """The chunks of :data:`_PNG_HEAD` that follow in ``file``, up to its end or where it is cut off."""
    behind = False
    while len(start := file.read(8)) == 8:
        length, kind = int.from_bytes(start[:4], "big"), start[4:]
        if kind not in _PNG_HEAD or length > _LONGEST_CHUNK:
            behind |= kind == b"IDAT"
            file.seek(length + 4, io.SEEK_CUR)
            continue
        content, checksum = file.read(length), file.read(4)
        if len(checksum) < 4:
            return
        # Pillow does not check the checksums of chunks after the pixels when it decodes.
        yield _chunk(kind, content) if behind else start + content + checksum


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + kind + content + checksum


def _orientation(opened: Image.Image) -> int:
    """1 to 8, from EXIF or else XMP. A damaged EXIF block is ignored, as viewers do."""
    try:
        # Not the method of PNG pictures, which would decode them.
        found = Image.Image.getexif(opened).get(_ORIENTATION_TAG, 1)
        return int(found) if found in _TURNS else 1
    except Exception:
        return 1


def _upright_size(opened: Image.Image) -> Size:
    """The size of what :func:`_upright` will return, before anything is decoded."""
    size = opened.size
    if isinstance(opened, TiffImagePlugin.TiffImageFile):
        # Newer releases of Pillow have already swapped the sides if the tag says so, but not if XMP does.
        size = (opened.tag_v2[_WIDTH_TAG], opened.tag_v2[_HEIGHT_TAG])
    return (size[1], size[0]) if _orientation(opened) in _SWAPPING else size


def _upright(opened: Image.Image) -> Image.Image:
    """The decoded picture, turned upright."""
    opened.load()
    # Pillow turns TIFF pictures by itself when it decodes them.
    turned = isinstance(opened, TiffImagePlugin.TiffImageFile)
    method = None if turned else _TURNS.get(_orientation(opened))
    return opened.copy() if method is None else opened.transpose(method)


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
        """Scale ``original`` to just cover ``size`` and crop what is left over of the longer side.

        ``fraction`` in [0, 1) says which part to keep: 0 the left or top, 0.5 the center.
        """
        scale = max(size[0] / original[0], size[1] / original[1])
        width = max(size[0], round(original[0] * scale))
        height = max(size[1], round(original[1] * scale))
        left, top = (min(int(fraction * (slack + 1)), slack) for slack in (width - size[0], height - size[1]))
        return cls(original, (width, height), left, top, size, flip)

    @classmethod
    def cut(cls, original: Size, size: Size) -> Geometry:
        """As :meth:`cover`, but unscaled if only the rest above multiples of 8 has to be cut off."""
        slack = (original[0] - size[0], original[1] - size[1])
        if all(0 <= side < SIZE_MULTIPLE for side in slack):
            return cls(original, original, slack[0] // 2, slack[1] // 2, size)
        return cls.cover(original, size)

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


def to_image(values: torch.Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> RGB picture."""
    levels = (values * 255).round().to(torch.uint8)
    return Image.fromarray(np.asarray(levels.permute(1, 2, 0)))


def soft_size(size: Size) -> Size:
    """The size that :func:`softened` shrinks a picture to."""
    return max(1, round(size[0] / _SOFTER)), max(1, round(size[1] / _SOFTER))


def softened(picture: Image.Image) -> Image.Image:
    """A picture as soft as one that was enlarged 6.4 times: what tile ControlNets are made to sharpen.

    By torch, as ComfyUI's ImageScale does it: its areas are of whole pixels, Pillow's are not.
    """
    (width, height), (w, h) = picture.size, soft_size(picture.size)
    small = F.interpolate(to_tensor(picture)[None], (h, w), mode="area")
    (large,) = F.interpolate(small, (height, width), mode="bilinear")
    return to_image((large / 2 + 0.5).clamp(0, 1))


def canny(picture: Image.Image, thresholds: tuple[int, int] = CANNY_THRESHOLDS) -> Image.Image:
    """White edges on black (Canny 1986) of an RGB picture, by OpenCV on all three channels.

    Raises :class:`ConfigError` when OpenCV is not installed.
    """
    cv2 = opencv()
    return Image.fromarray(cv2.Canny(np.asarray(picture.convert("RGB")), *thresholds)).convert("RGB")


def opencv() -> Any:
    """OpenCV's module; raises :class:`ConfigError` if it is not installed."""
    try:
        import cv2
    except ImportError as error:
        raise ConfigError("canny control pictures need OpenCV: pip install opencv-python-headless") from error
    return cv2
