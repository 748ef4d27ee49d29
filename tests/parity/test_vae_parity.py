"""VAE key maps and results against diffusers' own conversion and classes, and against TAESD's layer list."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import save_file
from tiny import randomize
from torch import nn

from hydit_core.vae import load_vae
from hydit_core.weights import vae_layout

SDXL = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
EMBEDDED = {"block_out_channels": (64, 64, 64, 64), "layers_per_block": 1}
UNEVEN = {"block_out_channels": (32, 64, 32), "layers_per_block": 3, "norm_num_groups": 16}


def autoencoder(block_out_channels: tuple[int, ...], **options: object) -> AutoencoderKL:
    levels = len(block_out_channels)
    return AutoencoderKL(
        block_out_channels=block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        scaling_factor=0.13025,
        **options,
    )


def random_autoencoder(**options: object) -> AutoencoderKL:
    return randomize(autoencoder(**options), 3, std=0.1)


@pytest.mark.parametrize("options", [SDXL, EMBEDDED, UNEVEN])
def test_ldm_names_are_those_that_diffusers_reads(options: dict) -> None:
    with torch.device("meta"):  # names and shapes of the full size, without its memory
        model = autoencoder(**options)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    ldm = vae_layout.diffusers_to_ldm(model.state_dict())
    read = convert_ldm_vae_checkpoint(dict(ldm), model.config)
    assert {name: tensor.shape for name, tensor in read.items()} == expected
    assert ldm["encoder.mid.attn_1.q.weight"].shape[2:] == (1, 1)
    back = vae_layout.ldm_to_diffusers(ldm)
    assert {name: tensor.shape for name, tensor in back.items()} == expected
    config = vae_layout.kl_config(
        back, lambda name: tuple(back[name].shape), norm_num_groups=options.get("norm_num_groups", 32)
    )
    assert tuple(config["block_out_channels"]) == options["block_out_channels"]
    assert config["layers_per_block"] == options["layers_per_block"]


@pytest.mark.parametrize("options", [EMBEDDED, UNEVEN])
def test_every_value_lands_where_diffusers_puts_it(options: dict) -> None:
    state = random_autoencoder(**options).state_dict()
    ldm = vae_layout.diffusers_to_ldm(state)
    theirs = convert_ldm_vae_checkpoint(dict(ldm), autoencoder(**options).config)
    ours = vae_layout.ldm_to_diffusers(ldm)
    for name, value in state.items():
        assert torch.equal(theirs[name], value), name
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_ldm_file_and_folder_give_the_results_of_diffusers(prefix: str, tmp_path: Path) -> None:
    model = random_autoencoder(**EMBEDDED)
    tensors = {prefix + k: v.contiguous() for k, v in vae_layout.diffusers_to_ldm(model.state_dict()).items()}
    if prefix:  # what stands beside the VAE in an all-in-one or in an old training checkpoint
        tensors[f"{prefix}loss.logvar"] = torch.zeros(1)
        tensors["model.diffusion_model.x_embedder.proj.weight"] = torch.zeros(8, 4, 2, 2)
    save_file(tensors, tmp_path / "vae.safetensors")
    model.save_pretrained(tmp_path / "pipeline" / "vae")
    images = torch.rand(2, 3, 40, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        distribution = model.encode(images).latent_dist
        latents = distribution.mode() * 0.13025
        decoded = model.decode(latents / 0.13025).sample
    drawn = distribution.sample(torch.Generator().manual_seed(7)) * 0.13025
    for path in (tmp_path / "vae.safetensors", tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        vae = load_vae(path)
        moments = vae.encode_moments(images)
        assert torch.equal(moments, distribution.parameters)
        assert torch.equal(vae.mode(moments), latents)
        assert torch.equal(vae.encode_mode(images), latents)
        assert torch.equal(vae.sample(moments, torch.Generator().manual_seed(7)), drawn)
        assert torch.equal(vae.decode(latents), decoded)
        assert torch.equal(load_vae(vae.checkpoint_tensors()).decode(latents), decoded)


def test_deprecated_attention_names_of_old_diffusers_files(tmp_path: Path) -> None:
    model = random_autoencoder(**EMBEDDED)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in model.state_dict().items():
        for new, former in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        tensors[name] = value.contiguous()
    assert "encoder.mid_block.attentions.0.query.weight" in tensors
    save_file(tensors, tmp_path / "old.safetensors")
    loaded = load_vae(tmp_path / "old.safetensors").model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


class Block(nn.Module):
    """A residual block of TAESD."""

    def __init__(self, n: int) -> None:
        super().__init__()
        layers = [layer for _ in range(3) for layer in (nn.Conv2d(n, n, 3, padding=1), nn.ReLU())]
        self.conv = nn.Sequential(*layers[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * torch.tanh(x / 3)


def taesd(width: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder and decoder of TAESD (Ollin Boer Bohan, madebyollin/taesd), layer by layer."""
    encoder: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), Block(width)]
    for _ in range(3):
        encoder += [nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False)]
        encoder += [Block(width) for _ in range(3)]
    encoder += [nn.Conv2d(width, 4, 3, padding=1)]
    decoder: list[nn.Module] = [Clamp(), nn.Conv2d(4, width, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        decoder += [Block(width) for _ in range(3)]
        decoder += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
    decoder += [Block(width), nn.Conv2d(width, 3, 3, padding=1)]
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


@pytest.mark.parametrize("scale", [None, (0.13025, 0.0), (0.2, 0.3)])
def test_taesd_file_matches_the_architecture(scale: tuple[float, float] | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder, decoder = taesd(24)
    tensors = {f"taesd_encoder.{k}": v for k, v in encoder.state_dict().items()}
    tensors |= {f"taesd_decoder.{k}": v for k, v in decoder.state_dict().items()}
    vae_scale, vae_shift = scale or (0.13025, 0.0)
    if scale:
        tensors |= {"vae_scale": torch.tensor(vae_scale), "vae_shift": torch.tensor(vae_shift)}
    save_file({f"vae.{k}": v for k, v in tensors.items()}, tmp_path / "tiny.safetensors")
    vae = load_vae(tmp_path / "tiny.safetensors")
    images = torch.rand(1, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        z = encoder(images / 2 + 0.5)
        # ComfyUI's unscaled latents are z / vae_scale + vae_shift; times 0.13025 they are the model's.
        latents = (z / vae_scale + vae_shift) * 0.13025
        decoded = decoder((latents / 0.13025 - vae_shift) * vae_scale) * 2 - 1
    torch.testing.assert_close(vae.encode_mode(images), latents, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vae.decode(latents), decoded, rtol=1e-5, atol=1e-6)
    # Written again, it is the same for us and for ComfyUI.
    written = vae.checkpoint_tensors()
    assert float(written["vae_scale"]) == pytest.approx(vae_scale)
    assert float(written["vae_shift"]) == pytest.approx(vae_shift)
    torch.testing.assert_close(load_vae(written).decode(latents), decoded, rtol=1e-5, atol=1e-6)
    # No variance: a sample is the mode.
    moments = vae.encode_moments(images)
    torch.testing.assert_close(vae.sample(moments), latents, rtol=1e-5, atol=2e-6)


def test_autoencoder_tiny_folder_and_names_both_ways(tmp_path: Path) -> None:
    model = AutoencoderTiny(encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4)
    model.save_pretrained(tmp_path)
    names = vae_layout.diffusers_to_taesd(model.state_dict())
    _, decoder = taesd(16)
    assert {f"taesd_decoder.{k}" for k in decoder.state_dict()} == {
        k for k in names if k.startswith("taesd_decoder")
    }
    back = vae_layout.taesd_to_diffusers(names)
    assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())
    latents = torch.randn(1, 4, 6, 5)
    with torch.no_grad():
        expected = model.decode(latents).sample
    assert torch.equal(load_vae(tmp_path).decode(latents), expected)
    assert torch.equal(load_vae(names).decode(latents), expected)
