"""Finds the modules of the model that the names in LoRA files stand for.

Files spell the same path with dots, with underscores (kohya), or with every underscore turned into a dot
(Tencent's interface). So known prefixes are stripped, all separators become underscores, and the result is
looked up in a table of the known modules. Nothing is guessed from a base model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from ..weights.layouts import RULES
from ..weights.views import WRAPPERS, unwrapped_name


class Place(NamedTuple):
    """A module of the model, or some of its rows.

    Attributes:
        module: with its part, ``dit.blocks.3.attn2.kv_proj``.
        piece: which of ``pieces`` equal parts of its rows.
        swap: its two halves of rows change places.
    """

    module: str
    piece: int = 0
    pieces: int = 1
    swap: bool = False


_BERT_LAYER = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
_BERT = (
    *(f"embeddings.{name}_embeddings" for name in ("word", "position", "token_type")),
    "embeddings.LayerNorm",
    *(f"encoder.layer.{{n}}.{name}" for name in _BERT_LAYER),
)
_T5_LAYER = (
    *(f"layer.0.SelfAttention.{name}" for name in ("q", "k", "v", "o", "relative_attention_bias")),
    "layer.0.layer_norm",
    *(f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wi", "wo")),
    "layer.1.layer_norm",
)
_T5 = ("shared", *(f"encoder.block.{{n}}.{name}" for name in _T5_LAYER), "encoder.final_layer_norm")

# Names that DiffSynth-Studio gives, and those of diffusers' older attention processors.
_ALIASES = {
    "blocks.{n}.attn1.to_out": "blocks.{n}.attn1.out_proj",
    "blocks.{n}.attn2.to_out": "blocks.{n}.attn2.out_proj",
    "blocks.{n}.mlp.0": "blocks.{n}.mlp.fc1",
    "blocks.{n}.mlp.2": "blocks.{n}.mlp.fc2",
    "blocks.{n}.modulation.1": "blocks.{n}.default_modulation.1",
}

# Whole words, so that the transformer_blocks of other models are not taken for blocks.
_PREFIX = re.compile(
    r"(?:(?:base_model|diffusion_model|model|module|transformer|unet|dit|text_encoders|text_encoder|text_encoder_2"
    r"|hydit_clip|mt5xl|bert|t5)\.|(?:lora_unet|lora_transformer|lora_te1|lora_te2|lora_te|lycoris)_)"
)
# No model has 10,000 blocks: a longer number, or one with other digits, is not a block's.
_NUMBER = re.compile(r"^(blocks|encoder_layer|encoder_block)_(0|[1-9][0-9]{0,3})_")
# Wrappers of modules, and an attention processor of diffusers, with underscores for dots.
_AROUND = "|".join(name.strip("_") for name in (*sorted(WRAPPERS, key=len, reverse=True), "processor"))
_AROUND = _AROUND.replace(
    "_wrapped_module", "_wrapped(?:_module)?"
)  # of which the dotted spelling lost a word
_WRAPPED = re.compile(rf"^(?:_?(?:{_AROUND})_)+|_{{1,2}}(?:{_AROUND})(?=_)")
_PARTS = {
    "bert": ("lora_te1_", "lora_te_", "text_encoder.", "text_encoders.hydit_clip.", "hydit_clip.", "bert."),
    "t5": ("lora_te2_", "text_encoder_2.", "text_encoders.mt5xl.", "mt5xl.", "t5."),
}


def _flat(name: str) -> str:
    return _WRAPPED.sub("", name.replace(".", "_"))


def _table(diffusers: bool) -> dict[str, Place]:
    table = {_flat(name): Place(f"bert.{name}") for name in _BERT}
    table |= {_flat(name): Place(f"t5.{name}") for name in _T5}
    for rule in RULES:
        names = rule.diffusers if diffusers else (rule.tencent,)
        for index, name in enumerate(names):
            place = Place(f"dit.{rule.tencent}", index, len(names), diffusers and rule.swap)
            table[_flat(name)] = place
    table |= {_flat(name): Place(f"dit.{module}") for name, module in _ALIASES.items()}
    return table


_TENCENT, _DIFFUSERS = _table(False), _table(True)


def _split(name: str) -> tuple[str, str]:
    """``lora_unet_blocks_3_mlp_fc1`` -> (``blocks_{n}_mlp_fc1``, ``3``); empty if it is not known."""
    name = _unwrapped(name)
    while True:
        flat = _flat(name)
        match = _NUMBER.match(flat)
        short = f"{match[1]}_{{n}}_{flat[match.end() :]}" if match else flat
        if short in _TENCENT or short in _DIFFUSERS:
            return short, match[2] if match else ""
        prefix = _PREFIX.match(name)
        if prefix is None:
            return "", ""
        name = name[prefix.end() :]


def _unwrapped(module: str) -> str:
    return unwrapped_name(f"{module}.").removesuffix(".")


def own_name(name: str) -> str:
    """A file's name of a module, without what PEFT and wrappers put around it."""
    return _unwrapped(name).removeprefix("base_model.model.")


def part_of(name: str) -> str:
    """The part that an unknown module is meant for: the DiT, unless its prefix names another."""
    name = own_name(name)
    return next((part for part, prefixes in _PARTS.items() if name.startswith(prefixes)), "dit")


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether module names follow diffusers' layout: at least one exists only there."""
    return any(short in _DIFFUSERS and short not in _TENCENT for short, _ in map(_split, names))


def locate(name: str, *, diffusers: bool = False) -> Place | None:
    """Where a file's module belongs; None when this model has no such module."""
    short, number = _split(name)
    place = (_DIFFUSERS if diffusers else _TENCENT).get(short)
    return place and place._replace(module=place.module.replace("{n}", number))


def fused_count(module: str) -> int:
    """How many layers diffusers splits a module into: 3 for Wqkv, 2 for kv_proj, else 1."""
    name = re.sub(r"^dit\.blocks\.\d+\.", "blocks.{n}.", module)
    return next((len(rule.diffusers) for rule in RULES if rule.tencent == name), 1)


def kohya_name(module: str) -> str:
    """``dit.blocks.3.mlp.fc1`` -> ``lora_unet_blocks_3_mlp_fc1``."""
    part, _, name = module.partition(".")
    return {"dit": "lora_unet_", "bert": "lora_te1_", "t5": "lora_te2_"}[part] + _flat(name)


def comfy_name(module: str) -> str:
    """``dit.blocks.3.mlp.fc1`` -> ``diffusion_model.blocks.3.mlp.fc1``."""
    part, _, name = module.partition(".")
    prefixes = {
        "dit": "diffusion_model.",
        "bert": "text_encoders.hydit_clip.transformer.bert.",
        "t5": "text_encoders.mt5xl.transformer.",
    }
    return prefixes[part] + name
