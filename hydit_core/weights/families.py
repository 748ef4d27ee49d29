"""Known model families other than HunyuanDiT, so that an error can say what was given instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

Shapes = Mapping[str, tuple[int, ...]]

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "unet.", "")

# Names that a family has after any prefix, the most distinctive first. All names of a row must be there.
_BY_NAME: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a HunyuanVideo model", ("txt_in.individual_token_refiner.blocks.0.norm1.weight",)),
    ("a Hunyuan3D model", ("latent_in.weight", "cond_in.weight")),
    ("a Flux model", ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight")),
    ("a Flux model", ("single_transformer_blocks.0.attn.to_q.weight", "context_embedder.weight")),
    ("a Stable Diffusion 3 model", ("joint_blocks.0.context_block.attn.qkv.weight",)),
    ("a Stable Diffusion 3 model", ("transformer_blocks.0.attn.add_k_proj.weight", "pos_embed.pos_embed")),
    ("a Flux model", ("transformer_blocks.0.attn.add_k_proj.weight", "controlnet_x_embedder.weight")),
    ("a Qwen-Image model", ("transformer_blocks.0.attn.add_k_proj.weight", "txt_norm.weight")),
    ("an AuraFlow model", ("double_layers.0.attn.w1q.weight",)),
    ("a Lumina model", ("cap_embedder.1.weight", "noise_refiner.0.attention.qkv.weight")),
    ("a Lumina model", ("cap_embedder.1.weight", "layers.0.attention.wq.weight")),
    ("a PixArt model", ("t_block.1.weight", "y_embedder.y_proj.fc1.weight")),
    ("a PixArt model", ("adaln_single.linear.weight", "caption_projection.linear_1.weight")),
    ("a Wan model", ("patch_embedding.weight", "blocks.0.cross_attn.norm_k.weight")),
    ("a Mochi model", ("t5_yproj.weight", "blocks.0.attn.qkv_x.weight")),
    ("a class-conditional DiT", ("y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight")),
    ("a Stable Cascade model", ("clip_txt_pooled_mapper.weight",)),
    ("a CLIP model", ("text_model.encoder.layers.0.self_attn.q_proj.weight", "logit_scale")),
    ("a CLIP text encoder", ("text_model.encoder.layers.0.self_attn.q_proj.weight",)),
    ("a CLIP image encoder", ("vision_model.encoder.layers.0.self_attn.q_proj.weight",)),
    ("a language model", ("layers.0.self_attn.q_proj.weight", "embed_tokens.weight")),
)
# Parts of names, found anywhere in them.
_BY_WORD = (
    ("an IP-Adapter for Stable Diffusion", ".to_k_ip.weight"),
    ("an AnimateDiff motion module", "motion_modules."),
    ("an upscaler", "RRDB_trunk."),
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


def other_family(shapes: Shapes) -> str | None:
    """The known family that the tensors belong to, with an article; else None."""
    for family, names in _BY_NAME:
        for prefix in _PREFIXES:
            if all(prefix + name in shapes for name in names):
                net = prefix + "controlnet_blocks.0.weight" in shapes
                return family.replace(" model", " ControlNet") if net else family
    if unet := _unet(shapes):
        return unet
    return next((family for family, word in _BY_WORD if _anywhere(shapes, word)), None)


def _unet(shapes: Shapes) -> str | None:
    for prefix in (*_PREFIXES, "control_model."):
        for name in _ATTENTION:
            if prefix + name in shapes:
                width = (0, *shapes[prefix + name])[-1]
                family = _UNETS.get(width, f"UNet with {width} context channels")
                return _article(family, _role(shapes, prefix))
    return None


def _role(shapes: Shapes, prefix: str) -> str:
    if prefix == "control_model." or _anywhere(shapes, "zero_convs.") or _anywhere(shapes, "controlnet_down"):
        return "ControlNet"
    return "UNet" if prefix in ("", "unet.") else "checkpoint"


def _article(family: str, role: str) -> str:
    return f"{'an' if family.startswith('SDXL') else 'a'} {family} {role}"


def _anywhere(names: Iterable[str], word: str) -> bool:
    return any(word in name for name in names)
