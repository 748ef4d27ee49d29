"""Large pictures in tiles: each is to the network a picture of its own, and they join without seams."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tiny import TINY, TINY_V11, randomize, write_tiny_model

from hydit_core import ConfigError, load
from hydit_core import pipeline as pipelines
from hydit_core.control import ControlInput
from hydit_core.model.controlnet import ControlNet
from hydit_core.tiles import Box, Tiles
from hydit_core.vae import VAE

pytestmark = pytest.mark.filterwarnings("ignore:.*far (below|above)")
LARGE = {"width": 112, "height": 96}


@pytest.fixture(scope="module")
def pipe(tiny_model_file):
    return load(tiny_model_file, device="cpu")


@pytest.fixture(scope="module")
def picture():
    noise = np.random.default_rng(3).integers(0, 255, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((112, 96), Image.Resampling.BICUBIC)


def array(image):
    return np.asarray(image).astype(int)


def test_tiles_cover_everything_and_are_of_one_size():
    for height, width, tile, overlap in ((12, 14, (8, 8), 2), (33, 8, (16, 16), 4), (20, 31, (6, 10), 0)):
        tiles = Tiles(height, width, tile, overlap)
        seen = torch.zeros(height, width)
        for box in tiles.boxes:
            assert box.of(seen).shape == tiles.tile
            box.of(seen).add_(1)
        assert seen.min() >= 1
        grid = torch.rand(2, height, width)
        assert torch.allclose(tiles.blended(box.of(grid) for box in tiles.boxes), grid, atol=1e-6)
    assert Tiles(12, 14, (16, 16), 4).boxes == [Box(0, 0, 12, 14)]


def test_one_tile_is_the_picture_drawn_whole(pipe, picture):
    net = randomize(ControlNet(TINY), 1)
    given = {"init_image": picture, "strength": 0.7, "steps": 6, "sampler": "ddpm", "batch": 2, **LARGE}
    steering = {"controls": [ControlInput(net, picture)], "guidance_rescale": 0.5}
    whole = pipe("a cat", **given, **steering)
    for tile in ((112, 96), (160, 128)):
        one = pipe("a cat", **given, **steering, tile=tile)
        assert all((array(a) == array(b)).all() for a, b in zip(whole, one, strict=True))
    assert (array(whole[0]) != array(pipe("a cat", **given, **steering, tile=(64, 64))[0])).any()


def test_a_step_by_the_formula(pipe, picture):
    """Each tile alone through the network; denoised results, not v, averaged by distance from borders."""
    seen = []
    given = {"steps": 4, "cfg": 1.0, "sampler": "euler", "spacing": "leading", **LARGE}
    net = randomize(ControlNet(TINY), 1)
    pipe(
        "a cat", seed=7, init_image=picture, strength=0.5, tile=(64, 64), **given,
        controls=[ControlInput(net, picture)], callback=lambda i, n, x: seen.append(x),
    )  # fmt: skip
    context = pipe.context(["a cat"], pipe.settings(**given))
    features = next(iter(pipe._encoded(["a cat"])))
    own = pipe._context(net, features, pipe.settings(**given), 1)
    level = pipe.schedule.sigmas[251]
    alpha, sigma = float((level**2 + 1) ** -0.5), float(level * (level**2 + 1) ** -0.5)
    clean = pipe._encode_image(picture, pipe.settings(**given), tile=64)
    noise = torch.randn(1, 4, 12, 14, generator=torch.Generator().manual_seed(7))
    x = clean + float(level) * noise
    pixels = torch.from_numpy(array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    total, shares = torch.zeros(1, 4, 12, 14), torch.zeros(12, 14)
    edge = torch.tensor([0.25, 0.75, 1, 1, 1, 1, 1, 1])
    for top in (0, 4):
        for left in (0, 6):
            place = (..., slice(top, top + 8), slice(left, left + 8))
            spot = (..., slice(8 * top, 8 * top + 64), slice(8 * left, 8 * left + 64))
            with torch.no_grad():
                t = torch.tensor([251.0])
                hint = pipe.vae.encode_mode(pixels[spot])
                control = net(alpha * x[place], t, own, hint)
                v = pipe.dit(alpha * x[place], t, context, control)[:, :4]
            denoised = alpha * (alpha * x[place]) - sigma * v
            share = (edge.flip(0) if top == 0 else edge)[:, None] * (edge.flip(0) if left == 0 else edge)
            total[place] += denoised * share
            shares[place] += share
    expected = total / shares
    assert torch.allclose(seen[0], expected, atol=2e-4 * float(expected.std()))


def test_the_size_condition_is_a_tiles(tmp_path, monkeypatch, picture):
    old = load(write_tiny_model(tmp_path / "old.safetensors", TINY_V11), device="cpu")
    sizes = []
    encode = old.dit.encode_context

    def spy(*args, image_meta_size, **kwargs):
        sizes.append(image_meta_size.tolist())
        return encode(*args, image_meta_size=image_meta_size, **kwargs)

    monkeypatch.setattr(old.dit, "encode_context", spy)
    old("a cat", init_image=picture, strength=0.5, steps=2, tile=(80, 64), **LARGE)
    assert sizes == [[[1024, 1024, 80, 64, 0, 0]] * 2]


def test_nothing_larger_than_a_tile_is_computed(pipe, picture, monkeypatch):
    """Neither by the network nor by the autoencoder, whatever the size of the picture."""
    largest = {"dit": 0, "encode": 0, "decode": 0}

    def watch(name, owner, attribute, side):
        call = getattr(owner, attribute)

        def seen(x, *rest, **more):
            largest[name] = max(largest[name], x.shape[-1] // side, x.shape[-2] // side)
            return call(x, *rest, **more)

        monkeypatch.setattr(owner, attribute, seen)

    monkeypatch.setattr(pipelines, "VAE_TILE", 8)
    watch("dit", pipe.dit, "forward", 1)
    watch("encode", pipe.vae.model, "encode", 8)
    watch("decode", pipe.vae.model, "decode", 1)
    net = randomize(ControlNet(TINY), 1)
    pipe(
        "a cat", init_image=picture, strength=0.5, steps=2, tile=(64, 64), width=176, height=112,
        controls=[ControlInput(net, picture)],
    )  # fmt: skip
    assert largest == {"dit": 8, "encode": 8, "decode": 8}


def seam(latents, places):
    """How much steeper the picture is across the tiles' borders than elsewhere."""
    steps = (latents[..., 1:] - latents[..., :-1]).abs().mean(dim=(0, 1, 2))
    across = torch.zeros(len(steps), dtype=torch.bool)
    across[[place - 1 for place in places]] = True
    return float(steps[across].mean() / steps[~across].mean())


