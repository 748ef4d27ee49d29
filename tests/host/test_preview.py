"""Live previews: the file's own colors, in our sampling node and in the stock one."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from graphs import Graph, Node, text_to_image
from PIL import Image
from sampling_models import INFO, conditioning, features, native_model, our_model

RGB = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [-0.1, -0.2, -0.3], [0.0, 0.5, 0.0], [0.05, 0.06, 0.07]]


def format_of(host: Any, **vae: Any) -> Any:
    module, config = host.module("nodes.host.preview"), host.module("hydit_core.facts")
    return module.latent_format(replace(config.ModelInfo("v1.2"), vae=vae))


def test_without_a_word_in_the_file_it_is_sdxls_format(host):
    ours, sdxl = format_of(host), host.comfy_module("comfy.latent_formats").SDXL()
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(ours.process_in(latents), sdxl.process_in(latents))
    assert torch.equal(ours.process_out(latents), sdxl.process_out(latents))
    for name in ("latent_rgb_factors", "latent_rgb_factors_bias", "taesd_decoder_name", "latent_channels"):
        assert getattr(ours, name) == getattr(sdxl, name)


def test_the_files_scale_shift_and_colors_are_used(host):
    ours = format_of(host, scaling_factor=0.5, shift_factor=0.25, preview_rgb=RGB)
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(ours.process_in(latents), (latents - 0.25) * 0.5)
    assert torch.allclose(ours.process_out(ours.process_in(latents)), latents, atol=1e-6)
    assert (ours.latent_rgb_factors, ours.latent_rgb_factors_bias) == (RGB[:4], RGB[4])
    assert ours.taesd_decoder_name is None  # it would show SDXL's colors
    assert format_of(host, preview_rgb=RGB[:4]).latent_rgb_factors_bias is None


def test_colors_that_make_no_sense_are_told_and_left_out(host, caplog):
    caplog.set_level(logging.WARNING)
    assert format_of(host, preview_rgb=[[1.0, 2.0, 3.0]] * 3).latent_rgb_factors is None
    assert "preview_rgb is not 4 or 5 rows of 3" in caplog.text


def test_a_model_brings_its_format(host, tmp_path):
    colors = replace(INFO, vae={"preview_rgb": RGB})
    assert our_model(host, tmp_path, info=colors).model.latent_format.latent_rgb_factors == RGB[:4]
    previewer = host.comfy_module("latent_preview").get_previewer
    shown = previewer("cpu", our_model(host, tmp_path, info=colors).model.latent_format)
    x0 = torch.randn(1, 4, 4, 4)
    expected = torch.einsum("chw,cr->hwr", x0[0], torch.tensor(RGB[:4])) + torch.tensor(RGB[4])
    pixels = np.asarray(shown.decode_latent_to_preview(x0)).astype(int)
    assert np.abs(pixels - ((expected + 1) / 2).clamp(0, 1).mul(255).numpy()).max() <= 1


def likeness(preview: Image.Image, decoded: np.ndarray) -> float:
    """Correlation of a preview with the decoded picture, over all pixels and colors."""
    small = Image.fromarray(decoded).resize(preview.size, Image.Resampling.BOX)
    pair = [np.asarray(picture.convert("RGB")).astype(float).ravel() for picture in (preview, small)]
    return float(np.corrcoef(*pair)[0, 1])


@pytest.mark.parametrize("kind", ["HyDiTKSampler", "KSampler"])
def test_each_step_shows_a_preview_in_the_pictures_colors(host, kind):
    g = text_to_image("a red apple", seed=7, steps=10, cfg=0.0, save=False)
    if kind == "KSampler":
        inputs = {name: g.prompt["5"]["inputs"][name] for name in ("model", "positive", "negative")}
        g.add(
            kind, _id="5", _defaults=True, **inputs, latent_image=["4", 0], seed=7, steps=10, cfg=2.5,
            sampler_name="dpmpp_2m", scheduler="simple",
        )  # fmt: skip
    decoded, model = host.values(g, Node("6"), ("1", 0))
    picture = (decoded[0] * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    shown = [image for node, image in host.previews if node == "5"]
    assert len(shown) == 10
    found = [likeness(image, picture) for image in (shown[0], shown[-1])]
    print(f"{kind}: correlation {found[0]:.3f} at the first step, {found[1]:.3f} at the last")
    assert found[1] > 0.9 and found[1] > found[0]

    # With SDXL's colors the same latents do not look like the picture.
    latent_format = host.comfy_module("comfy.latent_formats").SDXL()
    previewer = host.comfy_module("latent_preview").get_previewer("cpu", latent_format)
    samples = host.values(g, Node("5"))[0]["samples"]
    other = previewer.decode_latent_to_preview(model.model.latent_format.process_in(samples))
    assert likeness(other, picture) < found[1] - 0.1


def test_previews_of_comfyuis_own_model_are_as_ever(host):
    g = Graph()
    prompt = host.give(g, conditioning(features(1)))
    latent = g.add("HyDiTEmptyLatent", width=128, height=128, batch_size=1)
    model = host.give(g, native_model(host))
    sampled = g.add(
        "HyDiTKSampler", _defaults=True, model=model, positive=prompt, negative=prompt, latent_image=latent,
        steps=3,
    )  # fmt: skip
    host.values(g, sampled)
    assert [node for node, _ in host.previews] == [sampled.id] * 3
