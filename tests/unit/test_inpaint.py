"""Inpainting: what is masked is drawn as by the formula, and every other pixel stays as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from hydit_core import ConfigError, DataError, load
from hydit_core.diffusion.samplers import SAMPLERS
from hydit_core.images import Geometry
from hydit_core.inpaint import Inpainting, load_mask, own_size


@pytest.fixture(scope="module")
def pipe(tiny_model_file):
    return load(tiny_model_file, device="cpu")


@pytest.fixture(scope="module")
def picture():
    noise = np.random.default_rng(3).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((64, 64))


def boxed(*box, size=(64, 64), level=255):
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(box, fill=level)
    return mask


def array(image):
    return np.asarray(image).astype(int)


HALF = (32, 0, 63, 63)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_not_masked_stays_bit_for_bit(pipe, picture, sampler):
    mask = boxed(37, 10, 60, 40)
    (drawn,) = pipe("a red apple", init_image=picture, mask=mask, sampler=sampler, steps=3)
    changed = (array(drawn) != array(picture)).any(-1)
    assert not changed[np.asarray(mask) == 0].any()
    assert changed[np.asarray(mask) > 0].mean() > 0.9


def test_ddim_by_the_formula(pipe, picture):
    """Each step sees the known part with the noise of its level; written with Python's own arithmetic."""
    seen = []
    given = {"steps": 5, "cfg": 3.0, "sampler": "ddim", "spacing": "leading"}
    pipe(
        "a red apple", "", seed=4, init_image=picture, mask=boxed(*HALF), strength=0.8, **given,
        callback=lambda i, n, x: seen.append(x),
    )  # fmt: skip
    sampling = pipe.settings(negative="", **given)
    clean = pipe._encode_image(picture, sampling)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    free = torch.zeros(1, 1, 8, 8)
    free[..., 4:] = 1
    context = pipe.context(["", "a red apple"], sampling)
    betas = torch.linspace(0.00085**0.5, 0.018**0.5, 1000, dtype=torch.float64) ** 2
    signal = torch.cumprod(1 - betas, 0)
    times = [601, 401, 201, 1]
    levels = [float(((1 - signal[t]) / signal[t]) ** 0.5) for t in times] + [0.0]
    x = clean + levels[0] * noise
    for i, t in enumerate(times):
        shown = x * free + (clean + levels[i] * noise) * (1 - free)
        alpha, sigma = float(signal[t] ** 0.5), float((1 - signal[t]) ** 0.5)
        with torch.no_grad():
            v = pipe.dit(torch.cat([shown, shown]) * alpha, torch.full((2,), float(t)), context)[:, :4]
        v = v[:1] + 3.0 * (v[1:] - v[:1])
        denoised = alpha * (alpha * shown) - sigma * v
        denoised = denoised * free + clean * (1 - free)
        assert torch.allclose(seen[i], denoised, atol=2e-4 * float(denoised.std())), i
        x = denoised + (x - denoised) * (levels[i + 1] / levels[i])
    assert torch.equal(seen[-1][..., :4], clean[..., :4])


def test_a_mask_of_everything_is_image_to_image(pipe, picture):
    given = {"init_image": picture, "strength": 0.7, "steps": 10, "seed": 2, "sampler": "ddpm"}
    masked = pipe("a cat", mask=Image.new("L", (64, 64), 255), **given)[0]
    assert (array(masked) == array(pipe("a cat", **given)[0])).all()


def test_with_forecasts_guidance_for_a_part_and_a_batch(pipe, picture):
    mask = boxed(*HALF)
    drawn = pipe(
        "a cat", init_image=picture, mask=mask, steps=20, forecast=0.2, cfg_end=0.5, batch=2, sampler="ddpm"
    )
    for one in drawn:
        assert (array(one)[:, :32] == array(picture)[:, :32]).all()
    assert (array(drawn[0])[:, 32:] != array(drawn[1])[:, 32:]).any()
    alone = pipe("a cat", init_image=picture, mask=mask, steps=20, sampler="ddpm", seed=1)[0]
    again = pipe("a cat", init_image=picture, mask=mask, steps=20, sampler="ddpm", batch=2)[1]
    assert np.abs(array(alone) - array(again)).max() <= 1


