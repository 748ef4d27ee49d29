"""Prompt pictures of an IP-Adapter in training: where they come from, and their views."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hydit_core.data.config import DataConfig, ImagePromptConfig
from hydit_core.data.dataset import TrainData, open_dataset
from hydit_core.data.prompt_images import PromptImages
from hydit_core.errors import DataError
from hydit_core.image_prompts.pixels import encoder_pixels

SIDE = 14


def ramp(width: int = 40, height: int = 30) -> Image.Image:
    """Red grows to the right, green downwards: a pixel tells where it was."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([6 * x, 8 * y, 0 * x], -1).astype(np.uint8))


def views_of(**options: object) -> list[np.ndarray]:
    config = ImagePromptConfig.model_validate(options)
    made = PromptImages(config, SIDE)
    return [np.asarray(made.view(ramp(), number)) for number in range(config.views)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (64, 64), color).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name, encoding="utf-8")
    return tmp_path


def open_data(source: dict[str, object], **options: object) -> TrainData:
    config = DataConfig.model_validate({"sources": [source], "resolution": 64, **options})
    data = open_dataset(config, seed=0, batch_size=1)
    data.use_prompts(PromptImages(config.image_prompt, SIDE))
    return data


def shown(data: TrainData, count: int = 2) -> dict[str, torch.Tensor]:
    """The prompt picture of each picture's name."""
    batches = [data.batch(step) for step in range(count)]
    return {Path(batch.keys[0]).stem: batch.prompts[0] for batch in batches if batch.prompts is not None}


def plain(color: str) -> torch.Tensor:
    return encoder_pixels(Image.new("RGB", (8, 8), color), SIDE)


def test_views_show_parts_some_of_them_mirrored() -> None:
    whole = np.asarray(ramp())
    first, *others = views_of(views=9, least=0.6, flip=0.5)
    assert (first == whole).all()
    mirrored = 0
    for view in others:
        height, width, _ = view.shape
        assert 0.6 * 30 - 1 <= height <= 30 and 0.6 * 40 - 1 <= width <= 40
        flip = view[0, 0, 0] > view[0, -1, 0]
        mirrored += bool(flip)
        upright = view[:, ::-1] if flip else view
        left, top = upright[0, 0, 0] // 6, upright[0, 0, 1] // 8
        assert (upright == whole[top : top + height, left : left + width]).all()
    assert mirrored == 4
    assert len({view.tobytes() for view in others}) == 8


def test_how_many_are_mirrored() -> None:
    for flip, expected in ((0.0, 0), (1.0, 8), (0.25, 2)):
        turned = [view[0, 0, 0] > view[0, -1, 0] for view in views_of(views=9, flip=flip)]
        assert sum(map(bool, turned)) == expected
    assert all(view.shape == (30, 40, 3) for view in views_of(views=5, least=1.0))


def test_the_picture_itself_by_default(folder: Path) -> None:
    data = open_data({"path": folder}, image_prompt={"views": 1})
    for name, color in (("a", "red"), ("b", "blue")):
        torch.testing.assert_close(shown(data)[name], plain(color))
    # Not the crop that is trained: the whole picture
    ramp(200, 64).save(folder / "a.png")
    wide = open_data({"path": folder}, image_prompt={"views": 1})
    torch.testing.assert_close(shown(wide)["a"], encoder_pixels(ramp(200, 64), SIDE))


def test_views_are_drawn_for_each_place(folder: Path) -> None:
    ramp(64, 64).save(folder / "a.png")
    data = open_data({"path": folder}, image_prompt={"views": 4})
    found = [data.batch(step) for step in range(80)]
    seen = {batch.prompts.numpy().tobytes() for batch in found if Path(batch.keys[0]).stem == "a"}
    assert len(seen) == 4
    again = open_data({"path": folder}, image_prompt={"views": 4}).batch(3)
    assert torch.equal(again.prompts, found[3].prompts)


def test_a_folder_of_prompt_pictures(folder: Path) -> None:
    place = folder / "image_prompt"
    place.mkdir()
    files = {"kind": "files", "views": 1}
    with pytest.raises(DataError, match="no picture has a prompt picture"):
        open_data({"path": folder}, image_prompt=files)
    # Of another shape and format; a picture without one is its own.
    Image.new("RGB", (20, 60), "green").save(place / "a.webp", lossless=True)
    data = open_data({"path": folder}, image_prompt=files)
    assert len(data.manifest) == 2 and data.summary().image_prompts == 1
    torch.testing.assert_close(shown(data)["a"], plain("green"))
    torch.testing.assert_close(shown(data)["b"], plain("blue"))
    assert len(open_data({"path": folder}).manifest) == 2  # it is not taken for pictures to train
    (place / "a.webp").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a\.webp"):
        open_data({"path": folder}, image_prompt=files)
    with pytest.raises(DataError, match=r"its image_prompt_dir .*elsewhere is no folder"):
        open_data({"path": folder, "image_prompt_dir": folder / "elsewhere"}, image_prompt=files)


def test_a_column_of_prompt_pictures(folder: Path) -> None:
    rows = [
        {"image": "a.png", "caption": "a", "like": "b.png"},
        {"image": "b.png", "caption": "b", "like": ""},
    ]
    table = folder / "data.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    files = {"kind": "files", "views": 1}
    data = open_data({"path": table, "image_prompt_field": "like"}, image_prompt=files)
    torch.testing.assert_close(shown(data)["a"], plain("blue"))
    torch.testing.assert_close(shown(data)["b"], plain("blue"))
    with pytest.raises(DataError, match="no row has a prompt picture in 'other'"):
        open_data({"path": table, "image_prompt_field": "other"}, image_prompt=files)
    rows[1]["like"] = "gone.png"
    table.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(DataError, match=r"gone\.png"):
        open_data({"path": table, "image_prompt_field": "like"}, image_prompt=files)


def test_prompt_pictures_inside_a_table(folder: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    content = [(folder / name).read_bytes() for name in ("a.png", "b.png")]
    table = pa.table({"image": content, "text": ["a", "b"], "like": content[::-1]})
    parquet.write_table(table, folder / "data.parquet")
    source = {"path": folder / "data.parquet", "image_prompt_field": "like"}
    data = open_data(source, image_prompt={"kind": "files", "views": 1})
    found = {data.batch(step).captions[0]: data.batch(step).prompts[0] for step in range(2)}
    torch.testing.assert_close(found["a"], plain("blue"))
    torch.testing.assert_close(found["b"], plain("red"))


def test_another_choice_of_prompts_is_told_when_a_run_goes_on(folder: Path) -> None:
    prints = [
        open_data({"path": folder}, image_prompt=options).fingerprint()
        for options in ({}, {"views": 3}, {"least": 0.5}, {})
    ]
    assert prints[0] == prints[3] and len(set(prints)) == 3
