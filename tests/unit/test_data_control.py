"""Control pictures that are read from files: names, shapes and transparency as for masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hydit_core.data.config import ControlConfig, DataConfig
from hydit_core.data.control_images import ControlImages
from hydit_core.data.dataset import TrainData, open_dataset
from hydit_core.errors import DataError

FILES = {"kind": "files"}


def lines(form: str) -> Image.Image:
    """White lines, each 8 of 64 rows high, on a ground that is transparent in various ways."""
    gray = Image.new("L", (64, 64))
    gray.paste(255, (0, 24, 64, 32))
    if form == "RGBA":
        return Image.merge("RGBA", (gray, gray, gray, gray))
    if form == "white RGBA":  # as vector programs write them: nothing but the alpha channel tells
        white = Image.new("L", gray.size, 255)
        return Image.merge("RGBA", (white, white, white, gray))
    if form == "LA":
        return Image.merge("LA", (gray, gray))
    if form == "P":
        picture = gray.point(lambda value: value // 255).convert("P")
        picture.putpalette([255, 0, 255, 255, 255, 255])
        picture.info["transparency"] = 0
        return picture
    return gray.convert(form)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "d" / "control").mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "d" / "a.png")
    (tmp_path / "d" / "a.txt").write_text("a")
    return tmp_path / "d"


def open_data(folder: Path, **options: object) -> TrainData:
    config = DataConfig(sources=[{"path": folder}], **{"resolution": 64, "control": FILES, **options})
    return open_dataset(config, seed=0, batch_size=1)


@pytest.mark.parametrize("form", ["RGBA", "white RGBA", "LA", "P", "L", "RGB", "1"])
def test_what_is_transparent_is_dark(folder: Path, form: str) -> None:
    lines(form).save(folder / "control" / "a.png")
    control = open_data(folder, alpha_color="white").batch(0).control
    assert control is not None
    expected = torch.full((1, 3, 64, 64), -1.0)
    expected[:, :, 24:32] = 1.0
    assert torch.equal(control, expected)
    sample = ControlImages(ControlConfig(**FILES)).from_file(folder / "control" / "a.png", (64, 64))
    assert np.array_equal(np.asarray(sample)[:, :, 0], np.asarray(lines("L")))


def test_a_control_picture_has_its_pictures_shape(folder: Path) -> None:
    Image.new("RGB", (64, 32)).save(folder / "control" / "a.png")
    with pytest.raises(DataError, match=r"control picture .*a\.png is 64x32, its picture 64x64"):
        open_data(folder)
    Image.new("RGB", (16, 16)).save(folder / "control" / "a.png")
    data = open_data(folder)  # of another size
    assert data.batch(0).control is not None
    Image.new("RGB", (64, 32)).save(folder / "control" / "a.png")
    with pytest.raises(DataError, match=r"control picture .*a\.png is 64x32, its picture 64x64"):
        data.batch(0)


def test_a_control_picture_may_have_another_suffix(folder: Path) -> None:
    lines("L").save(folder / "control" / "a.webp", lossless=True)
    control = open_data(folder).batch(0).control
    assert control is not None and control[0, 0, 28, 0] == 1
    (folder / "control" / "a.webp").unlink()
    with pytest.raises(DataError, match=r"control.a\.png: no such file"):
        open_data(folder)


def test_a_turned_control_picture_is_upright(folder: Path) -> None:
    Image.new("RGB", (64, 32), "red").save(folder / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (32, 64)).save(folder / "control" / "a.png", exif=exif)
    assert open_data(folder).batch(0).control is not None
