"""diffusers' HunyuanDiT classes with the weights of ours.

The key mapping here is written on its own, tensor by tensor, and does not use the library's layout tables: it
is the second opinion that those tables, and the model, are measured against.
"""

from __future__ import annotations

import torch
from diffusers.models.controlnets.controlnet_hunyuan import HunyuanDiT2DControlNetModel
from diffusers.models.transformers.hunyuan_transformer_2d import HunyuanDiT2DModel
from torch import Tensor

from hydit_core.model.config import DiTConfig

RENAMED = (
    ("x_embedder.", "pos_embed."),
    ("mlp_t5.0.", "text_embedder.linear_1."),
    ("mlp_t5.2.", "text_embedder.linear_2."),
    ("t_embedder.mlp.0.", "time_extra_emb.timestep_embedder.linear_1."),
    ("t_embedder.mlp.2.", "time_extra_emb.timestep_embedder.linear_2."),
    ("extra_embedder.0.", "time_extra_emb.extra_embedder.linear_1."),
    ("extra_embedder.2.", "time_extra_emb.extra_embedder.linear_2."),
    ("pooler.", "time_extra_emb.pooler."),
    ("style_embedder.", "time_extra_emb.style_embedder."),
    ("final_layer.linear.", "proj_out."),
    ("before_proj.", "input_block."),
    ("after_proj_list.", "controlnet_blocks."),
)
RENAMED_IN_BLOCK = {
    "norm1": "norm1.norm",
    "default_modulation.1": "norm1.linear",
    "norm3": "norm2",
    "norm2": "norm3",
    "attn1.q_norm": "attn1.norm_q",
    "attn1.k_norm": "attn1.norm_k",
    "attn1.out_proj": "attn1.to_out.0",
    "attn2.q_proj": "attn2.to_q",
    "attn2.q_norm": "attn2.norm_q",
    "attn2.k_norm": "attn2.norm_k",
    "attn2.out_proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "skip_norm": "skip_norm",
    "skip_linear": "skip_linear",
}


def diffusers_state_dict(tencent: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Tencent-named state dict (DiT or ControlNet) under diffusers' names."""
    out: dict[str, Tensor] = {}
    for key, value in tencent.items():
        if key.startswith("blocks."):
            _, index, rest = key.split(".", 2)
            name, kind = rest.rsplit(".", 1)
            prefix = f"blocks.{index}."
            if name == "attn1.Wqkv":
                for part, rows in zip("qkv", value.chunk(3), strict=True):
                    out[f"{prefix}attn1.to_{part}.{kind}"] = rows
            elif name == "attn2.kv_proj":
                for part, rows in zip("kv", value.chunk(2), strict=True):
                    out[f"{prefix}attn2.to_{part}.{kind}"] = rows
            else:
                out[f"{prefix}{RENAMED_IN_BLOCK[name]}.{kind}"] = value
        elif key.startswith("final_layer.adaLN_modulation.1."):
            shift, scale = value.chunk(2)
            out["norm_out.linear." + key.rsplit(".", 1)[1]] = torch.cat((scale, shift))
        else:
            for ours, theirs in RENAMED:
                if key.startswith(ours):
                    key = theirs + key[len(ours) :]
                    break
            out[key] = value
    return out


def _arguments(config: DiTConfig) -> dict:
    if (config.t5_hidden, config.pooler_heads) != (4 * config.t5_dim, 8):
        raise ValueError("diffusers fixes the mT5 projection at 4 x and the pooler at 8 heads")
    return {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "patch_size": config.patch_size,
        "hidden_size": config.hidden_size,
        "mlp_ratio": config.mlp_hidden / config.hidden_size,
        "cross_attention_dim": config.text_dim,
        "cross_attention_dim_t5": config.t5_dim,
        "pooled_projection_dim": config.pooled_dim,
        "text_len": config.text_len,
        "text_len_t5": config.t5_len,
        "use_style_cond_and_image_meta_size": config.size_cond,
    }


def diffusers_dit(config: DiTConfig, state_dict: dict[str, Tensor] | None = None) -> HunyuanDiT2DModel:
    """diffusers' transformer of these dimensions, with Tencent-named weights where given."""
    model = HunyuanDiT2DModel(
        num_layers=config.depth, learn_sigma=config.out_channels == 8, **_arguments(config)
    )
    if state_dict is not None:
        model.load_state_dict(diffusers_state_dict(state_dict), strict=True)
    return model.eval()


def diffusers_controlnet(
    config: DiTConfig, state_dict: dict[str, Tensor] | None = None
) -> HunyuanDiT2DControlNetModel:
    """diffusers' ControlNet for a DiT of these dimensions, with Tencent-named weights where given."""
    model = HunyuanDiT2DControlNetModel(transformer_num_layers=config.depth, **_arguments(config))
    if state_dict is not None:
        model.load_state_dict(diffusers_state_dict(state_dict), strict=True)
    return model.eval()
