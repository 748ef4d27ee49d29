"""ComfyUI's VAE with the weights of ours: the same pictures and latents as without ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from graphs import Graph, text_to_image
from PIL import Image
from safetensors.torch import load_file, save_file

import hydit_core
from hydit_core.embedded import embedded_model
from hydit_core.vae import load_vae as load_headless
from hydit_core.weights.vae_layout import diffusers_to_ldm, diffusers_to_taesd

LIMIT = 1e-4


def randomized(model, seed=3, std=0.05):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator) * std
            value.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return model.eval()


def kl(channels=(32, 64, 64), layers=1, groups=32, **options):
    return randomized(
        AutoencoderKL(
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            layers_per_block=layers,
            norm_num_groups=groups,
            **options,
        )
    )


def write(path: Path, tensors, prefix="vae.", **vae) -> Path:
    metadata = {"hydit.config": json.dumps({"format": 1, "version": "v1.2", "vae": vae})} if vae else None
    save_file({prefix + name: value.contiguous() for name, value in tensors.items()}, path, metadata)
    return path


def load(host, path):
    parts = host.module("hydit_core.weights.bundle").bundle(path)
    assert parts.vae is not None
    return host.module("nodes.host.vae").load_vae(parts.vae, parts.info), parts.info


def pictures(height=48, width=32):
    return torch.rand(2, height, width, 3, generator=torch.Generator().manual_seed(1))


def compare(host, path, size=(48, 32)):
    """Stock VAEEncode and VAEDecode with the VAE of a place, against the same place without ComfyUI."""
    vae, info = load(host, path)
    headless = load_headless(path)
    space = host.module("nodes.host.preview").latent_format(info)
    images = pictures(*size)
    g = Graph()
    given = host.give(g, vae)
    encoded = g.add("VAEEncode", pixels=host.give(g, images), vae=given)
    decoded = g.add("VAEDecode", samples=encoded, vae=given)
    latents, shown = host.values(g, encoded, decoded)

    expected = headless.encode_mode(images.movedim(-1, 1) * 2 - 1)
    scaled = space.process_in(latents["samples"])
    assert scaled.shape == expected.shape
    assert (scaled - expected).abs().max() <= LIMIT * expected.std()
    with torch.no_grad():
        pixels = (headless.decode(expected) / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    assert pixels.std() > 0.01  # a flat picture would prove nothing
    assert (shown - pixels).abs().max() <= LIMIT
    return vae


def test_the_embedded_models_vae(host):
    vae = compare(host, embedded_model(), (96, 128))
    assert (vae.latent_channels, vae.spacial_compression_decode()) == (4, 8)
    source = load_file(embedded_model())
    written = host.module("nodes.host.vae").stored_tensors(vae)
    expected = {name[4:]: value for name, value in source.items() if name.startswith("vae.")}
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        assert written[name].dtype == value.dtype and torch.equal(written[name], value), name


@pytest.mark.parametrize("prefix", ["vae.", "first_stage_model.", ""])
def test_other_sizes_scales_and_prefixes(host, prefix, tmp_path):
    model = kl((32, 96), layers=2)
    path = write(
        tmp_path / "vae.safetensors", diffusers_to_ldm(model.state_dict()), prefix,
        scaling_factor=0.5, shift_factor=0.25,
    )  # fmt: skip
    vae = compare(host, path)
    assert vae.spacial_compression_decode() == vae.spacial_compression_encode() == 2


def test_a_diffusers_folder(host, tmp_path):
    kl(scaling_factor=0.3).save_pretrained(tmp_path / "vae")
    assert compare(host, tmp_path).spacial_compression_encode() == 4
    compare(host, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("scale", [None, (0.13025, 0.0), (0.2, 0.3)])
def test_taesd_files(host, scale, tmp_path):
    tensors = diffusers_to_taesd(randomized(AutoencoderTiny()).state_dict())
    for name in ("vae_scale", "vae_shift"):
        del tensors[name]
    if scale:
        tensors |= {"vae_scale": torch.tensor(scale[0]), "vae_shift": torch.tensor(scale[1])}
    path = write(tmp_path / "taesd.safetensors", tensors)
    written = host.module("nodes.host.vae").stored_tensors(compare(host, path))
    assert all(torch.equal(written[name], value) for name, value in tensors.items())


def test_a_taesd_whose_latents_have_another_scale(host, tmp_path):
    """In a folder the scale is in config.json; the model's latent format then has it too."""
    tiny = randomized(AutoencoderTiny(scaling_factor=0.5, shift_factor=0.2))
    tiny.save_pretrained(tmp_path / "vae")
    vae = compare(host, tmp_path)
    # What is written goes by ComfyUI's own constant again, so that stock loaders read it.
    written = host.module("nodes.host.vae").stored_tensors(vae)
    path = write(tmp_path / "written.safetensors", written)
    again, before = load_headless(path), load_headless(tmp_path)
    assert (again.scaling_factor, again.shift_factor) == pytest.approx(
        (before.scaling_factor, before.shift_factor)
    )
    images = pictures().movedim(-1, 1) * 2 - 1
    torch.testing.assert_close(again.encode_mode(images), before.encode_mode(images))


