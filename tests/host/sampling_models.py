"""Tiny HunyuanDiTs as MODELs of both kinds, their conditioning, and diffusers' pipeline on their weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_models import randomize
from torch import Tensor

from hydit_core.facts import DiffusionConfig, ModelInfo, SamplingDefaults
from hydit_core.model.config import DiTConfig
from hydit_core.model.dit import DiT
from hydit_core.model.rope import rope_table

# What ComfyUI's own class can be built with: 1024 pooled values, 8 pooler heads, 4 x mT5's width.
CONFIG = DiTConfig(
    hidden_size=64,
    depth=4,
    num_heads=4,
    mlp_hidden=256,
    text_dim=32,
    text_len=12,
    t5_dim=64,
    t5_len=16,
    t5_hidden=256,
)
CONFIG_V11 = replace(CONFIG, size_cond=True, style_cond=True)
INFO = ModelInfo("v1.2", defaults=SamplingDefaults(steps=10, width=128, height=128))


def weights(config: DiTConfig = CONFIG) -> dict[str, Tensor]:
    """Tencent-named, every tensor random, of a size that makes outputs of order one."""
    dit = DiT(config)
    randomize(dit, 3)
    return dit.state_dict()


def native_model(host: Any, config: DiTConfig = CONFIG, tensors: dict[str, Tensor] | None = None) -> Any:
    """ComfyUI's own HunyuanDiT around ``tensors`` (not copied; default :func:`weights`), patched."""
    management, patcher = (
        host.comfy_module("comfy.model_management"),
        host.comfy_module("comfy.model_patcher"),
    )
    supported = host.comfy_module("comfy.supported_models")
    dimensions = {
        "image_model": "hydit",
        "hidden_size": config.hidden_size,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_hidden / config.hidden_size,
        "text_states_dim": config.text_dim,
        "text_states_dim_t5": config.t5_dim,
        "text_len": config.text_len,
        "text_len_t5": config.t5_len,
        "size_cond": config.size_cond,
        "use_style_cond": config.style_cond,
    }
    kind = (supported.HunyuanDiT1 if config.size_cond else supported.HunyuanDiT)(dimensions)
    kind.set_inference_dtype(torch.float32, None)
    model = kind.get_model({})
    state = weights(config) if tensors is None else tensors
    model.diffusion_model.load_state_dict(state, assign=True)
    cpu = torch.device("cpu")
    model.requires_grad_(False).eval()
    return patcher.ModelPatcher(model, load_device=management.get_torch_device(), offload_device=cpu)


def our_model(host: Any, folder: Path, config: DiTConfig = CONFIG, info: ModelInfo = INFO) -> Any:
    """Our MODEL, loaded from a file with :func:`weights`."""
    from hydit_core import save_checkpoint

    if config.size_cond:
        info = replace(info, version="v1.1", diffusion=DiffusionConfig(beta_end=0.03))
    path = folder / f"tiny-{info.version}.safetensors"
    if not path.exists():
        save_checkpoint(path, dit=weights(config), info=info)
    return host.module("nodes.host.model").load_model(path)


def features(seed: int, config: DiTConfig = CONFIG, words: int = 5) -> dict[str, Tensor]:
    """Random text features of one prompt, with padding."""
    g = torch.Generator().manual_seed(seed)
    return {
        "bert": torch.randn(1, config.text_len, config.text_dim, generator=g),
        "bert_mask": (torch.arange(config.text_len) < words).long()[None],
        "t5": torch.randn(1, config.t5_len, config.t5_dim, generator=g),
        "t5_mask": (torch.arange(config.t5_len) < words + 2).long()[None],
    }


def conditioning(text: dict[str, Tensor]) -> list[Any]:
    """A CONDITIONING of :func:`features`, as the text encoders make it."""
    extra = {
        "attention_mask": text["bert_mask"],
        "conditioning_mt5xl": text["t5"],
        "attention_mask_mt5xl": text["t5_mask"],
    }
    return [[text["bert"], extra]]


def diffusers_latents(
    scheduler: Any,
    positive: dict[str, Tensor],
    negative: dict[str, Tensor],
    generator: Any,
    *,
    size: tuple[int, int] = (128, 128),
    batch: int = 1,
    cfg: float = 6.0,
    rescale: float = 0.0,
    steps: int = 10,
    config: DiTConfig = CONFIG,
) -> Tensor:
    """Latents (B, 4, h, w), scaled, of diffusers' HunyuanDiTPipeline; size is (width, height).

    Its rotary positions are replaced by ours: off-square, diffusers' are not those of the trained model.
    """
    import diffusers.pipelines.hunyuandit.pipeline_hunyuandit as module
    from diffusers import AutoencoderKL
    from parity.diffusers_models import diffusers_dit

    def positions(head_dim: int, crops: Any, grid: tuple[int, int], **_: Any) -> tuple[Tensor, Tensor]:
        return rope_table(*grid, head_dim)

    blocks = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    vae = AutoencoderKL(
        down_block_types=blocks[0], up_block_types=blocks[1], block_out_channels=(32,) * 4, latent_channels=4
    )
    pipeline = module.HunyuanDiTPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=diffusers_dit(config, weights(config)),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    names = {"bert": "embeds", "bert_mask": "attention_mask", "t5": "embeds_2", "t5_mask": "attention_mask_2"}
    texts = {
        f"{prefix}_{theirs}": text[ours].expand(batch, *text[ours].shape[1:])
        for prefix, text in (("prompt", positive), ("negative_prompt", negative))
        for ours, theirs in names.items()
    }
    original, module.get_2d_rotary_pos_embed = module.get_2d_rotary_pos_embed, positions
    try:
        return pipeline(
            width=size[0],
            height=size[1],
            num_inference_steps=steps,
            guidance_scale=cfg,
            guidance_rescale=rescale,
            generator=generator,
            original_size=(1024, 1024),
            use_resolution_binning=False,
            output_type="latent",
            **texts,
        ).images
    finally:
        module.get_2d_rotary_pos_embed = original