def test_no_seams(monkeypatch):
    """The embedded model draws each tile as a whole: side by side they show, blended they do not."""
    pipe = load(device="cpu")
    start = Image.new("RGB", (384, 128), "white")
    ImageDraw.Draw(start).ellipse((40, -88, 340, 216), fill=(200, 30, 40))

    def drawn(overlap):
        monkeypatch.setattr(pipelines, "overlap_of", lambda tile: overlap)
        seen = []
        pipe(
            "a red apple", init_image=start, strength=0.5, steps=4, cfg=1.0, width=384, height=128, seed=1,
            tile=(128, 128), batch=2, callback=lambda i, n, x: seen.append(x),
        )  # fmt: skip
        return seen[-1]

    # 48 latents; without overlap tiles begin at 0, 16 and 32, with it at 0, 12, 24 and 32.
    assert seam(drawn(0), [16, 32]) > 1.2
    assert seam(drawn(4), [12, 16, 24, 28, 32, 40]) < 1.1


def test_the_autoencoder_encodes_in_tiles():
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    tiny = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    vae = VAE(tiny.requires_grad_(False), scaling_factor=1.0)
    pixels = torch.randn(1, 3, 128, 320)
    whole, tiled = vae.encode_mode(pixels), vae.encode_mode(pixels, tile=16)
    assert tiled.shape == whole.shape == (1, 4, 16, 40)
    # Convolutions only: tiles differ from the whole near their borders, and there they fade out.
    assert 0 < (tiled - whole).abs().mean() < 0.05 * whole.std()
    assert torch.equal(vae.encode_mode(pixels, tile=40), whole)


@pytest.mark.parametrize("tile", [(100, 64), (64, 0), (16, 16), (-64, 64)])
def test_impossible_tiles_are_refused(pipe, tile):
    with pytest.raises(ConfigError, match="multiples of 16, 32 or more"):
        pipe("a cat", tile=tile)


def test_tiles_with_inpainting_and_forecasts(pipe, picture):
    """What goes around the network goes around the tiles."""
    mask = Image.new("L", (112, 96))
    mask.paste(255, (40, 0, 112, 96))
    drawn = pipe(
        "a cat", init_image=picture, mask=mask, steps=20, forecast=0.2, cfg_end=0.5, tile=(64, 64), **LARGE
    )[0]
    assert (array(drawn)[:, :40] == array(picture)[:, :40]).all()
    assert (array(drawn)[:, 40:] != array(picture)[:, 40:]).any()
