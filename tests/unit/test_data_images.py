"""Pictures of every kind come out as a viewer shows them, at the size that is trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hydit_core.data import Geometry, load_picture, to_tensor
from hydit_core.data.images import probe_size
from hydit_core.errors import DataError

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def halves(mode: str = "RGB") -> Image.Image:
    """Left red, right blue; 8 x 4 pixels."""
    picture = Image.new("RGB", (8, 4), RED)
    picture.paste(BLUE, (4, 0, 8, 4))
    return picture.convert(mode)


def pixel(picture: Image.Image, x: int, y: int) -> tuple[int, int, int]:
    assert picture.mode == "RGB"
    return picture.getpixel((x, y))


@pytest.mark.parametrize(
    ("orientation", "size", "first"), [(3, (8, 4), BLUE), (6, (4, 8), RED), (8, (4, 8), BLUE)]
)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_orientation(tmp_path: Path, orientation: int, size: tuple, first: tuple, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    halves().resize((64, 32), Image.Resampling.NEAREST).save(path, exif=exif, quality=100)
    picture = load_picture(path)
    assert picture.size == (size[0] * 8, size[1] * 8) == probe_size(path)
    assert np.abs(np.subtract(pixel(picture, 2, 2), first)).max() < 12


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
