"""A complete random HunyuanDiT in one small file, for tests that need all parts but no training."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import sentencepiece
import torch
from transformers import BertConfig, BertModel, MT5Config, MT5EncoderModel

from hydit_core.facts import DiffusionConfig, ModelInfo, SamplingDefaults
from hydit_core.model.config import DiTConfig
from hydit_core.model.dit import DiT
from hydit_core.weights.save import save_checkpoint
from hydit_core.weights.vae_layout import diffusers_to_ldm

TEXT = [
    "a red apple", "a green car", "two small birds on the left", "a picture of the blue heart",
    "红苹果", "一个绿色的汽车", "一张蓝色爱心的图片", "小鸟", "cat dog tree house sun moon star fish",
]  # fmt: skip

TINY = DiTConfig(
    hidden_size=64,
    depth=4,
    num_heads=4,
    mlp_hidden=128,
    text_dim=32,
    text_len=12,
    t5_dim=32,
    t5_len=16,
    t5_hidden=128,
    pooled_dim=32,
    pooler_heads=8,
)
TINY_V11 = replace(TINY, size_cond=True, style_cond=True)
DEFAULTS = SamplingDefaults(
    sampler="dpmpp_2m", spacing="linspace", steps=3, cfg=2.0, width=64, height=64, negative=""
)


def bert_vocab() -> bytes:
    """A vocab.txt of special tokens, then every character and English word of TEXT."""
    words = {word for line in TEXT for word in line.split() if word.isascii()}
    characters = {character for line in TEXT for character in line if not character.isspace()}
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words | characters)]
    return "".join(f"{piece}\n" for piece in pieces).encode()


def spiece_model() -> bytes:
    """A sentencepiece model trained on TEXT, with mT5's ids for padding (0), end (1) and unknown (2)."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 4),
        model_writer=model,
        vocab_size=90,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def randomize(module: torch.nn.Module, seed: int, std: float = 0.08) -> torch.nn.Module:
    """Random values in every parameter, those that start as zeros included; norms stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise + 1 if "norm" in name.lower() and name.endswith("weight") else noise)
    return module.eval()


def write_tiny_model(path: Path, config: DiTConfig = TINY, **changes: object) -> Path:
    """Write an all-in-one checkpoint; ``changes`` go over the ModelInfo in its metadata."""
    from diffusers import AutoencoderKL  # not inside ComfyUI, where tests take the rest of this file

    vocab, spiece = bert_vocab(), spiece_model()
    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(
            vocab_size=vocab.count(b"\n"),
            hidden_size=config.text_dim,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=config.text_len,
        ),
        add_pooling_layer=False,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=spiece).get_piece_size()
    t5 = MT5EncoderModel(
        MT5Config(vocab_size=pieces, d_model=config.t5_dim, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=4,
    )
    version = "v1.1" if config.size_cond else "v1.2"
    info = ModelInfo(
        version=version,
        pooler_heads=config.pooler_heads,
        diffusion=DiffusionConfig(beta_end=0.03 if config.size_cond else 0.018),
        defaults=DEFAULTS,
        bert={"num_attention_heads": 2},
    )
    save_checkpoint(
        path,
        dit=randomize(DiT(config), 1).state_dict(),
        bert=bert.state_dict(),
        t5=t5.state_dict(),
        vae=diffusers_to_ldm(vae.state_dict()),
        spiece_model=spiece,
        bert_vocab=vocab,
        info=replace(info, **changes),
    )
    return path
