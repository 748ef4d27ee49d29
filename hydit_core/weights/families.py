"""Known model families other than HunyuanDiT, so that an error can say what was given instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Shapes = Mapping[str, tuple[int, ...]]


class Family(NamedTuple):
    """What something is, with an article, and what to do with it; the advice may be empty."""

    name: str
    advice: str = ""


_LOADERS = "ComfyUI has loaders of its own for it"
_OWN = "it runs in Tencent's own program"
_WRITER = "it writes texts about pictures or prompts: run it by itself, and give its text as the prompt"
_ENCODER = "HunyuanDiT's text encoders are a BERT and an mT5"
_VAE = "HunyuanDiT's VAE is SDXL's"
CONTROLNET = "a ControlNet goes with the model that it was made for"
LORA = "a LoRA goes with the model that it was trained on"

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "unet.", "")
_NET = "controlnet_blocks.0.weight"
_MMDIT = "transformer_blocks.0.attn.add_k_proj.weight"
_VIDEO = "a HunyuanVideo model"
_CLIP = "text_model.encoder.layers.0.self_attn.q_proj.weight"

# A family, what to do with it, and in each further entry names that it has after any prefix. All of an entry
# must be there. The most distinctive come first.
_BY_NAME: tuple[tuple[Any, ...], ...] = (
    (
        "a Flux ControlNet",
        CONTROLNET,
        (_NET, "double_blocks.0.img_attn.norm.key_norm.scale"),
        ("controlnet_blocks.0.linear.weight",),
    ),
    (
        "a Qwen-Image ControlNet",
        CONTROLNET,
        (_NET, "transformer_blocks.0.img_mlp.net.0.proj.weight"),
        ("control_blocks.0.after_proj.weight",),
    ),
    ("a Flux ControlNet", CONTROLNET, (_NET, "controlnet_x_embedder.weight")),
    (
        "a Stable Diffusion 3 ControlNet",
        CONTROLNET,
        (_NET, "pos_embed_input.proj.weight"),
        (_NET, "pos_embed.pos_embed"),
    ),
    (
        _VIDEO,
        _LOADERS,
        ("txt_in.individual_token_refiner.blocks.0.norm1.weight",),
        ("context_embedder.token_refiner.refiner_blocks.0.norm1.weight",),
    ),
    ("a HunyuanImage 3.0 model", _OWN, ("patch_embed.model.0.weight", "timestep_emb.mlp.0.weight")),
    (
        "a Hunyuan3D model",
        _LOADERS,
        ("latent_in.weight", "cond_in.weight"),
        ("x_embedder.weight", "blocks.0.attn1.k_norm.weight"),  # 2.1
    ),
    (
        "a Flux model",
        _LOADERS,
        ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"),
        ("single_transformer_blocks.0.attn.to_q.weight", "context_embedder.weight"),
    ),
    (
        "a Stable Diffusion 3 model",
        _LOADERS,
        ("joint_blocks.0.context_block.attn.qkv.weight",),
        (_MMDIT, "pos_embed.pos_embed"),
    ),
    ("a Qwen-Image model", _LOADERS, (_MMDIT, "txt_norm.weight")),
    ("an AuraFlow model", _LOADERS, ("double_layers.0.attn.w1q.weight",)),
    (
        "a Lumina model",
        _LOADERS,
        ("cap_embedder.1.weight", "noise_refiner.0.attention.qkv.weight"),
        ("cap_embedder.1.weight", "layers.0.attention.wq.weight"),
    ),
    (
        "a PixArt model",
        _LOADERS,
        ("t_block.1.weight", "y_embedder.y_proj.fc1.weight"),
        ("adaln_single.linear.weight", "caption_projection.linear_1.weight"),
    ),
    ("a Wan model", _LOADERS, ("patch_embedding.weight", "blocks.0.cross_attn.norm_k.weight")),
    ("a Mochi model", _LOADERS, ("t5_yproj.weight", "blocks.0.attn.qkv_x.weight")),
    ("a class-conditional DiT", "", ("y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight")),
    ("a Stable Cascade model", _LOADERS, ("clip_txt_pooled_mapper.weight",)),
    (
        "a video model's VAE",
        _VAE,
        ("encoder.down_blocks.0.resnets.0.conv1.conv.weight",),
        ("encoder.down.0.block.0.conv1.conv.weight",),
        ("encoder.downsamples.0.residual.0.gamma",),
    ),
    (
        "a LLaVA model, as HunyuanCaptioner and DialogGen are",
        _WRITER,
        ("mm_projector.0.weight",),
        ("multi_modal_projector.linear_1.weight",),
    ),
    ("a CLIP model", _ENCODER, (_CLIP, "logit_scale")),
    ("a CLIP text encoder", _ENCODER, (_CLIP,)),
    ("a CLIP image encoder", "", ("vision_model.encoder.layers.0.self_attn.q_proj.weight",)),
    (
        "an image encoder without a projection, as CLIPVisionModel and SigLIP are",
        "",
        ("embeddings.patch_embedding.weight", "encoder.layers.0.layer_norm1.weight"),
    ),
    ("a language model", "", ("layers.0.self_attn.q_proj.weight", "embed_tokens.weight")),
)
# Parts of names, found anywhere in them.
_BY_WORD = (
    ("an IP-Adapter for Stable Diffusion", "", ".to_k_ip.weight"),
    ("an AnimateDiff motion module", "", "motion_modules."),
    ("an upscaler", "", "RRDB_trunk."),
    ("a Control-LoRA for Stable Diffusion", CONTROLNET, "lora_controlnet"),
    ("a ControlNet for Stable Diffusion", CONTROLNET, "controlnet_cond_embedding."),
    ("a ControlNet for Stable Diffusion", CONTROLNET, "input_hint_block."),
    ("a T2I-Adapter for Stable Diffusion", CONTROLNET, "body.0.block1.weight"),
    ("a T2I-Adapter for Stable Diffusion", CONTROLNET, "body.0.resnets.0.block1.weight"),
    ("a ControlNet of another model", CONTROLNET, "controlnet_blocks."),
)
_ATTENTION = (
    "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
    "input_blocks.5.1.transformer_blocks.0.attn2.to_k.weight",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight",
)
_UNETS = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    1280: "SDXL refiner",
    2048: "SDXL",
}


def other_family(shapes: Shapes) -> Family | None:
    """The known family that the tensors belong to, if any."""
    for name, advice, *entries in _BY_NAME:
        for prefix in _PREFIXES:
            if any(all(prefix + key in shapes for key in keys) for keys in entries):
                return Family(_hunyuan(shapes, prefix) if name == _VIDEO else name, advice)
    if unet := _unet(shapes):
        return unet
    return next((Family(name, advice) for name, advice, word in _BY_WORD if _anywhere(shapes, word)), None)


def _hunyuan(shapes: Shapes, prefix: str) -> str:
    """HunyuanVideo; or HunyuanImage 2.1, whose patches have no dimension of time, or its refiner."""
    names = ("img_in.proj.weight", "x_embedder.proj.weight")
    patch = next((shapes[prefix + name] for name in names if prefix + name in shapes), ())
    if len(patch) == 4:
        return "a HunyuanImage 2.1 model"
    words = ("vision_in.", "cond_type_embed", "vector_in.", "time_text_embed.text_embedder.")
    of_video = any(name.startswith(tuple(prefix + word for word in words)) for name in shapes)
    return "HunyuanImage 2.1's refiner" if patch[2:] == (1, 1, 1) and not of_video else _VIDEO


def _unet(shapes: Shapes) -> Family | None:
    for prefix in (*_PREFIXES, "control_model."):
        for name in _ATTENTION:
            if prefix + name in shapes:
                width = (0, *shapes[prefix + name])[-1]
                family = _UNETS.get(width, f"UNet with {width} context channels")
                role = _role(shapes, prefix)
                advice = CONTROLNET if role == "ControlNet" else _LOADERS
                return Family(f"{'an' if family.startswith('SDXL') else 'a'} {family} {role}", advice)
    return None


def _role(shapes: Shapes, prefix: str) -> str:
    if prefix == "control_model." or _anywhere(shapes, "zero_convs.") or _anywhere(shapes, "controlnet_down"):
        return "ControlNet"
    return "UNet" if prefix in ("", "unet.") else "checkpoint"


def _anywhere(names: Iterable[str], word: str) -> bool:
    return any(word in name for name in names)