def test_latents_are_redrawn_where_any_pixel_is(picture):
    part = Inpainting(picture, boxed(16, 16, 24, 16), (64, 64))
    expected = torch.zeros(8, 8)
    expected[2, 2:4] = 1
    assert torch.equal(part.latents[0, 0], expected) and not part.covers_all


def test_gray_and_soft_edges_blend(picture):
    red = torch.zeros(3, 64, 64)
    red[0] = 1
    half = Inpainting(picture, boxed(*HALF, level=51), (64, 64)).composed(red)
    original = torch.from_numpy(array(picture)).permute(2, 0, 1) / 255
    assert torch.allclose(half[:, :, 32:], 0.2 * red[:, :, 32:] + 0.8 * original[:, :, 32:], atol=1e-5)
    hard, soft = (Inpainting(picture, boxed(*HALF), (64, 64), feather=f) for f in (0, 6))
    row = array(soft.mask)[32]
    assert (np.diff(row) >= 0).all() and abs(row[31:33].mean() - 127.5) < 4
    assert row[32 - 12] == 0 and row[32 + 12] == 255 and 0 < row[32 - 5] < 20
    assert (array(hard.mask) == array(boxed(*HALF))).all()
    assert soft.latents.sum() > hard.latents.sum()


def test_pictures_keep_their_size_and_pixels_where_they_can():
    """What is above a multiple of 8 is cut off, not scaled."""
    assert own_size((1023, 770)) == (1016, 768) and own_size((9, 24)) == (16, 24)
    picture = Image.effect_noise((69, 66), 80).convert("RGB")
    part = Inpainting(picture, boxed(40, 40, 68, 65, size=(69, 66)), own_size(picture.size))
    assert (array(part.picture) == array(picture)[1:65, 2:66]).all()
    scaled = Geometry.cut((128, 128), (64, 64))
    assert scaled.resized == (64, 64)


def test_a_mask_of_another_size_is_scaled_and_one_of_another_shape_refused(picture):
    small = Inpainting(picture, boxed(16, 0, 31, 31, size=(32, 32)), (64, 64))
    values = array(small.mask)
    assert (values[:, :31] == 0).all() and (values[:, 34:] == 255).all()
    with pytest.raises(DataError, match=r"the mask is 64x32, its picture 64x64: they must have the same"):
        Inpainting(picture, boxed(0, 0, 9, 9, size=(64, 32)), (64, 64))
    with pytest.raises(DataError, match=r"m\.png: nothing of it is white"):
        Inpainting(picture, Image.new("L", (64, 64)), (64, 64), name="m.png")
    assert Inpainting(picture, Image.new("L", (64, 64), 255), (64, 64)).covers_all
    for feather in (-1, float("nan"), 1000):
        with pytest.raises(ConfigError, match="use 0"):
            Inpainting(picture, boxed(*HALF), (64, 64), feather=feather)


def test_a_mask_needs_its_picture(pipe):
    with pytest.raises(ConfigError, match="a mask without the picture that it belongs to: give init_image"):
        pipe("a cat", mask=boxed(*HALF))


def test_masks_from_files(tmp_path, picture):
    """White strokes on nothing; or the holes of the picture itself."""
    strokes = boxed(*HALF)
    Image.merge("LA", (Image.new("L", (64, 64), 255), strokes)).save(tmp_path / "strokes.png")
    assert (array(load_mask(tmp_path / "strokes.png", tmp_path)) == array(strokes)).all()
    erased = picture.copy()
    erased.putalpha(strokes.point(lambda value: 255 - value))
    erased.save(tmp_path / "erased.png")
    assert (array(load_mask("alpha", tmp_path / "erased.png")) == array(strokes)).all()
    picture.save(tmp_path / "whole.png")
    with pytest.raises(DataError, match=r"whole\.png has no transparent part to redraw"):
        load_mask("alpha", tmp_path / "whole.png")
    with pytest.raises(DataError, match=r"absent\.png: no such file"):
        load_mask("alpha", tmp_path / "absent.png")


def test_the_control_picture_is_black_where_it_is_redrawn(picture):
    """As `Image.composite` of the published preprocessor: black, in the shares of the mask."""
    mask = boxed(*HALF)
    mask.putpixel((0, 0), 51)
    control = array(Inpainting(picture, mask, (64, 64)).control_picture())
    assert not control[:, 32:].any() and (control[1:, :32] == array(picture)[1:, :32]).all()
    assert np.abs(control[0, 0] - 0.8 * array(picture)[0, 0]).max() <= 1
