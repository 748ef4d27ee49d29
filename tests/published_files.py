"""Files as people have them, with random weights: names, types and containers are those of their makers.

Every writer of :data:`KINDS` puts one into an empty folder and says what must be read from it, by formulas
of its own.
"""

from __future__ import annotations

import argparse
import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from published_loras import diffsynth, kohya, lycoris, t2itrainer, tencents_lora
from published_parts import Kind, Tensors, Written, encoders, write_json, write_shards
from safetensors.torch import save_file
from tiny import TINY, TINY_V11, bert_vocab, randomize, spiece_model
from vision_files import clip_names, vision_model

from hydit_core.embedded import embedded_model
from hydit_core.model.controlnet import ControlNet
from hydit_core.model.dit import DiT
from hydit_core.model.ip_adapter import IPAdapter, IPAdapterConfig
from hydit_core.weights.bundle import bundle
from hydit_core.weights.layouts import from_tencent

# What DeepSpeed's training of HunyuanDiT pickles beside the weights.
BESIDE = {
    "args": argparse.Namespace(model="DiT-g/2", image_size=(1024, 1024), ema_dtype="fp32", log=Path("log")),
    "param_shapes": [OrderedDict(a=torch.Size([3, 4]))],
    "frozen": {"x_embedder", "t_embedder"},
    "buffer_names": [],
    "optimizer": None,
    "lr_scheduler": None,
    "global_steps": 5000,
    "dp_world_size": 8,
}


# -- models --------------------------------------------------------------------------------------------------


@functools.cache
def dit(old: bool = False) -> Tensors:
    """A DiT's weights in half precision; ``old``: of v1.1."""
    config = TINY_V11 if old else TINY
    return {key: value.half() for key, value in randomize(DiT(config), 11).state_dict().items()}


def one_set(name: str, old: bool = False) -> Callable[[Path], Written]:
    """Tencent's own files: a plain state dict, and what it is in its name."""

    def write(folder: Path) -> Written:
        torch.save(dit(old), folder / name)
        return Written(folder / name, dit(old))

    return write


def deepspeed(folder: Path) -> Written:
    """Laxhar's: v1.1, as DeepSpeed leaves it, the average in float32."""
    ema = {key: value.float() + 0.01 for key, value in dit(old=True).items()}
    path = folder / "mp_rank_00_model_states.pt"
    torch.save({"module": dit(old=True), "ema": ema, **BESIDE}, path)
    return Written(path, ema)


def all_in_one(folder: Path) -> Written:
    """Freeway Animation: v1.1 in ComfyUI's layout, which says nothing of itself and lacks a vocabulary."""
    wide = replace(TINY_V11, text_dim=64)  # BERT's heads are 64 wide where nothing else is said
    own = {key: value.half() for key, value in randomize(DiT(wide), 14).state_dict().items()}
    bert, mt5 = encoders(wide.text_dim)
    whole = {f"model.diffusion_model.{key}": value for key, value in own.items()}
    whole |= {f"text_encoders.hydit_clip.transformer.bert.{key}": value for key, value in bert.items()}
    whole |= {f"text_encoders.mt5xl.transformer.{key}": value for key, value in mt5.items()}
    whole |= {f"text_encoders.{name}.logit_scale": torch.ones(()) for name in ("hydit_clip", "mt5xl")}
    whole |= {f"vae.{key}": value for key, value in vae().items()}
    whole = {key: value.half() for key, value in whole.items()}
    whole["text_encoders.mt5xl.spiece_model"] = torch.frombuffer(bytearray(spiece_model()), dtype=torch.uint8)
    path = folder / "freewayAnimation_hunyuanDit11.safetensors"
    save_file(whole, path)
    (folder / "vocab.txt").write_bytes(bert_vocab())
    return Written(path, own, complete=True)


def tencents_folder(folder: Path) -> Written:
    """HunyuanDiT-v1.2 as Tencent has it, with a large text encoder in shards."""
    root = folder / "HunyuanDiT-v1.2" / "t2i"
    (root / "model").mkdir(parents=True)
    other = {key: value + 1 for key, value in dit().items()}
    torch.save(dit(), root / "model" / "pytorch_model_ema.pt")
    torch.save(other, root / "model" / "pytorch_model_module.pt")
    write_encoders(root, "clip_text_encoder", "mt5", shards=True, tokenizers=("tokenizer", "mt5"))
    write_vae(root / "sdxl-vae-fp16-fix")
    return Written(root.parent, dit(), complete=True)


