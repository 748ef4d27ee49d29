"""ControlNets in pictures that other packs cut into tiles: what they read and write is there."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from control_models import (
    APPLY,
    STEERED,
    STOCK,
    Out,
    add_apply,
    add_steered,
    open_control,
    picture,
    save_control,
    steered,
)
from graphs import Graph, Node, text_to_image
from model_runs import error, ksampler
from packs import load_pack
from sampling_models import our_model
from torch import Tensor

UPSCALE, TILED = "UltimateSDUpscaleNoUpscale", "TiledDiffusion"
# Without numbers of its own, with weights, with a mask as large as the picture, with one of another shape
GIVEN: list[dict[str, Any]] = [
    {},
    {"layer_weights": "1, 0.25, -2", "strength": 0.7},
    {"mask": (torch.arange(96) < 40).float().expand(1, 64, 96)},
    {"mask": (torch.arange(64) < 40).float().expand(1, 64, 64), "layer_weights": "decay"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("control")


@pytest.fixture(scope="module")
def model(host, folder):
    return our_model(host, folder, STEERED)


@pytest.fixture(scope="module")
def control(host, folder):
    return open_control(host, save_control(folder / "control.safetensors"))


# -- without a pack: the fields ------------------------------------------------------------------------------


@pytest.mark.parametrize("given", GIVEN[:3], ids=["neutral", "weights", "mask"])
def test_fields_are_those_of_the_stock_node(host, control, given):
    attached = []
    for node in (APPLY, STOCK):
        g = Graph()
        own = given if node == APPLY else {}
        strength = {"strength": given.get("strength", 1.0), "start_percent": 0.1, "end_percent": 0.8}
        applied = add_apply(host, g, control, node, **{**own, **strength})
        (conditioning,) = host.values(g, Out(applied, 0))
        attached.append(conditioning[0][1]["control"])
    ours, stock = attached
    assert type(ours) is type(stock)
    for name in (
        "strength",
        "timestep_percent_range",
        "compression_ratio",
        "upscale_algorithm",
        "extra_conds",
    ):
        assert getattr(ours, name) == getattr(stock, name), name
    assert torch.equal(ours.cond_hint_original[:, :3], stock.cond_hint_original)
    assert ours.vae.spacial_compression_encode() == 8 and ours.control_model.dtype == torch.float32
    assert ours.cond_hint is None and ours.previous_controlnet is None
    if "mask" not in given:
        assert ours.cond_hint_original.shape == stock.cond_hint_original.shape
    if not given:
        assert ours.control_model is control.control_model


def test_what_is_cut_out_of_the_picture_is_cut_out_of_the_mask(host, model, control):
    """As packs do it: a copy whose picture is a part of it. The part's own mask gives the same latents."""
    mask = torch.rand(1, 64, 96, generator=torch.Generator().manual_seed(2)).round()
    given = {"layer_weights": "1, 0.25, -2"}
    g = Graph()
    applied = add_apply(host, g, control, mask=mask, image=picture(), **given)
    positive, negative = host.values(g, Out(applied, 0), Out(applied, 1))
    cut = positive[0][1]["control"].copy()
    cut.cond_hint_original = cut.cond_hint_original[:, :, :32, 32:64]
    prompts = [[[p[0][0], {**p[0][1], "control": cut}]] for p in (positive, negative)]
    latent = torch.zeros(1, 4, 4, 4)
    found = ksampler(host, model, positive=prompts[0], negative=prompts[1], latent_image=latent)
    part = {"image": picture()[:, :32, 32:64], "mask": mask[:, :32, 32:64]}
    expected = steered(host, model, control, **part, **given, sampling={"latent_image": latent})
    assert torch.equal(found, expected)
    part["mask"] = mask[:, :32, :32]
    assert (
        error(steered(host, model, control, **part, **given, sampling={"latent_image": latent}), found) > 1e-3
    )


# -- TiledDiffusion ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiled(host):
    return load_pack(host, "ComfyUI-TiledDiffusion", TILED)


def in_tiles(host: Any, model: Any, control: Any, node: str, side: int, **given: Any) -> Tensor:
    g = Graph()
    cut = g.add(
        TILED, model=host.give(g, model), method="MultiDiffusion", tile_width=side, tile_height=side,
        tile_overlap=0, tile_batch_size=2,
    )  # fmt: skip
    applied = add_apply(host, g, control, node, **given)
    return host.values(g, add_steered(host, g, cut, applied, steps=2))[0]["samples"]


@pytest.mark.parametrize("given", GIVEN, ids=["neutral", "weights", "mask", "other-mask"])
def test_tiled_diffusion_with_one_tile_is_no_tiling(host, tiled, model, control, given):
    found = in_tiles(host, model, control, APPLY, 96, **given)
    assert error(found, steered(host, model, control, sampling={"steps": 2}, **given)) < 1e-4


