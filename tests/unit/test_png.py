"""Parameters in PNG files: what we write, what others leave of it, and what strangers put there."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hydit_core.errors import DataError
from hydit_core.pictures.png import png_info, read_parameters

FACTS = {"prompt": "红苹果", "width": 8, "height": 8, "steps": 3, "seed": 2**64 - 1}


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def png(*chunks: bytes, side: int = 8, behind: bool = False) -> bytes:
    """A picture of ``side`` x ``side`` pixels that are none, with more chunks before or behind them."""
    header = chunk(b"IHDR", side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0]))
    pixels = chunk(b"IDAT", b"no pixels")
    order = [pixels, *chunks] if behind else [*chunks, pixels]
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(order) + chunk(b"IEND", b"")


def text(content: bytes) -> bytes:
    return chunk(b"tEXt", b"hydit\0" + content)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=png_info(FACTS))
    assert read_parameters(tmp_path / "a.png") == {"format": 1, **FACTS}


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt"])
def test_pixels_are_not_decoded(tmp_path: Path, behind: bool, kind: str) -> None:
    content = json.dumps(FACTS).encode()
    made = {
        "tEXt": text(content),
        "zTXt": chunk(b"zTXt", b"hydit\0\0" + zlib.compress(content)),
        "iTXt": chunk(b"iTXt", b"hydit\0\1\0\0\0" + zlib.compress(content)),
    }[kind]
    (tmp_path / "a.png").write_bytes(png(made, behind=behind))
    assert read_parameters(tmp_path / "a.png") == FACTS


BOMB = zlib.compress(bytes(100 << 20))
HOSTILE = {
    "no JSON": (png(text(b"not json")), "chunk 'hydit' is not valid JSON"),
    "no object": (png(text(b"[1]")), "chunk 'hydit' holds a list; expected an object"),
    "deep": (png(text(b"[" * 10**5)), "nested 100,000 deep"),
    "digits": (png(text(b'{"a": %s}' % (b"9" * 5000))), "the number 999.*"),
    "pixels": (png(text(b"{}"), side=2**20), r"not a readable picture \(.*exceeds limit"),
    "compressed": (png(chunk(b"zTXt", b"hydit\0\0" + BOMB)), "not a readable picture|no `hydit` chunk"),
    "compressed, behind": (
        png(chunk(b"iTXt", b"hydit\0\1\0\0\0" + BOMB), behind=True),
        "not a readable picture|no `hydit` chunk",
    ),
    "cut": (png(text(b"{}"))[:30], "not a readable picture"),
    "nothing": (b"", r"not a readable picture \(no known format\)"),
    "text": (b"nothing of a picture", r"not a readable picture \(no known format\)"),
    "no chunk": (png(), "carries no `hydit` chunk"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_strangers_put_there_is_one_line(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_parameters(tmp_path / "a.png")
    assert str(tmp_path / "a.png") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "GIF", "TIFF"])
def test_other_formats_carry_none(tmp_path: Path, form: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, form)
    (tmp_path / "a.png").write_bytes(file.getvalue())
    with pytest.raises(DataError, match="carries no `hydit` chunk"):
        read_parameters(tmp_path / "a.png")


def test_a_picture_of_others(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("parameters", "a cat")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(DataError, match="carries no `hydit` chunk"):
        read_parameters(tmp_path / "a.png")
    with pytest.raises(DataError, match="No such file"):
        read_parameters(tmp_path / "none.png")
