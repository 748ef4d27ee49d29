"""The JSON files of a diffusers folder, with diffusers' own field names."""

from __future__ import annotations

import math
from typing import Any

from ..errors import WeightsError
from ..facts import ModelInfo
from ..model.config import DiTConfig


def transformer_config(config: DiTConfig, info: ModelInfo) -> dict[str, Any]:
    """``config.json`` of a HunyuanDiT2DModel.

    Raises:
        WeightsError: if diffusers' class cannot have these dimensions.
    """
    return {
        "_class_name": "HunyuanDiT2DModel",
        "num_layers": config.depth,
        "learn_sigma": config.out_channels == 2 * config.in_channels,
        "norm_type": "layer_norm",
        **_shared(config, info),
    }


def controlnet_config(config: DiTConfig, info: ModelInfo) -> dict[str, Any]:
    """``config.json`` of a HunyuanDiT2DControlNetModel; raises like :func:`transformer_config`."""
    return {
        "_class_name": "HunyuanDiT2DControlNetModel",
        "conditioning_channels": 3,
        "transformer_num_layers": config.depth,
        **_shared(config, info),
    }


def scheduler_config(info: ModelInfo) -> dict[str, Any]:
    """``scheduler_config.json`` of the DDPMScheduler that HunyuanDiTPipeline samples with."""
    diffusion = info.diffusion
    prediction = "v_prediction" if diffusion.prediction == "v" else diffusion.prediction
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": diffusion.num_train_timesteps,
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction,
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "clip_sample": False,
        "variance_type": "fixed_small",
    }


def _shared(config: DiTConfig, info: ModelInfo) -> dict[str, Any]:
    _check(config)
    return {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "patch_size": config.patch_size,
        "activation_fn": "gelu-approximate",
        "sample_size": max(info.defaults.height, info.defaults.width) // 8,
        "hidden_size": config.hidden_size,
        "mlp_ratio": _mlp_ratio(config),
        "cross_attention_dim": config.text_dim,
        "cross_attention_dim_t5": config.t5_dim,
        "pooled_projection_dim": config.pooled_dim,
        "text_len": config.text_len,
        "text_len_t5": config.t5_len,
        "use_style_cond_and_image_meta_size": config.size_cond,
    }


def _mlp_ratio(config: DiTConfig) -> float:
    """The ratio that diffusers' ``int(hidden * ratio)`` turns back into the width of the MLP."""
    if int(config.hidden_size * 4.3637) == config.mlp_hidden:
        return 4.3637  # DiT-g/2, as published
    ratio = config.mlp_hidden / config.hidden_size
    return ratio if int(config.hidden_size * ratio) == config.mlp_hidden else math.nextafter(ratio, math.inf)


def _check(config: DiTConfig) -> None:
    fixed = (
        ("the mT5 projection is not 4 times as wide as mT5", config.t5_hidden == 4 * config.t5_dim),
        ("the pooler does not have 8 heads", config.pooler_heads == 8),
        ("it has only one of size and style condition", config.size_cond == config.style_cond),
        (
            "its output channels are neither those of the input nor twice those",
            config.out_channels in (config.in_channels, 2 * config.in_channels),
        ),
        ("its rotary base grid is not 32", config.rope_base == 32),
    )
    problems = [text for text, right in fixed if not right]
    if problems:
        raise WeightsError(
            f"diffusers' HunyuanDiT classes cannot hold this model: {'; '.join(problems)};"
            " use the layout tencent or comfy"
        )
