"""A pipeline of networks in the published sizes without their files: every weight is one small number."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import BertConfig, BertModel, MT5Config, MT5EncoderModel

from hydit_core.facts import ModelInfo, SamplingDefaults
from hydit_core.model.config import DiTConfig
from hydit_core.model.dit import DiT
from hydit_core.pipeline import Pipeline
from hydit_core.text.features import TextFeatures
from hydit_core.vae import VAE

DTYPE = torch.bfloat16


class Encoders(nn.Module):
    """BERT and mT5's encoder without tokenizers: every text is the same tokens."""

    def __init__(self, config: DiTConfig, *, full: bool) -> None:
        super().__init__()
        bert = {"num_hidden_layers": 24 if full else 2, "num_attention_heads": config.text_dim // 64}
        self.bert = BertModel(
            BertConfig(
                vocab_size=47020 if full else 100,
                hidden_size=config.text_dim,
                intermediate_size=4 * config.text_dim,
                **bert,
            ),
            add_pooling_layer=False,
        )
        layers, heads = (24, 32) if full else (2, 2)
        self.t5 = MT5EncoderModel(
            MT5Config(
                vocab_size=250112 if full else 100,
                d_model=config.t5_dim,
                d_ff=config.t5_dim * 5 // 2,
                num_layers=layers,
                num_heads=heads,
                d_kv=64,
            )
        )
        self.lengths = config.text_len, config.t5_len
        self.dtype = DTYPE

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextFeatures:
        device = self.bert.embeddings.LayerNorm.weight.device
        parts: list[torch.Tensor] = []
        for network, length in zip((self.bert, self.t5), self.lengths, strict=True):
            ids = torch.ones(len(prompts), length, dtype=torch.long, device=device)
            mask = torch.ones_like(ids)
            parts += [network(input_ids=ids, attention_mask=mask).last_hidden_state, mask]
        return TextFeatures(*parts)


def settings(size: int) -> SamplingDefaults:
    """Two steps with guidance."""
    return SamplingDefaults(
        sampler="dpmpp_2m", spacing="linspace", steps=2, cfg=5.0, width=size, height=size, negative=""
    )


def sdxl_vae(*, full: bool) -> AutoencoderKL:
    """SDXL's autoencoder, or a thin one of the same architecture."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512) if full else (32, 32, 32, 32),
        layers_per_block=2,
        latent_channels=4,
    )


def pipeline(config: DiTConfig, device: torch.device, *, full: bool) -> Pipeline:
    """BERT of 24 layers, mT5-XL's encoder, SDXL's VAE and a DiT; if not full, small ones of two layers."""
    with torch.device("meta"):
        vae = sdxl_vae(full=full)
        text: Any = Encoders(config, full=full)
        networks: tuple[Any, ...] = (DiT(config), text, VAE(vae))
    for network in networks:
        network.to(DTYPE).requires_grad_(False).eval()
        if device.type != "meta":
            network.to_empty(device=device)
            for tensor in network.parameters():
                tensor.fill_(1e-3)
    if device.type != "meta":
        text.t5.tie_weights()
        positions = torch.arange(text.bert.config.max_position_embeddings, device=device).expand(1, -1)
        text.bert.embeddings.position_ids = positions
        text.bert.embeddings.token_type_ids = torch.zeros_like(positions)
    dit, encoders, autoencoder = networks
    return Pipeline(dit, encoders, autoencoder, ModelInfo.published(config.version))
