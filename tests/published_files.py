"""Files as people have them, with random weights: names, types and containers are those of their makers.

Every writer of :data:`KINDS` puts one into an empty folder and says what must be read from it, by formulas
of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tiny import TINY, TINY_V11, bert_vocab, randomize, spiece_model, write_tiny_model
from torch import Tensor
from train_setup import tiny_vae

from hydit_core.model.controlnet import ControlNet
from hydit_core.model.dit import DiT
from hydit_core.weights.layouts import from_tencent

Tensors = dict[str, Tensor]
Change = Callable[[Tensor], Tensor]
"""From a base's weight to the changed one, both in float64."""


class Written(NamedTuple):
    """A file or folder.

    Attributes:
        place: what a user names.
        tensors: of a DiT or ControlNet, under Tencent's names, as they must be read.
        changes: of a LoRA, by the weight's name behind its part (``dit.blocks.0.attn1.Wqkv.weight``).
        complete: there are text encoders and a VAE in it, too.
    """

    place: Path
    tensors: Tensors = {}
    changes: Mapping[str, Change] = {}
    complete: bool = False


class Kind(NamedTuple):
    """Attributes:
    role: ``model``, ``controlnet`` or ``lora``.
    says: what ``weights inspect`` calls it, a regular expression.
    write: puts one into a folder.
    """

    role: str
    says: str
    write: Callable[[Path], Written]


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
    whole = load_file(write_tiny_model(folder / "made.safetensors", wide))
    (folder / "made.safetensors").unlink()
    half = {
        key: value.half() if value.is_floating_point() else value
        for key, value in whole.items()
        if not key.endswith("hydit_clip.vocab")
    }
    path = folder / "freewayAnimation_hunyuanDit11.safetensors"
    save_file(half, path)
    (folder / "vocab.txt").write_bytes(bert_vocab())
    prefix = "model.diffusion_model."
    found = {key.removeprefix(prefix): value for key, value in half.items() if key.startswith(prefix)}
    return Written(path, found, complete=True)


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


