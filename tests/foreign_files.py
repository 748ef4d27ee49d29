"""Files of other model families and formats: names and shapes enough to be told apart, and what each is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Shapes = dict[str, tuple[int, ...]]


def of_class(name: str, **options: object) -> Callable[[], Shapes]:
    """The names and shapes that a class of diffusers has; nothing without it or if it is older."""

    def shapes() -> Shapes:
        try:
            import diffusers
        except ImportError:  # inside ComfyUI
            return {}

        if not hasattr(diffusers, name):
            return {}
        with torch.device("meta"):
            return shapes_of(getattr(diffusers, name)(**options))

    return shapes


def shapes_of(net: nn.Module) -> Shapes:
    return {key: tuple(value.shape) for key, value in net.state_dict().items()}


def named(*names: str, prefix: str = "", width: int = 8, **shapes: tuple[int, ...]) -> Callable[[], Shapes]:
    """Some names, as those models have that diffusers does not."""
    return lambda: {prefix + key: shapes.get(key, (width, width)) for key in names}


def llava() -> Shapes:
    """As LLaVA's own program saves it, on which Tencent's HunyuanCaptioner and DialogGen are built."""
    layers = ("q_proj", "k_proj", "v_proj", "o_proj")
    names = [f"model.layers.{n}.self_attn.{layer}.weight" for n in range(2) for layer in layers]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.mm_projector.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")]
    return dict.fromkeys(names, (8, 8))


def llava_of_transformers() -> Shapes:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=28, patch_size=14), text_config=text
    )
    with torch.device("meta"):
        return shapes_of(LlavaForConditionalGeneration(config))


_ONE = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
_REFINED = "txt_in.individual_token_refiner.blocks.0.norm1.weight"
_PATCH = "img_in.proj.weight"
_NET = "controlnet_blocks.0.weight"
_VIDEO = "a HunyuanVideo model"
_IMAGE = "a HunyuanImage 2.1 model"
LLAVA = "a LLaVA model, as HunyuanCaptioner and DialogGen are"

FAMILIES: dict[str, tuple[str, Callable[[], Shapes]]] = {
    "HunyuanImage 2.1 of diffusers": (_IMAGE, of_class("HunyuanImageTransformer2DModel", **_ONE)),
    "HunyuanImage 2.1 of Tencent": (_IMAGE, named(_REFINED, _PATCH, **{_PATCH: (3584, 64, 1, 1)})),
    "HunyuanImage 2.1 in ComfyUI's file": (
        _IMAGE,
        lambda: {f"model.diffusion_model.{_REFINED}": (8,), f"model.diffusion_model.{_PATCH}": (8, 64, 1, 1)},
    ),
    "HunyuanImage 2.1's refiner": (
        "HunyuanImage 2.1's refiner",
        named(_REFINED, _PATCH, **{_PATCH: (8, 128, 1, 1, 1)}),
    ),
    "HunyuanImage 3.0": (
        "a HunyuanImage 3.0 model",
        named(
            *(
                "model.wte.weight",
                "model.layers.0.self_attn.qkv_proj.weight",
                "model.layers.0.mlp.gate.wg.weight",
            ),
            *("patch_embed.model.0.weight", "timestep_emb.mlp.0.weight", "vae.encoder.conv_in.weight"),
            *("vae.encoder.down.0.block.0.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
        ),
    ),
    "HunyuanVideo of diffusers": (_VIDEO, of_class("HunyuanVideoTransformer3DModel", **_ONE)),
    "HunyuanVideo 1.5 of diffusers": (
        _VIDEO,
        of_class("HunyuanVideo15Transformer3DModel", num_layers=1, num_refiner_layers=1),
    ),
    "HunyuanVideo of Tencent": (
        _VIDEO,
        named(_REFINED, _PATCH, "vector_in.in_layer.weight", **{_PATCH: (8, 16, 1, 2, 2)}),
    ),
    "HunyuanVideo 1.5 of Tencent": (
        _VIDEO,
        named(_REFINED, _PATCH, "vision_in.proj.0.weight", **{_PATCH: (8, 65, 1, 1, 1)}),
    ),
    "LLaVA": (LLAVA, llava),
    "LLaVA of transformers": (LLAVA, llava_of_transformers),
    "Hunyuan3D 2.0": (
        "a Hunyuan3D model",
        named("latent_in.weight", "cond_in.weight", "double_blocks.0.img_attn.qkv.weight", prefix="model."),
    ),
    "Hunyuan3D 2.1": (
        "a Hunyuan3D model",
        named(
            "x_embedder.weight", "t_embedder.mlp.2.weight", "blocks.0.attn1.k_norm.weight", prefix="model."
        ),
    ),
    "a ControlNet of SDXL": (
        "an SDXL ControlNet",
        of_class(
            "ControlNetModel",
            cross_attention_dim=2048,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            block_out_channels=(32, 64, 64),
        ),
    ),
    "a small ControlNet of SDXL, without attention": (
        "a ControlNet for Stable Diffusion",
        of_class("ControlNetModel", down_block_types=("DownBlock2D",), block_out_channels=(32,)),
    ),
    "a ControlNet of Flux": (
        "a Flux ControlNet",
        of_class("FluxControlNetModel", num_layers=1, num_single_layers=1),
    ),
    "XLabs' ControlNet of Flux": (
        "a Flux ControlNet",
        named(_NET, "double_blocks.0.img_attn.norm.key_norm.scale", "input_hint_block.0.weight"),
    ),
    "MistoLine of Flux": ("a Flux ControlNet", named("controlnet_blocks.0.linear.weight")),
    "a ControlNet of SD3": ("a Stable Diffusion 3 ControlNet", of_class("SD3ControlNetModel", num_layers=1)),
    "Stability's ControlNet of SD3.5": (
        "a Stable Diffusion 3 ControlNet",
        named(_NET, "pos_embed_input.proj.weight", "transformer_blocks.0.adaLN_modulation.1.bias"),
    ),
    "a ControlNet of Qwen-Image": (
        "a Qwen-Image ControlNet",
        of_class("QwenImageControlNetModel", num_layers=1, num_attention_heads=2),
    ),
    "a ControlNet of a model to come": ("a ControlNet of another model", named(_NET, "new.0.weight")),
    "Control-LoRA": (
        "a Control-LoRA for Stable Diffusion",
        named("lora_controlnet", "input_blocks.1.0.in_layers.2.up"),
    ),
    "T2I-Adapter": ("a T2I-Adapter for Stable Diffusion", of_class("T2IAdapter", channels=(16,))),
    "the VAE of HunyuanVideo": (
        "a video model's VAE",
        of_class("AutoencoderKLHunyuanVideo", block_out_channels=(32, 32, 32, 32)),
    ),
}


FORMATS = {
    "a GGUF file": ("model.gguf", b"GGUF\x03\0\0\0"),
    "an engine of TensorRT": ("model_onnx.plan", b"ftrt\0\0\0\0"),
    "an engine of TensorRT,": ("unet.engine", b"ptrt\0\0\0\0"),
    "an ONNX graph": ("model.onnx", b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:"),
}