def diffusers_folder(name: str, old: bool = False) -> Callable[[Path], Written]:
    """A pipeline of diffusers, the transformer and mT5 in shards."""

    def write(folder: Path) -> Written:
        root = folder / name
        (root / "transformer").mkdir(parents=True)
        write_shards(
            {key: value.contiguous() for key, value in dict(from_tencent(dit(old), "diffusers")).items()},
            root / "transformer" / "diffusion_pytorch_model.safetensors",
        )
        write_json(root / "transformer" / "config.json", {"_class_name": "HunyuanDiT2DModel"})
        write_json(root / "model_index.json", {"_class_name": "HunyuanDiTPipeline"})
        scheduler = {"_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear", "steps_offset": 1}
        scheduler |= {"beta_start": 0.00085, "beta_end": 0.03 if old else 0.018, "clip_sample": False}
        write_json(root / "scheduler" / "scheduler_config.json", scheduler)
        write_encoders(
            root, "text_encoder", "text_encoder_2", shards=True, tokenizers=("tokenizer", "tokenizer_2")
        )
        write_vae(root / "vae")
        return Written(root, dit(old), complete=True)

    return write


def write_encoders(root: Path, bert: str, mt5: str, *, shards: bool, tokenizers: tuple[str, str]) -> None:
    """The folders of both text encoders and their tokenizers, as transformers writes them."""
    for name in (bert, mt5, *tokenizers):
        (root / name).mkdir(parents=True, exist_ok=True)
    torch.save(encoders()[0], root / bert / "pytorch_model.bin")
    write_json(root / bert / "config.json", {"model_type": "bert", "num_attention_heads": 2})
    if shards:
        write_shards(encoders()[1], root / mt5 / "pytorch_model.bin")
    else:
        torch.save(encoders()[1], root / mt5 / "pytorch_model.bin")
    write_json(root / mt5 / "config.json", {"model_type": "mt5"})
    (root / tokenizers[0] / "vocab.txt").write_bytes(bert_vocab())
    (root / tokenizers[1] / "spiece.model").write_bytes(spiece_model())


@functools.cache
def vae() -> Tensors:
    """That of the embedded model, under LDM's names."""
    source = bundle(embedded_model(), only=("vae",)).vae
    assert source is not None
    return {key: value.clone() for key, value in dict(source).items()}


def write_vae(folder: Path) -> None:
    """A VAE as diffusers writes it; inside ComfyUI, which lacks diffusers, with other names."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        from train_setup import tiny_vae

        tensors = tiny_vae().state_dict()
    except ImportError:
        tensors = vae()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    write_json(folder / "config.json", {"_class_name": "AutoencoderKL", "scaling_factor": 0.13025})


# -- ControlNets ---------------------------------------------------------------------------------------------


@functools.cache
def control(old: bool = False) -> Tensors:
    """A ControlNet's weights in half precision; ``old``: of v1.1."""
    net = randomize(ControlNet(TINY_V11 if old else TINY), 12)
    return OrderedDict((key, value.half()) for key, value in net.state_dict().items())


def ttplanet(name: str, older: bool = False) -> Callable[[Path], Written]:
    """Half precision: an OrderedDict or, older, with what the training left in it."""

    def write(folder: Path) -> Written:
        content = {"module": control(), **BESIDE} if older else control()
        torch.save(content, folder / name, _use_new_zipfile_serialization=not older)
        return Written(folder / name, control())

    return write


def diffusers_control(name: str, old: bool = False) -> Callable[[Path], Written]:
    def write(folder: Path) -> Written:
        root = folder / name
        root.mkdir()
        tensors = {k: v.contiguous() for k, v in dict(from_tencent(control(old), "diffusers")).items()}
        save_file(tensors, root / "diffusion_pytorch_model.safetensors")
        write_json(root / "config.json", {"_class_name": "HunyuanDiT2DControlNetModel"})
        return Written(root, control(old))

    return write


# -- image prompts -------------------------------------------------------------------------------------------


