"""What a run writes of the networks that it did not train opens as it was read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import save_file
from tiny import TINY, bert_vocab, randomize, spiece_model

from hydit_core.facts import ModelInfo
from hydit_core.model.dit import DiT
from hydit_core.text.encoders import TextEncoders
from hydit_core.train.networks import ModelParts
from hydit_core.train.parts import _vae_info
from hydit_core.vae import VAE, load_vae
from hydit_core.weights.vae_layout import diffusers_to_taesd


@pytest.mark.parametrize("scale", [(0.13025, 0.0), (0.2, 0.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_taesd_keeps_its_scale(scale: tuple[float, float], dtype: torch.dtype, tmp_path: Path) -> None:
    model = AutoencoderTiny(encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4)
    tensors = diffusers_to_taesd(randomize(model, 3).state_dict(), vae_scale=scale[0], vae_shift=scale[1])
    save_file(tensors, tmp_path / "taesd.safetensors")
    vae = load_vae(tmp_path / "taesd.safetensors")
    bert = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    t5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    text = TextEncoders.build(bert, t5, bert_vocab(), spiece_model(), 12, 16)
    networks = ModelParts(DiT(TINY), text, vae, ModelInfo.published("v1.2"))

    networks.save(tmp_path / "all.safetensors", dtype=dtype, all_in_one=True, extra={})

    written = load_vae(tmp_path / "all.safetensors")
    assert written.scaling_factor == pytest.approx(vae.scaling_factor, rel=1e-6)
    assert written.shift_factor == pytest.approx(vae.shift_factor, rel=1e-6)


def test_nothing_of_a_replaced_vae_is_written() -> None:
    before = ModelInfo("v1.2", vae={"shift_factor": 0.5, "preview_rgb": [[0.0] * 3] * 4, "note": "kept"})
    model = AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, act_fn="relu")
    found = _vae_info(VAE(model, scaling_factor=0.3), before)
    assert found == {"scaling_factor": 0.3, "norm_num_groups": 8, "act_fn": "relu", "note": "kept"}
