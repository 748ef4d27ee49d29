"""What users of the VAE rely on: scales, seeds, tiles, metadata, and errors that say what is wrong."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import save_file
from tiny import randomize

from hydit_core.errors import HyditError, WeightsError
from hydit_core.facts import ModelInfo
from hydit_core.vae import VAE, load_vae
from hydit_core.weights.vae_layout import diffusers_to_ldm


def kl(groups: int = 16, channels: tuple[int, ...] = (16, 16, 32, 32)) -> AutoencoderKL:
    model = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        norm_num_groups=groups,
    )
    return randomize(model, 5, std=0.1)


def ldm(model: AutoencoderKL) -> dict[str, torch.Tensor]:
    return {
        f"vae.{name}": tensor.contiguous() for name, tensor in diffusers_to_ldm(model.state_dict()).items()
    }


def write(path: Path, tensors: dict[str, torch.Tensor], **vae: Any) -> Path:
    metadata = {"hydit.config": json.dumps({"format": 1, "version": "v1.2", "vae": vae})} if vae else None
    save_file(tensors, path, metadata=metadata)
    return path


def test_metadata_tells_what_shapes_do_not(tmp_path: Path) -> None:
    rgb = [[0.1, 0.2, 0.3]] * 4
    path = write(
        tmp_path / "a.safetensors", ldm(kl()), norm_num_groups=16, scaling_factor=0.5, preview_rgb=rgb
    )
    vae = load_vae(path)
    assert (vae.scaling_factor, vae.preview_rgb, vae.downscale, vae.latent_channels) == (0.5, rgb, 8, 4)
    assert vae.model.config.norm_num_groups == 16
    assert load_vae(tmp_path).scaling_factor == 0.5  # the one file of a folder
    given = load_vae(path, info=ModelInfo("v1.2", vae={"norm_num_groups": 8}))
    assert (given.scaling_factor, given.model.config.norm_num_groups) == (0.13025, 8)


def test_a_config_beside_a_diffusers_file_is_read(tmp_path: Path) -> None:
    kl(groups=8).save_pretrained(tmp_path)
    vae = load_vae(tmp_path / "diffusion_pytorch_model.safetensors")
    assert (vae.model.config.norm_num_groups, vae.scaling_factor) == (8, 0.18215)


def test_loaded_weights_are_frozen_and_have_the_asked_dtype() -> None:
    vae = load_vae(ldm(kl()), dtype=torch.bfloat16, info=ModelInfo("v1.2", vae={"norm_num_groups": 16}))
    assert {p.dtype for p in vae.parameters()} == {torch.bfloat16} == {vae.dtype}
    assert not any(p.requires_grad for p in vae.parameters()) and not vae.training
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    latents = vae.encode_mode(images)
    assert latents.dtype == torch.float32 == vae.decode(latents).dtype


def test_scale_and_shift_are_undone_by_decode() -> None:
    model = kl()
    plain = VAE(model, scaling_factor=1.0)
    scaled = VAE(model, scaling_factor=0.25, shift_factor=0.75)
    moments = plain.encode_moments(torch.rand(1, 3, 16, 24) * 2 - 1)
    torch.testing.assert_close(scaled.mode(moments), (plain.mode(moments) - 0.75) * 0.25)
    torch.testing.assert_close(scaled.decode(scaled.mode(moments)), plain.decode(plain.mode(moments)))


def test_samples_follow_the_generator_and_the_variance() -> None:
    vae = VAE(kl(), scaling_factor=2.0)
    moments = torch.zeros(1, 8, 64, 64)
    moments[:, :4], moments[:, 4:] = 3.0, 2 * torch.log(torch.tensor(0.5))
    first = vae.sample(moments, torch.Generator().manual_seed(1))
    again = vae.sample(moments, torch.Generator().manual_seed(1))
    other = vae.sample(moments, torch.Generator().manual_seed(2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert abs(first.mean() - 6.0) < 0.03 and abs(first.std() - 1.0) < 0.03


@pytest.mark.parametrize("size", [(40, 40), (16, 40), (37, 53)])
def test_tiles_join_without_seams(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    tiny = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    vae = VAE(tiny.requires_grad_(False), scaling_factor=1.0)
    latents = torch.randn(1, 4, *size)
    whole = vae.decode(latents)
    tiled = vae.decode(latents, tile=16, overlap=8)
    assert tiled.shape == whole.shape == (1, 3, size[0] * 8, size[1] * 8)
    # Convolutions only: tiles differ from the whole near their borders, and there they fade out.
    assert (tiled - whole).abs().max() < 0.1 * whole.std()
    # Without blending the same tiles leave seams.
    seams = vae.decode(latents, tile=16, overlap=0)
    assert (seams - whole).abs().max() > 3 * (tiled - whole).abs().max()
    assert torch.equal(vae.decode(latents, tile=64), whole)


def test_tiles_of_a_normalizing_decoder_stay_close() -> None:
    torch.manual_seed(0)
    vae = VAE(kl().requires_grad_(False))
    latents = torch.randn(1, 4, 32, 32) * 0.13
    whole, tiled = vae.decode(latents), vae.decode(latents, tile=24)
    assert (tiled - whole).abs().mean() < 0.1 * whole.std()


def test_a_picture_that_does_not_fit_into_memory_is_decoded_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = VAE(kl().requires_grad_(False))
    latents = torch.randn(1, 4, 8, 72) * 0.13
    expected = vae.decode(latents, tile=64)
    decode = vae.model.decode

    def small_only(z: torch.Tensor) -> Any:
        if z.shape[-1] > 64:
            raise torch.OutOfMemoryError("out of memory")
        return decode(z)

    monkeypatch.setattr(vae.model, "decode", small_only)
    with pytest.warns(UserWarning, match="not enough memory"):
        assert torch.equal(vae.decode(latents), expected)


def test_what_the_failed_attempt_held_is_free_before_tiles_are_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vae = VAE(kl().requires_grad_(False))
    decode = vae.model.decode
    held: list[weakref.ref[torch.Tensor]] = []

    def large_fails(z: torch.Tensor) -> Any:
        if z.shape[-1] > 64:
            intermediate = torch.zeros(3)
            held.append(weakref.ref(intermediate))
            raise torch.OutOfMemoryError("out of memory")
        assert held[0]() is None
        return decode(z)

    monkeypatch.setattr(vae.model, "decode", large_fails)
    with pytest.warns(UserWarning, match="not enough memory"):
        vae.decode(torch.randn(1, 4, 8, 72) * 0.13)


def test_float16_overflow_is_seen_and_cured() -> None:
    model = kl()
    with torch.no_grad():
        model.decoder.conv_in.weight.mul_(3e5)  # finite in float16, its products are not
    model.decoder.conv_in.weight.data.clamp_(-6e4, 6e4)
    latents = torch.randn(1, 4, 4, 4)
    vae = VAE(model.requires_grad_(False).half())
    with pytest.warns(UserWarning, match="overflowed in float16"):
        images = vae.decode(latents)
    assert torch.isfinite(images).all() and vae.dtype == torch.float32


def expect_error(match: str, run: Any, error: type[HyditError] = WeightsError) -> None:
    with pytest.raises(error, match=match):
        run()


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    good = ldm(kl())
    info = ModelInfo("v1.2", vae={"norm_num_groups": 16})

    def load(tensors: dict[str, torch.Tensor], name: str) -> Any:
        path = write(tmp_path / f"{name}.safetensors", tensors)
        return lambda: load_vae(path, info=info)

    path = tmp_path / "odd.safetensors"
    save_file(good, path, metadata={"hydit.config": "{"})
    expect_error(r"odd.safetensors: metadata .* is not valid JSON", lambda: load_vae(path))
    only_dit = {"x_embedder.proj.weight": torch.zeros(8, 4, 2, 2)}
    expect_error(r"dit.safetensors: no VAE found.*not a weights file of a kind", load(only_dit, "dit"))
    expect_error(r"no VAE found.*x_embedder.proj.weight", lambda: load_vae(only_dit))
    cut = {k: v for k, v in good.items() if k != "vae.decoder.mid.block_2.conv1.weight"}
    expect_error("cut.safetensors.*mid_block.resnets.1.conv1.weight is missing", load(cut, "cut"))
    extra = {**good, "vae.encoder.down.1.attn.0.q.weight": torch.zeros(16, 16, 1, 1)}
    expect_error(re.escape("encoder.down.1.attn.0.q.weight"), load(extra, "extra"))
    misfit = {**good, "vae.decoder.conv_in.bias": torch.zeros(7)}
    expect_error(r"conv_in.bias has shape \(7,\) instead of \(32,\)", load(misfit, "misfit"))
    path = write(tmp_path / "groups.safetensors", good)
    expect_error("16 channels.*32 norm groups.*norm_num_groups", lambda: load_vae(path))
    folder = tmp_path / "folder"
    folder.mkdir()
    expect_error("folder holds no VAE.*vae, sdxl-vae-fp16-fix", lambda: load_vae(folder))
    (folder / "vae").mkdir()
    kl().save_pretrained(folder / "vae")
    (folder / "vae" / "config.json").write_text("{", encoding="utf-8")
    expect_error("config.json is not valid JSON", lambda: load_vae(folder))
    no_encoder = {"taesd_decoder.1.weight": torch.zeros(8, 4, 3, 3)}
    expect_error("no complete encoder", load(no_encoder, "tiny"))
    assert load_vae(write(tmp_path / "ok.safetensors", good), info=info).downscale == 8


def test_wrong_inputs_are_refused() -> None:
    vae = VAE(kl())
    expect_error("20x16.*multiples of 8", lambda: vae.encode_moments(torch.zeros(1, 3, 16, 20)), HyditError)
    expect_error("got .1, 16, 8, 8", lambda: vae.decode(torch.zeros(1, 16, 8, 8)), HyditError)
    latents = torch.zeros(1, 4, 20, 20)
    expect_error("cannot overlap by 16", lambda: vae.decode(latents, tile=16, overlap=16), HyditError)