def ip_adapter(folder: Path) -> Written:
    """Tencent's ``ipa.pt``, a plain state dict."""
    net = randomize(IPAdapter(IPAdapterConfig.for_dit(TINY, 12, 3)), 13)
    torch.save(net.state_dict(), folder / "ipa.pt")
    return Written(folder / "ipa.pt", net.state_dict())


def image_encoder(folder: Path) -> Written:
    """Tencent's ``clip_img_encoder.pt``: what Chinese-CLIP's training saves."""
    tensors = {f"module.{key}": value for key, value in clip_names(vision_model(), flash=True).items()}
    torch.save(
        {"epoch": 1, "step": 100, "name": "clip", "state_dict": tensors}, folder / "clip_img_encoder.pt"
    )
    return Written(folder / "clip_img_encoder.pt", tensors)


KINDS: dict[str, Kind] = {
    "Tencent's average": Kind("model", r"HunyuanDiT-64x4 v1\.2 checkpoint", one_set("pytorch_model_ema.pt")),
    "Tencent's distilled": Kind(
        "model", r"v1\.2 checkpoint\n(.*\n)*version +v1\.2, distill", one_set("pytorch_model_distill.pt")
    ),
    "Tencent's v1.1": Kind("model", r"v1\.1 or v1\.0 checkpoint", one_set("pytorch_model_module.pt", True)),
    "Laxhar's": Kind("model", r"v1\.1 or v1\.0 checkpoint(.|\n)*hydit.load_keys: module, ema", deepspeed),
    "Freeway Animation": Kind("model", r"v1\.1 or v1\.0 all-in-one checkpoint", all_in_one),
    "Tencent's folder": Kind("model", r"v1\.2 checkpoint\n(.*\n)*version +v1\.2, ema", tencents_folder),
    "diffusers' folder": Kind(
        "model", r"v1\.2 checkpoint(.|\n)*layout +diffusers", diffusers_folder("HunyuanDiT-v1.2-Diffusers")
    ),
    "diffusers' distilled folder": Kind(
        "model",
        r"version +v1\.1 or v1\.0, distill",
        diffusers_folder("HunyuanDiT-v1.1-Diffusers-Distilled", True),
    ),
    "TTPlanet's tile": Kind(
        "controlnet", r"HunyuanDiT-64x4 v1\.2 ControlNet", ttplanet("pytorch_model_tile_ema_module_only.pt")
    ),
    "TTPlanet's older inpainting": Kind(
        "controlnet", r"v1\.2 ControlNet", ttplanet("pytorch_model_inpaint_ema_module_only.pt", older=True)
    ),
    "diffusers' ControlNet": Kind(
        "controlnet", r"v1\.2 ControlNet", diffusers_control("HunyuanDiT-v1.2-ControlNet-Diffusers-Canny")
    ),
    "diffusers' ControlNet v1.1": Kind(
        "controlnet",
        r"v1\.1 or v1\.0 ControlNet",
        diffusers_control("HunyuanDiT-v1.1-ControlNet-Diffusers-Pose", True),
    ),
    "jade": Kind("lora", r"HunyuanDiT LoRA \(PEFT layout\)", tencents_lora("jade")),
    "T2ITrainer's LoRA": Kind("lora", "HunyuanDiT LoRA", t2itrainer(dora=False)),
    "T2ITrainer's DoRA": Kind("lora", "HunyuanDiT LoRA", t2itrainer(dora=True)),
    "DiffSynth-Studio's LoRA": Kind("lora", "HunyuanDiT LoRA", diffsynth),
    "kohya's": Kind("lora", r"HunyuanDiT LoRA \(kohya layout\)", kohya),
    "LoHa": Kind("lora", "HunyuanDiT LoRA", lycoris("loha")),
    "LoKr": Kind("lora", "HunyuanDiT LoRA", lycoris("lokr")),
    "full and norms": Kind("lora", "HunyuanDiT LoRA", lycoris("full")),
    "IP-Adapter": Kind("ip_adapter", "HunyuanDiT-64x4 IP-Adapter", ip_adapter),
    "image encoder": Kind("vision", "CLIP image encoder", image_encoder),
}


def kinds(role: str) -> list[str]:
    """The names of the kinds of one role."""
    return [name for name, kind in KINDS.items() if kind.role == role]


def is_old(name: str) -> bool:
    """Whether a model or ControlNet is of v1.1."""
    return r"v1\.1" in KINDS[name].says
