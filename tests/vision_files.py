"""Tiny CLIP image encoders with random weights, as files of every layout."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection


def vision_model(
    width: int = 128, heads: int = 2, embed_dim: int = 12, activation: str = "quick_gelu", seed: int = 0
) -> CLIPVisionModelWithProjection:
    """transformers' own model, every tensor random."""
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        image_size=28,
        patch_size=7,
        projection_dim=embed_dim,
        hidden_act=activation,
    )
    model = CLIPVisionModelWithProjection(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.15 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return model


def clip_names(model: CLIPVisionModelWithProjection, *, flash: bool = False) -> dict[str, Tensor]:
    """The weights as Chinese-CLIP's code has them, below ``visual``."""
    w = model.state_dict()
    out = {
        "conv1.weight": w["vision_model.embeddings.patch_embedding.weight"],
        "class_embedding": w["vision_model.embeddings.class_embedding"],
        "positional_embedding": w["vision_model.embeddings.position_embedding.weight"],
        "proj": w["visual_projection.weight"].T.clone(),
    }
    for ending in ("weight", "bias"):
        out[f"ln_pre.{ending}"] = w[f"vision_model.pre_layrnorm.{ending}"]
        out[f"ln_post.{ending}"] = w[f"vision_model.post_layernorm.{ending}"]
        for i in range(model.config.num_hidden_layers):
            old, new = f"vision_model.encoder.layers.{i}.", f"transformer.resblocks.{i}."
            out[f"{new}ln_1.{ending}"] = w[f"{old}layer_norm1.{ending}"]
            out[f"{new}ln_2.{ending}"] = w[f"{old}layer_norm2.{ending}"]
            out[f"{new}mlp.c_fc.{ending}"] = w[f"{old}mlp.fc1.{ending}"]
            out[f"{new}mlp.c_proj.{ending}"] = w[f"{old}mlp.fc2.{ending}"]
            out[f"{new}attn.out_proj.{ending}"] = w[f"{old}self_attn.out_proj.{ending}"]
            fused = torch.cat([w[f"{old}self_attn.{x}_proj.{ending}"] for x in "qkv"])
            out[f"{new}attn.Wqkv.{ending}" if flash else f"{new}attn.in_proj_{ending}"] = fused
    return {f"visual.{name}": value for name, value in out.items()}
