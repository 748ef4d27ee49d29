"""Pictures of every kind come out as a viewer shows them, at the size that is trained."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features
from PIL.PngImagePlugin import PngImageFile, PngInfo

from hydit_core.errors import DataError
from hydit_core.images import Geometry, load_alpha, load_picture, probe, probe_size, to_tensor

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def halves(mode: str = "RGB") -> Image.Image:
    """Left red, right blue; 8 x 4 pixels."""
    picture = Image.new("RGB", (8, 4), RED)
    picture.paste(BLUE, (4, 0, 8, 4))
    return picture.convert(mode)


def pixel(picture: Image.Image, x: int, y: int) -> tuple[int, int, int]:
    assert picture.mode == "RGB"
    return picture.getpixel((x, y))


# How the pixels of a picture shown as `upright` lie in a file of each orientation, as EXIF defines it.
STORED = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


def xmp(orientation: int) -> bytes:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
        f'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/></rdf:RDF></x:xmpmeta>'
    ).encode()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def behind_the_pixels(png: bytes, kind: bytes, content: bytes) -> bytes:
    """The PNG with one more chunk, last before its end, where many cameras and editors put EXIF."""
    return png[:-12] + png_chunk(kind, content) + png[-12:]


def encoded(picture: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **({"quality": 100} | options if form in ("JPEG", "WEBP", "AVIF") else options))
    return file.getvalue()


def exif_block(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def with_orientation(picture: Image.Image, place: str, orientation: int) -> bytes:
    """A file that says of itself in ``place`` that it is turned."""
    form, _, where = place.partition(" ")
    exif = exif_block(orientation)
    if place == "PNG late-exif":
        return behind_the_pixels(encoded(picture, form), b"eXIf", exif.removeprefix(b"Exif\0\0"))
    if place == "PNG late-xmp":
        text = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(orientation)
        return behind_the_pixels(encoded(picture, form), b"iTXt", text)
    if place == "PNG raw-profile":
        info = PngInfo()
        lines = f"\nexif\n{len(exif):8}\n{exif.hex()}\n"
        info.add_text("Raw profile type exif", lines, zip=True)
        return encoded(picture, form, pnginfo=info)
    if place == "PNG xmp":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp(orientation).decode())
        return encoded(picture, form, pnginfo=info)
    if form == "TIFF":
        tags = {274: orientation} if where == "tag" else {700: xmp(orientation)}
        return encoded(picture, form, tiffinfo=tags)
    return encoded(picture, form, **({"exif": exif} if where == "exif" else {"xmp": xmp(orientation)}))


PLACES = (
    "JPEG exif", "JPEG xmp", "PNG exif", "PNG late-exif", "PNG xmp", "PNG late-xmp", "PNG raw-profile",
    "WEBP exif", "WEBP xmp", "TIFF tag", "TIFF xmp", "AVIF exif",
)  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("place", PLACES)
def test_a_turned_picture_is_upright(place: str, orientation: int) -> None:
    form = place.split()[0]
    if form in ("AVIF", "WEBP") and not features.check(form.lower()):
        pytest.skip(f"this Pillow has no {form}")
    upright = np.zeros((32, 64, 3), dtype=np.uint8)
    upright[:, 32:, 0], upright[16:, :, 2] = 255, 255
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    content = with_orientation(stored, place, orientation)
    assert probe_size(content) == (64, 32)
    shown = np.asarray(load_picture(content)).astype(int)
    assert shown.shape == upright.shape
    assert np.abs(shown - upright)[4::8, 4::8].max() < 40
    transparent = load_alpha(content, name="a")
    assert transparent is None


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_turned_tiff_pictures_of_every_mode(tmp_path: Path, mode: str) -> None:
    """Also those that Pillow would map into memory."""
    upright = np.full((16, 32), 255, dtype=np.uint8)
    upright[:8, :8] = 0
    stored = np.ascontiguousarray(STORED[6](upright))
    if mode == "I;16":
        picture = Image.fromarray(stored.astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(stored).convert(mode)
    picture.save(tmp_path / "a.tif", tiffinfo={274: 6})
    assert probe_size(tmp_path / "a.tif") == (32, 16)
    shown = np.asarray(load_picture(tmp_path / "a.tif"))[:, :, 0]
    assert np.array_equal(shown, upright)


def test_transparency_turns_with_its_picture(tmp_path: Path) -> None:
    picture = halves("RGBA")
    picture.paste((0, 0, 0, 0), (0, 0, 4, 4))
    picture.save(tmp_path / "a.tif", tiffinfo={274: 6})
    alpha = load_alpha((tmp_path / "a.tif").read_bytes(), name="a")
    assert alpha is not None and alpha.size == (4, 8) and alpha.getpixel((0, 0)) == 0
    assert probe(tmp_path / "a.tif") == ((4, 8), True)


def test_orientations_that_mean_nothing_are_passed_over() -> None:
    for orientation in (0, 9, 65535):
        assert load_picture(encoded(halves(), "PNG", exif=exif_block(orientation))).size == (8, 4)
    damaged = b"Exif\0\0MM\0*" + b"\xff" * 20
    content = encoded(halves(), "JPEG", exif=damaged)
    assert load_picture(content).size == probe_size(content) == (8, 4)


def test_behind_the_pixels_a_wrong_checksum_does_not_matter() -> None:
    content = with_orientation(halves(), "PNG late-exif", 6)
    wrong = content[:-16] + bytes(4) + content[-12:]
    assert wrong != content and load_picture(wrong).size == probe_size(wrong) == (4, 8)


def test_a_header_is_read_without_the_pixels(tmp_path: Path) -> None:
    """A PNG of 3,000 x 3,000 pixels that are not there, with its texts behind them."""
    size = (3000).to_bytes(4, "big") * 2
    content = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", size + bytes([8, 6, 0, 0, 0]))
    content += png_chunk(b"IDAT", b"nothing") * 1000 + png_chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(content)
    assert probe(tmp_path / "a.png") == ((3000, 3000), True)
    assert probe_size(content[:100]) == (3000, 3000)


@pytest.mark.parametrize("color", ["white", "#00ff00"])
def test_alpha_lies_on_the_chosen_color(tmp_path: Path, color: str) -> None:
    picture = halves("RGBA")
    alpha = Image.new("L", (8, 4), 0)
    alpha.paste(255, (4, 0, 8, 4))
    picture.putalpha(alpha)
    picture.save(tmp_path / "a.png")
    loaded = load_picture(tmp_path / "a.png", color)
    assert pixel(loaded, 0, 0) == (WHITE if color == "white" else (0, 255, 0))
    assert pixel(loaded, 7, 0) == BLUE


def test_half_transparent_gray_is_blended(tmp_path: Path) -> None:
    Image.new("LA", (2, 2), (0, 51)).save(tmp_path / "a.png")
    assert pixel(load_picture(tmp_path / "a.png"), 0, 0) == (204, 204, 204)


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette_with_a_transparent_entry(tmp_path: Path, suffix: str) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / f"a.{suffix}", transparency=0)
    loaded = load_picture(tmp_path / f"a.{suffix}")
    assert (pixel(loaded, 0, 0), pixel(loaded, 1, 0)) == (WHITE, BLUE)


def test_rgb_with_a_transparent_color(tmp_path: Path) -> None:
    halves().save(tmp_path / "a.png", transparency=RED)
    loaded = load_picture(tmp_path / "a.png")
    assert (pixel(loaded, 0, 0), pixel(loaded, 7, 0)) == (WHITE, BLUE)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    halves("CMYK").resize((16, 16), Image.Resampling.NEAREST).save(tmp_path / "a.jpg", quality=100)
    loaded = load_picture(tmp_path / "a.jpg")
    assert np.abs(np.subtract(pixel(loaded, 1, 1), RED)).max() < 12


def test_sixteen_bit_gray_keeps_its_range(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "a.tif")
    for name in ("a.png", "a.tif"):
        loaded = load_picture(tmp_path / name)
        assert [pixel(loaded, x, 0) for x in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]


@pytest.mark.parametrize("mode", ["1", "L"])
def test_gray_and_bilevel(tmp_path: Path, mode: str) -> None:
    Image.new("L", (3, 2), 255).convert(mode).save(tmp_path / "a.png")
    assert pixel(load_picture(tmp_path / "a.png"), 2, 1) == WHITE


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"text\.png: not a picture"):
        load_picture(tmp_path / "text.png")
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        tmp_path / "cut.png"
    )
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"cut\.png"):
        load_picture(tmp_path / "cut.png")
    with pytest.raises(DataError, match=r"gone\.png: no such file"):
        load_picture(tmp_path / "gone.png")
    Image.fromarray(np.ones((2, 2), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"float\.tif: floating-point"):
        load_picture(tmp_path / "float.tif")


@pytest.mark.parametrize(
    "raised",
    [RuntimeError("decoder"), struct.error("unpack"), zlib.error("-3"), MemoryError(), KeyError(7),
     SyntaxError("no"), RecursionError(), ZeroDivisionError(), Image.DecompressionBombError("too large")],
)  # fmt: skip
@pytest.mark.parametrize("when", ["open", "load"])
def test_whatever_a_plugin_raises_is_told_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, when: str
) -> None:
    path = tmp_path / "a.png"
    halves().save(path)

    def broken(*_: object) -> None:
        raise raised

    monkeypatch.setattr(Image if when == "open" else PngImageFile, when, broken)
    for read in (load_picture, lambda p: load_alpha(p.read_bytes(), name=str(p))):
        with pytest.raises(DataError, match=r"cannot read picture .*a\.png: \S") as error:
            read(path)
        assert "\n" not in str(error.value)
    if when == "open":
        with pytest.raises(DataError, match=r"a\.png"):
            probe_size(path)


def test_a_picture_too_large_to_be_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halves().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for read in (load_picture, probe_size):
        with pytest.raises(DataError, match=r"a\.png: .*exceeds limit"):
            read(tmp_path / "a.png")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_a_damaged_avif_is_no_picture(tmp_path: Path) -> None:
    content = encoded(halves().resize((64, 32)), "AVIF")
    for cut in (20, 100, len(content) - 40):
        with pytest.raises(DataError, match=r"cannot read picture a\.avif"):
            load_picture(content[:cut], name="a.avif")


@pytest.mark.parametrize(
    ("original", "fraction", "resized", "corner"),
    [
        ((200, 100), 0.0, (128, 64), (0, 0)),
        ((200, 100), 0.5, (128, 64), (32, 0)),
        ((200, 100), 0.999, (128, 64), (64, 0)),
        ((10, 35), 0.5, (64, 224), (0, 80)),
        ((64, 64), 0.7, (64, 64), (0, 0)),
    ],
)
def test_cover_scales_the_shorter_side_and_crops_the_longer(original, fraction, resized, corner) -> None:
    geometry = Geometry.cover(original, (64, 64), fraction=fraction)
    assert (geometry.resized, (geometry.left, geometry.top)) == (resized, corner)
    assert geometry.apply(Image.new("RGB", original)).size == (64, 64)


def test_every_crop_place_is_drawn_and_stays_inside() -> None:
    places = {Geometry.cover((67, 64), (64, 64), fraction=i / 400).left for i in range(400)}
    assert places == {0, 1, 2, 3}


def test_cover_never_leaves_a_gap() -> None:
    for width in range(17, 200, 7):
        for height in range(13, 200, 11):
            g = Geometry.cover((width, height), (96, 64), fraction=0.99)
            assert g.left + 96 <= g.resized[0] and g.top + 64 <= g.resized[1]
            assert g.resized[0] == 96 or g.resized[1] == 64


def test_a_control_picture_goes_the_same_way() -> None:
    big = Image.new("RGB", (256, 128), RED)
    big.paste(BLUE, (128, 0, 256, 128))
    geometry = Geometry.cover(big.size, (64, 64), fraction=0.5, flip=True)
    small = big.resize((128, 64))
    a, b = (np.asarray(geometry.apply(p)).astype(int) for p in (big, small))
    assert tuple(a[0, 0]) == BLUE and tuple(a[0, -1]) == RED
    assert np.abs(a - b)[:, list(range(28)) + list(range(36, 64))].max() < 10


def test_tensor_is_channels_first_in_minus_one_to_one() -> None:
    tensor = to_tensor(Image.fromarray(np.array([[[0, 51, 255]], [[255, 255, 255]]], dtype=np.uint8)))
    assert tensor.shape == (3, 2, 1)
    torch.testing.assert_close(tensor[:, 0, 0], torch.tensor([-1.0, -0.6, 1.0]))