def test_what_comfyui_cannot_run_is_refused(host, tmp_path):
    good = diffusers_to_ldm(kl().state_dict())
    cut = {name: value for name, value in good.items() if name != "decoder.mid.block_2.conv1.weight"}
    plain = {name: value for name, value in good.items() if "quant_conv" not in name}
    misfit = {**good, "decoder.conv_in.bias": torch.zeros(7)}
    small = diffusers_to_taesd(
        AutoencoderTiny(
            encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4
        ).state_dict()
    )
    cases = (
        (good, {"norm_num_groups": 8}, r"norms have 8 groups.*hydit_core.generate"),
        (diffusers_to_ldm(kl((48, 48), groups=16).state_dict()), {}, "48, 48 channels.*multiples of 32"),
        (diffusers_to_ldm(kl((64, 96)).state_dict()), {}, "multiples of the first"),
        (good, {"act_fn": "relu"}, "activation is relu.*silu"),
        (cut, {}, "incomplete: 1 tensors are missing, first decoder.mid.block_2.conv1.weight"),
        (plain, {}, "post_quant_conv.weight is missing"),
        (misfit, {}, "does not fit ComfyUI's autoencoder: size mismatch for decoder.conv_in.bias"),
        (small, {}, "does not fit ComfyUI's autoencoder: size mismatch for taesd_"),
    )
    error = host.module("hydit_core.errors").WeightsError
    for i, (tensors, options, message) in enumerate(cases):
        path = write(tmp_path / f"{i}.safetensors", tensors, **options)
        with pytest.raises(error, match=rf"{i}.safetensors.*{message}") as caught:
            load(host, path)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_published_size(host, tmp_path):
    """The SDXL VAE's dimensions, random weights in float16."""
    model = kl((128, 256, 512, 512), layers=2).half()
    path = write(tmp_path / "sdxl.safetensors", diffusers_to_ldm(model.state_dict()), "")
    assert path.stat().st_size > 160e6
    compare(host, path)


def test_a_picture_redrawn_in_the_graph_is_that_of_the_pipeline(host):
    """VAEEncode, HyDiTKSampler with denoise, VAEDecode: one seed, one picture."""
    image = pictures(128, 96)[:1].round(decimals=1).mul(255).round() / 255
    g = text_to_image("a red apple", seed=5, steps=8, sampler={"denoise": 0.5}, save=False)
    encoded = g.add("VAEEncode", pixels=host.give(g, image), vae=["1", 2])
    g.set("5", latent_image=encoded.out(0))
    (drawn,) = host.values(g, ("6", 0))
    picture = Image.fromarray((image[0] * 255).round().to(torch.uint8).numpy())
    pipe = hydit_core.load(dtype="float32")
    settings = {"steps": 8, "cfg": 6.0, "width": 96, "height": 128, "negative": ""}
    (expected,) = pipe("a red apple", seed=5, init_image=picture, strength=0.5, **settings)
    difference = (drawn[0] * 255).round() - torch.from_numpy(np.array(expected)).float()
    assert drawn.std() > 0.05 and difference.abs().max() <= 1