@functools.cache
def encoders() -> tuple[Tensors, Tensors]:
    """BERT and mT5 under transformers' names, in TINY's dimensions."""
    from transformers import BertConfig, BertModel, MT5Config, MT5EncoderModel

    bert = BertConfig(
        vocab_size=bert_vocab().count(b"\n"), hidden_size=TINY.text_dim, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=TINY.text_len,
    )  # fmt: skip
    mt5 = MT5Config(vocab_size=100, d_model=TINY.t5_dim, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    found = []
    for seed, model in enumerate((BertModel(bert, add_pooling_layer=False), MT5EncoderModel(mt5))):
        state = randomize(model, seed).state_dict()
        found.append({key: value for key, value in state.items() if key != "encoder.embed_tokens.weight"})
    return found[0], found[1]


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


def write_vae(folder: Path) -> None:
    """A VAE as diffusers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tiny_vae().state_dict(), folder / "diffusion_pytorch_model.safetensors")
    write_json(folder / "config.json", {"_class_name": "AutoencoderKL", "scaling_factor": 0.13025})


def write_shards(tensors: Tensors, path: Path) -> None:
    """Two files and their index, in the spelling of transformers and diffusers."""
    names = list(tensors)
    stem, suffix = path.name.split(".")
    where = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        name = f"{stem}-{number:05d}-of-00002.{suffix}"
        some = {key: tensors[key] for key in part}
        save_file(some, path.with_name(name)) if suffix == "safetensors" else torch.save(
            some, path.with_name(name)
        )
        where |= dict.fromkeys(part, name)
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_json(path.with_name(f"{path.name}.index.json"), index)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


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


# -- LoRAs ---------------------------------------------------------------------------------------------------


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 0.2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@functools.cache
def layers() -> dict[str, tuple[int, int]]:
    """The DiT's matrices by their modules' names."""
    state = randomize(DiT(TINY), 0).state_dict()
    return {
        key.removesuffix(".weight"): (value.shape[0], value.shape[1])
        for key, value in state.items()
        if key.endswith(".weight") and value.ndim == 2
    }


def product(down: Tensor, up: Tensor, scale: float = 1.0) -> Change:
    return lambda base: base + scale * up.double() @ down.double()


def tencents_lora(name: str) -> Callable[[Path], Written]:
    """A folder of peft's, rank and alpha 64, of all attention's layers and one of the pooler."""

    def write(folder: Path) -> Written:
        root = folder / name
        root.mkdir()
        targets = ("Wqkv", "q_proj", "kv_proj", "out_proj")
        factors, changes = {}, {}
        for module, (rows, columns) in layers().items():
            if module.endswith(targets):
                down, up = draw(64, columns), draw(rows, 64)
                factors[f"base_model.model.{module}.lora_A.weight"] = down
                factors[f"base_model.model.{module}.lora_B.weight"] = up
                changes[f"dit.{module}.weight"] = product(down, up)
        save_file(factors, root / "adapter_model.safetensors")
        mapping = {"base_model_class": "HunYuanDiT", "parent_library": "hydit.modules.models"}
        config = {
            **{"auto_mapping": mapping, "base_model_name_or_path": None, "bias": "none"},
            **{"fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True},
            **{"layers_pattern": None, "layers_to_transform": None, "lora_alpha": 64, "lora_dropout": 0.0},
            **{"modules_to_save": None, "peft_type": "LORA", "r": 64, "revision": None},
            **{"target_modules": list(targets), "task_type": None},
        }
        write_json(root / "adapter_config.json", config)
        return Written(root, changes=changes)

    return write


_SPLIT = {
    "attn1.Wqkv": ("to_q", "to_k", "to_v"),
    "attn2.q_proj": ("to_q",),
    "attn2.kv_proj": ("to_k", "to_v"),
}


def split(
    prefix: str, down: str, up: str, others: dict[str, str], dora: bool = False
) -> tuple[Tensors, dict]:
    """A LoRA of rank 3 for each of q, k and v by itself, and for ``others``, by their modules' names."""
    tensors: Tensors = {}
    changes: dict[str, Change] = {}

    def one(name: str, rows: int, columns: int, seed: int) -> Change:
        a, b, length = draw(3, columns, seed=seed), draw(rows, 3, seed=seed), draw(rows, seed=seed).abs() + 1
        tensors[f"{prefix}{name}.{down}"], tensors[f"{prefix}{name}.{up}"] = a, b
        plain = product(a, b)
        if not dora:
            return plain
        tensors[f"{prefix}{name}.lora_magnitude_vector"] = length
        return lambda base: length.double()[:, None] * plain(base) / plain(base).norm(dim=1, keepdim=True)

    for block in range(TINY.depth):
        for module, names in _SPLIT.items():
            rows, columns = layers()[f"blocks.{block}.{module}"]
            attention = module.partition(".")[0]
            each = [
                one(f"blocks.{block}.{attention}.{name}", rows // len(names), columns, seed=block + index)
                for index, name in enumerate(names)
            ]
            changes[f"dit.blocks.{block}.{module}.weight"] = functools.partial(_of_rows, each)
        for name, module in others.items():
            changes[f"dit.blocks.{block}.{module}.weight"] = one(
                f"blocks.{block}.{name}", *layers()[f"blocks.{block}.{module}"], seed=block
            )
    return tensors, changes


def _of_rows(each: list[Change], base: Tensor) -> Tensor:
    return torch.cat([change(part) for change, part in zip(each, base.chunk(len(each)), strict=True)])


def t2itrainer(dora: bool) -> Callable[[Path], Written]:
    """diffusers' names, as its pipelines save them."""

    def write(folder: Path) -> Written:
        others = {"attn1.to_out.0": "attn1.out_proj", "attn2.to_out.0": "attn2.out_proj"}
        tensors, changes = split("transformer.", "lora_A.weight", "lora_B.weight", others, dora)
        path = folder / "pytorch_lora_weights.safetensors"
        save_file(tensors, path)
        return Written(path, changes=changes)

    return write


def diffsynth(folder: Path) -> Written:
    """A checkpoint of its trainer, with names of its own for the last layers."""
    others = {f"{attention}.to_out": f"{attention}.out_proj" for attention in ("attn1", "attn2")}
    others |= {"mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2", "modulation.1": "default_modulation.1"}
    tensors, changes = split("", "lora_A.default.weight", "lora_B.default.weight", others)
    torch.save(tensors, folder / "epoch=0-step=500.ckpt")
    return Written(folder / "epoch=0-step=500.ckpt", changes=changes)


def kohya(folder: Path) -> Written:
    """With BERT's and mT5's layers, alpha 2 at rank 4."""
    sizes = {f"dit.{name}": size for name, size in layers().items() if name.startswith("blocks.")}
    for part, tensors in zip(("bert", "t5"), encoders(), strict=True):
        for key, value in tensors.items():
            if key.endswith((".attention.self.query.weight", ".SelfAttention.q.weight", "dense.weight")):
                sizes[f"{part}.{key.removesuffix('.weight')}"] = (value.shape[0], value.shape[1])
    prefixes = {"dit": "lora_unet_", "bert": "lora_te1_", "t5": "lora_te2_"}
    tensors, changes = {}, {}
    for module, (rows, columns) in sizes.items():
        part, _, name = module.partition(".")
        key = prefixes[part] + name.replace(".", "_")
        down, up = draw(4, columns), draw(rows, 4)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
        changes[f"{module}.weight"] = product(down, up, 0.5)
    metadata = {"ss_network_module": "hunyuan_models.lora", "ss_network_dim": "4", "ss_network_alpha": "2"}
    path = folder / "style.safetensors"
    save_file(tensors, path, metadata)
    return Written(path, changes=changes)


def lycoris(algorithm: str) -> Callable[[Path], Written]:
    """Rank 4 and alpha 2; as lycoris-lora 4.1 names its tensors, and as it computes while it trains."""

    def write(folder: Path) -> Written:
        tensors, changes = {}, {}
        for module, (rows, columns) in layers().items():
            if module.startswith("blocks."):
                own, change = _LYCORIS[algorithm](rows, columns)
                prefix = f"lycoris_{module.replace('.', '_')}."
                tensors |= {prefix + name: value for name, value in own.items()}
                changes[f"dit.{module}.weight"] = change
        if algorithm == "full":
            for name in ("norm1", "norm2", "norm3"):
                weight, bias = draw(TINY.hidden_size), draw(TINY.hidden_size, seed=1)
                key = f"lycoris_blocks_0_{name}"
                tensors |= {f"{key}.w_norm": weight, f"{key}.b_norm": bias}
                changes[f"dit.blocks.0.{name}.weight"] = functools.partial(_added, weight)
                changes[f"dit.blocks.0.{name}.bias"] = functools.partial(_added, bias)
        path = folder / f"lycoris_{algorithm}.safetensors"
        save_file(tensors, path, {"ss_network_module": "lycoris.kohya"})
        return Written(path, changes=changes)

    return write


def _added(change: Tensor, base: Tensor) -> Tensor:
    return base + change.double()


def _loha(rows: int, columns: int) -> tuple[Tensors, Change]:
    own = {"hada_w1_a": draw(rows, 4), "hada_w1_b": draw(4, columns)}
    own |= {"hada_w2_a": draw(rows, 4, seed=1), "hada_w2_b": draw(4, columns, seed=1)}
    one, two = (own[f"hada_{w}_a"].double() @ own[f"hada_{w}_b"].double() for w in ("w1", "w2"))
    return own | {"alpha": torch.tensor(2.0)}, lambda base: base + 0.5 * one * two


def _lokr(rows: int, columns: int) -> tuple[Tensors, Change]:
    own = {"lokr_w1": draw(4, 4), "lokr_w2_a": draw(rows // 4, 4), "lokr_w2_b": draw(4, columns // 4)}
    second = own["lokr_w2_a"].double() @ own["lokr_w2_b"].double()
    whole = torch.kron(own["lokr_w1"].double(), second)
    return own | {"alpha": torch.tensor(2.0)}, lambda base: base + 0.5 * whole


def _full(rows: int, columns: int) -> tuple[Tensors, Change]:
    difference = draw(rows, columns)
    return {"diff": difference}, functools.partial(_added, difference)


_LYCORIS = {"loha": _loha, "lokr": _lokr, "full": _full}


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
        "controlnet", r"HunyuanDiT-64x4 v1\.2 ControlNet", ttplanet("TTPLANET_Controlnet_Tile_v12.pt")
    ),
    "TTPlanet's older inpainting": Kind(
        "controlnet", r"v1\.2 ControlNet", ttplanet("TTPLANET_inpainting.pt", older=True)
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
}


def kinds(role: str) -> list[str]:
    """The names of the kinds of one role."""
    return [name for name, kind in KINDS.items() if kind.role == role]


def is_old(name: str) -> bool:
    """Whether a model or ControlNet is of v1.1."""
    return r"v1\.1" in KINDS[name].says