def test_tiled_diffusion_cuts_our_control_as_the_stock_node(host, tiled, model, control):
    expected = in_tiles(host, model, control, STOCK, 32, strength=0.5)
    assert torch.equal(in_tiles(host, model, control, APPLY, 32, strength=0.5), expected)
    everywhere = in_tiles(host, model, control, APPLY, 32, strength=0.5, mask=torch.ones(64, 96))
    assert torch.equal(everywhere, expected)
    halved = in_tiles(host, model, control, APPLY, 32, layer_weights="0.5")
    assert error(halved, expected) < 1e-4
    whole = in_tiles(host, model, control, APPLY, 96, strength=0.5)
    assert error(whole, expected) > 0.01


def test_tiled_diffusion_cuts_the_mask(host, tiled, model, control):
    """Tiles that do not touch each other: a mask on the left tile changes nothing on the right."""
    left = (torch.arange(96) < 32).float().expand(1, 64, 96)
    found = in_tiles(host, model, control, APPLY, 32, mask=left)
    none = in_tiles(host, model, control, APPLY, 32, mask=torch.zeros(64, 96))
    full = in_tiles(host, model, control, APPLY, 32)
    assert error(found[..., :4], full[..., :4]) < 1e-4 and error(found[..., 4:], none[..., 4:]) < 1e-4
    assert error(full[..., 4:], none[..., 4:]) > 0.01


@pytest.mark.parametrize("side", [128, 512])
def test_its_tiled_vae_takes_our_vae(host, tiled, side):
    """One tile is the VAE itself; of several, norms are estimated."""
    g = text_to_image(save=False)
    samples = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(3)) * 5
    latent = host.give(g, {"samples": samples})
    cut = g.add("VAEDecodeTiled_TiledDiffusion", samples=latent, vae=["1", 2], tile_size=384, fast=False)
    whole = g.add("VAEDecode", samples=latent, vae=["1", 2])
    encoded = g.add(
        "VAEEncodeTiled_TiledDiffusion",
        pixels=whole,
        vae=["1", 2],
        tile_size=256,
        fast=False,
        color_fix=False,
    )
    found, expected, again = host.values(g, cut, whole, encoded)
    assert found.shape == expected.shape == (1, side, side, 3)
    assert (found - expected).abs().mean() < (1e-5 if side == 128 else 0.02)
    assert again["samples"].shape == samples.shape


# -- UltimateSDUpscale ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def upscale(host):
    return load_pack(host, "ComfyUI_UltimateSDUpscale", UPSCALE)


@pytest.mark.parametrize("given", GIVEN[:3], ids=["neutral", "weights", "mask"])
def test_its_crops_are_our_control_on_a_part(host, upscale, model, control, given):
    sys.path.insert(0, str(upscale))
    try:
        import usdu_utils
    finally:
        sys.path.remove(str(upscale))
    g = Graph()
    before = add_apply(host, g, control, image=picture(9))
    applied = add_apply(host, g, control, after=before, **given)
    both = host.values(g, Out(applied, 0), Out(applied, 1))
    region, size = (32, 0, 64, 32), (96, 64)
    cut = [usdu_utils.crop_cond(c, region, size, size, (32, 32)) for c in both]
    latent = torch.zeros(1, 4, 4, 4)
    found = ksampler(host, model, positive=cut[0], negative=cut[1], latent_image=latent)
    part = {**given, "image": picture()[:, :32, 32:64]}
    if "mask" in given:
        part["mask"] = given["mask"][:, :32, 32:64]
    g = Graph()
    before = add_apply(host, g, control, image=picture(9)[:, :32, 32:64])
    applied = add_apply(host, g, control, after=before, **part)
    (expected,) = host.values(g, add_steered(host, g, model, applied, latent_image=latent))
    assert error(found, expected["samples"]) < 1e-5


@pytest.mark.parametrize("given", [{}, {"layer_weights": "0.5, 1"}], ids=["neutral", "weights"])
def test_it_upscales_with_the_embedded_model(host, upscale, given):
    g = text_to_image(save=False)
    net = g.add("HyDiTControlNetLoader", _defaults=True)
    image = picture(5, (192, 128))
    applied = add_apply(
        host, g, net, positive=Node("2"), negative=Node("3"), image=image,
        vae=Out(Node("1"), 2), **given,
    )  # fmt: skip
    drawn = g.add(
        UPSCALE, _defaults=True, upscaled_image=host.give(g, image), model=["1", 0],
        positive=applied.out(0), negative=applied.out(1), vae=["1", 2], steps=1, tile_width=128,
        tile_height=128, tile_padding=0, denoise=0.5,
    )  # fmt: skip
    (out,) = host.values(g, drawn)
    assert out.shape == image.shape and torch.isfinite(out).all() and out.std() > 0.01
