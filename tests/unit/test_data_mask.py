"""Masks of the loss: read with the picture's crop and flip, and what the loss makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_setup import paint
from PIL import Image
from pydantic import ValidationError

from hydit_core.data.config import DataConfig
from hydit_core.data.dataset import TrainData, open_dataset
from hydit_core.diffusion.losses import diffusion_loss
from hydit_core.diffusion.schedule import Schedule
from hydit_core.errors import DataError
from hydit_core.facts import DiffusionConfig


def left_half(path: Path, size: tuple[int, int], mode: str = "L") -> Path:
    """A mask, white in the left half. With alpha: white everywhere, opaque there."""
    values = np.zeros((size[1], size[0]), dtype=np.uint8)
    values[:, : size[0] // 2] = 255
    mask = Image.fromarray(values)
    if mode == "RGBA":
        mask = Image.merge("RGBA", [Image.new("L", size, 255)] * 3 + [mask])
    path.parent.mkdir(parents=True, exist_ok=True)
    mask.save(path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for i, size in enumerate([(64, 32), (32, 32), (96, 48), (32, 64)]):
        paint(folder / f"{i}.png", i, size)
        left_half(folder / "mask" / f"{i}.png", size)
    return folder


def open_data(source: object, **options: Any) -> TrainData:
    source = {"caption": "a thing", **(source if isinstance(source, dict) else {"path": source})}
    settings = {"resolution": 32, "mask": {"kind": "files"}, **options}
    return open_dataset(DataConfig(sources=[source], **settings), seed=1, batch_size=1)


def masks(data: TrainData, steps: int = 16) -> dict[str, list[torch.Tensor]]:
    found: dict[str, list[torch.Tensor]] = {}
    for step in range(steps):
        batch = data.batch(step)
        assert batch.mask is not None and batch.mask.shape == (1, 1, 4, 4)
        found.setdefault(batch.keys[0], []).append(batch.mask[0, 0])
    return found


def test_a_mask_goes_through_the_crop_of_its_picture(pictures: Path) -> None:
    """The middle of a wide picture: the border between black and white is in the middle still."""
    data = open_data(pictures, crop="center")
    assert len(data.manifest) == 4  # masks are no pictures
    assert data.summary().masks == 4 and "masks: 4" in data.summary().lines()
    for key, found in masks(data, 8).items():
        for mask in found:
            rows = mask[0].tolist()
            assert mask.eq(mask[0]).all(), key
            assert rows == pytest.approx([1, 1, 0, 0], abs=0.02), key


def test_a_mask_is_cropped_and_flipped_as_its_picture(tmp_path: Path) -> None:
    """A picture that is its own mask, at random crops and flips."""
    folder = tmp_path / "pictures"
    for i, size in enumerate([(120, 32), (32, 100)]):
        picture = paint(folder / f"{i}.png", i, size)
        (folder / "mask").mkdir(exist_ok=True)
        (folder / "mask" / picture.name).write_bytes(picture.read_bytes())
    data = open_data(folder, flip=0.5)
    for step in range(12):
        batch = data.batch(step)
        assert batch.pixels is not None and batch.mask is not None
        gray = (batch.pixels + 1) / 2 * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        expected = torch.nn.functional.avg_pool2d(gray.sum(1, keepdim=True), 8)
        torch.testing.assert_close(batch.mask, expected, atol=0.01, rtol=0)


def test_masks_of_pictures_that_are_left_out_are_not_counted(pictures: Path) -> None:
    assert open_data(pictures, min_side=48).summary().masks == 1


@pytest.mark.parametrize("mask", [None, {"kind": "alpha"}])
def test_masks_that_are_not_used_are_no_pictures(pictures: Path, mask: dict[str, str] | None) -> None:
    """Where a source has a caption for all of its pictures, nothing else would tell them from pictures."""
    paint(pictures / "mask" / "carnival.png", 1, (32, 32))
    paint(pictures / "mask" / "2.png", 1, (32, 32)).with_suffix(".txt").write_text("a mask", encoding="utf-8")
    paint(pictures / "more" / "5.png", 1, (32, 32))
    left_half(pictures / "mask" / "more" / "5.png", (16, 16))
    keys = [record.key.partition("/")[2] for record in open_data(pictures, mask=mask).manifest]
    assert keys == ["0.png", "1.png", "2.png", "3.png", "mask/2.png", "mask/carnival.png", "more/5.png"]


def test_outside_counts_what_is_configured(pictures: Path) -> None:
    data = open_data(pictures, crop="center", mask={"kind": "files", "outside": 0.25})
    assert masks(data, 1).popitem()[1][0][0].tolist() == pytest.approx([1, 1, 0.25, 0.25], abs=0.02)


def test_validation_has_masks_too(pictures: Path) -> None:
    data = open_data(pictures, validation=2)
    found = [batch.mask for batch in data.validation_batches()]
    assert len(found) == 2
    for mask in found:
        assert mask is not None and mask[0, 0, 0].tolist() == pytest.approx([1, 1, 0, 0], abs=0.02)


def test_transparency_as_mask(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    left_half(folder / "a.png", (32, 32), "RGBA")
    paint(folder / "whole.png", 1, (32, 32))
    found = masks(open_data(folder, mask={"kind": "alpha"}))
    assert found["pictures/a.png"][0][0].tolist() == [1, 1, 0, 0]
    assert found["pictures/whole.png"][0].eq(1).all()


def test_what_is_transparent_in_a_mask_is_outside(pictures: Path) -> None:
    left_half(pictures / "mask" / "1.png", (32, 32), "RGBA")
    assert masks(open_data(pictures, crop="center"))["pictures/1.png"][0][0].tolist() == [1, 1, 0, 0]


def test_a_column_of_masks(pictures: Path, tmp_path: Path) -> None:
    rows = [{"image": "pictures/1.png", "where": "pictures/mask/1.png"}, {"image": "pictures/0.png"}]
    table = tmp_path / "data.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = masks(open_data({"path": table, "mask_field": "where"}))
    assert found["data/pictures/1.png"][0][0].tolist() == [1, 1, 0, 0]
    assert found["data/pictures/0.png"][0].eq(1).all()
    with pytest.raises(DataError, match="no row has a mask in 'wher'"):
        open_data({"path": table, "mask_field": "wher"})
    table.write_text(json.dumps({**rows[0], "where": 3}), encoding="utf-8")
    with pytest.raises(DataError, match=r"data\.jsonl, line 1: where holds int, expected a path"):
        open_data({"path": table, "mask_field": "where"})


def test_errors_name_the_mask(pictures: Path, tmp_path: Path) -> None:
    left_half(pictures / "mask" / "2.png", (48, 96))
    with pytest.raises(DataError, match=r"mask .*mask.2\.png is 48x96, its picture 96x48"):
        open_data(pictures)
    assert open_data(pictures, on_unreadable="skip").summary().skipped == 1
    left_half(pictures / "mask" / "2.png", (96, 48))
    data = open_data(pictures)
    left_half(pictures / "mask" / "2.png", (48, 96))  # after it was looked at
    with pytest.raises(DataError, match=r"mask .*mask.2\.png is 48x96, its picture 96x48"):
        masks(data)
    (pictures / "mask" / "2.png").unlink()
    with pytest.raises(DataError, match=r"cannot read picture .*mask.2\.png: no such file"):
        open_data(pictures)
    with pytest.raises(DataError, match=r"its mask_dir .* is no folder"):
        open_data({"path": pictures, "mask_dir": tmp_path / "none"})
    bare = paint(tmp_path / "bare" / "1.png", 1, (32, 32)).parent
    with pytest.raises(DataError, match="no picture has a mask: put them into a folder `mask`"):
        open_data(bare)
    with pytest.raises(ValidationError, match="mask_dir and mask_field belong to a table"):
        open_data({"path": pictures, "mask_dir": bare}, mask=None)


SCHEDULE = Schedule(DiffusionConfig())


def loss_inputs(n: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    x0, noise = torch.randn(2, n, 4, 6, 8, generator=generator)
    output = torch.randn(n, 8, 6, 8, generator=generator)
    return output, x0, noise, torch.tensor([0, 400, 999])[:n]


def test_a_mask_of_rectangles_gives_the_loss_of_the_rectangles() -> None:
    output, x0, noise, t = loss_inputs()
    mask = torch.zeros(3, 1, 6, 8)
    mask[..., 1:4, 2:7] = 1
    found = diffusion_loss(output, x0, noise, t, SCHEDULE, mask=mask)
    part = (..., slice(1, 4), slice(2, 7))
    expected = diffusion_loss(output[part], x0[part], noise[part], t, SCHEDULE)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_mask_of_weights_is_a_weighted_mean() -> None:
    output, x0, noise, t = loss_inputs()
    mask = torch.rand(3, 1, 6, 8, generator=torch.Generator().manual_seed(1))
    abar = (1 - torch.linspace(0.00085**0.5, 0.018**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    a, s = (x.view(-1, 1, 1, 1) for x in (abar[t].sqrt(), (1 - abar[t]).sqrt()))
    error = (output[:, :4].double() - (a * noise - s * x0)).square()
    weights = mask.double().expand_as(error)
    expected = (error * weights).sum((1, 2, 3)) / weights.sum((1, 2, 3))
    found = diffusion_loss(output, x0, noise, t, SCHEDULE, mask=mask).mse
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_nothing_outside_a_mask_gets_a_gradient() -> None:
    output, x0, noise, t = loss_inputs()
    output.requires_grad_(True)
    mask = torch.ones(3, 1, 6, 8)
    mask[..., 4:] = 0
    mask[2] = 0
    terms = diffusion_loss(output, x0, noise, t, SCHEDULE, mask=mask)
    terms.loss.sum().backward()
    assert output.grad is not None
    assert output.grad[:2, :, :, :4].ne(0).any(dim=1).all()
    assert output.grad[:, :, :, 4:].eq(0).all() and output.grad[2].eq(0).all()
    assert terms.loss[2] == 0
