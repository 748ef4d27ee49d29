"""Every key layout of the DiT and the ControlNet, as one table that is read in both directions.

Tencent's names are the common language: files come in through :func:`to_tencent` and go out through
:func:`from_tencent`. Layouts:

* ``tencent``: the names of Tencent/HunyuanDiT's own state dict.
* ``comfy``: the same behind ``model.diffusion_model.`` (ComfyUI's checkpoints).
* ``diffusers``: HunyuanDiT2DModel and HunyuanDiT2DControlNetModel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch

from ..errors import WeightsError
from .source import TensorSource, as_source
from .views import Piece, TensorView, rename, rows_of

Layout = Literal["tencent", "diffusers", "comfy"]
LAYOUTS: tuple[Layout, ...] = ("tencent", "diffusers", "comfy")
COMFY_PREFIX = "model.diffusion_model."
PART_PREFIXES = ("text_encoders.", "cond_stage_model.", "vae.", "first_stage_model.", "conditioner.")
"""The prefixes of the other parts of an all-in-one file."""


class Rule(NamedTuple):
    """One Tencent module (or bare parameter) and its diffusers name; ``{n}`` is a block number.

    With several diffusers names, Tencent's tensor is their concatenation on dimension 0.
    ``swap``: the two halves of dimension 0 are swapped.
    """

    tencent: str
    diffusers: tuple[str, ...]
    swap: bool = False


def _rule(tencent: str, *diffusers: str, swap: bool = False) -> Rule:
    return Rule(tencent, diffusers or (tencent,), swap)


_BLOCK = "blocks.{n}."
RULES: tuple[Rule, ...] = (
    _rule("text_embedding_padding"),
    _rule("x_embedder.proj", "pos_embed.proj"),
    _rule("mlp_t5.0", "text_embedder.linear_1"),
    _rule("mlp_t5.2", "text_embedder.linear_2"),
    _rule("t_embedder.mlp.0", "time_extra_emb.timestep_embedder.linear_1"),
    _rule("t_embedder.mlp.2", "time_extra_emb.timestep_embedder.linear_2"),
    _rule("extra_embedder.0", "time_extra_emb.extra_embedder.linear_1"),
    _rule("extra_embedder.2", "time_extra_emb.extra_embedder.linear_2"),
    _rule("pooler.positional_embedding", "time_extra_emb.pooler.positional_embedding"),
    *(_rule(f"pooler.{x}_proj", f"time_extra_emb.pooler.{x}_proj") for x in "qkvc"),
    _rule("style_embedder", "time_extra_emb.style_embedder"),
    _rule(_BLOCK + "norm1", _BLOCK + "norm1.norm"),
    _rule(_BLOCK + "default_modulation.1", _BLOCK + "norm1.linear"),
    # Tencent numbers the norms by age, diffusers by order of use: cross-attention, then MLP.
    _rule(_BLOCK + "norm3", _BLOCK + "norm2"),
    _rule(_BLOCK + "norm2", _BLOCK + "norm3"),
    _rule(_BLOCK + "attn1.Wqkv", *(_BLOCK + f"attn1.to_{x}" for x in "qkv")),
    _rule(_BLOCK + "attn2.q_proj", _BLOCK + "attn2.to_q"),
    _rule(_BLOCK + "attn2.kv_proj", *(_BLOCK + f"attn2.to_{x}" for x in "kv")),
    *(_rule(_BLOCK + f"{a}.{x}_norm", _BLOCK + f"{a}.norm_{x}") for a in ("attn1", "attn2") for x in "qk"),
    *(_rule(_BLOCK + f"{a}.out_proj", _BLOCK + f"{a}.to_out.0") for a in ("attn1", "attn2")),
    _rule(_BLOCK + "mlp.fc1", _BLOCK + "ff.net.0.proj"),
    _rule(_BLOCK + "mlp.fc2", _BLOCK + "ff.net.2"),
    _rule(_BLOCK + "skip_norm"),
    _rule(_BLOCK + "skip_linear"),
    # Tencent's adaLN gives (shift, scale), diffusers' AdaLayerNormContinuous (scale, shift).
    _rule("final_layer.adaLN_modulation.1", "norm_out.linear", swap=True),
    _rule("final_layer.linear", "proj_out"),
    _rule("before_proj", "input_block"),
    _rule("after_proj_list.{n}", "controlnet_blocks.{n}"),
)

_BY_TENCENT = {rule.tencent: rule for rule in RULES}
_BY_DIFFUSERS = {name: rule for rule in RULES for name in rule.diffusers}
_STYLE = "style_embedder.weight"


def split_key(key: str) -> tuple[str, str, str]:
    """``blocks.3.mlp.fc1.weight`` -> (``blocks.{n}.mlp.fc1``, ``3``, ``.weight``)."""
    module, suffix = key, ""
    for ending in (".weight", ".bias"):
        if key.endswith(ending):
            module, suffix = key[: -len(ending)], ending
    match = re.match(r"(blocks|after_proj_list|controlnet_blocks)\.(\d+)(\..*)?$", module)
    if match:
        return f"{match.group(1)}.{{n}}{match.group(3) or ''}", match.group(2), suffix
    return module, "", suffix


def tencent_name(diffusers_key: str) -> str | None:
    """The Tencent key that a diffusers key becomes, or becomes part of; None if it is unknown."""
    module, number, suffix = split_key(diffusers_key)
    rule = _BY_DIFFUSERS.get(module)
    return rule and rule.tencent.replace("{n}", number) + suffix


def diffusers_names(tencent_key: str) -> tuple[str, ...]:
    """The diffusers keys that a Tencent key becomes, in the order of its rows; empty if it is unknown."""
    module, number, suffix = split_key(tencent_key)
    rule = _BY_TENCENT.get(module)
    return tuple(name.replace("{n}", number) + suffix for name in rule.diffusers) if rule else ()


def to_tencent(
    source: TensorSource | Mapping[str, torch.Tensor], layout: Layout, *, prefix: str = ""
) -> TensorView:
    """A lazy view of a DiT or ControlNet under Tencent's names.

    Names that are not in the table are kept, so that a strict load lists them; a fused tensor with missing
    parts is left out, and its other parts are kept. Of several style rows (in old checkpoints) row 0 is
    kept, the only one that sampling ever used.

    Args:
        prefix: of all names; tensors without it, and an all-in-one file's other parts, are left out.
            ``comfy`` has its own.
    """
    view = model_part(as_source(source), prefix or (COMFY_PREFIX if layout == "comfy" else ""))
    if layout != "diffusers":
        return _first_style_row(view)
    recipes: dict[str, tuple[Piece, ...]] = {}
    for key in view:
        module, number, suffix = split_key(key)
        rule = _BY_DIFFUSERS.get(module)
        parts = [name.replace("{n}", number) + suffix for name in rule.diffusers] if rule else [key]
        if rule is None or any(part not in view for part in parts):
            recipes[key] = (Piece(key),)
        elif key == parts[0]:
            pieces = _halves(view, key) if rule.swap else tuple(Piece(part) for part in parts)
            recipes[rule.tencent.replace("{n}", number) + suffix] = pieces
    return _first_style_row(TensorView(view, recipes))


def from_tencent(source: TensorSource | Mapping[str, torch.Tensor], layout: Layout) -> TensorView:
    """A lazy view of a DiT or ControlNet with Tencent's names under those of another layout.

    Raises:
        WeightsError: if a name is not in the table (layout ``diffusers``), because nothing may get lost.
    """
    source = as_source(source)
    if layout == "tencent":
        return rename(source, lambda key: key)
    if layout == "comfy":
        return rename(source, lambda key: COMFY_PREFIX + key)
    recipes: dict[str, tuple[Piece, ...]] = {}
    unknown = []
    for key in source:
        names = diffusers_names(key)
        if not names:
            unknown.append(key)
            continue
        if _BY_TENCENT[split_key(key)[0]].swap:
            recipes[names[0]] = _halves(source, key)
        elif len(names) == 1:
            recipes[names[0]] = (Piece(key),)
        else:
            rows = rows_of(source, key) // len(names)
            for i, name in enumerate(names):
                recipes[name] = (Piece(key, i * rows, (i + 1) * rows),)
    if unknown:
        raise WeightsError(
            f"{source.path}: no diffusers name for {len(unknown)} tensors: {', '.join(unknown[:5])};"
            " the layout diffusers holds a plain DiT or ControlNet only"
        )
    return TensorView(source, recipes)


def _halves(source: TensorSource, key: str) -> tuple[Piece, Piece]:
    middle = rows_of(source, key) // 2
    return Piece(key, middle, None), Piece(key, 0, middle)


def _first_style_row(view: TensorView) -> TensorView:
    if _STYLE not in view or rows_of(view, _STYLE) == 1:
        return view
    recipes = {key: (Piece(key, 0, 1) if key == _STYLE else Piece(key),) for key in view}
    return TensorView(view, recipes)


def belongs_to_model(key: str, prefix: str) -> bool:
    """Whether a file's key belongs to its DiT or ControlNet, not to another part of an all-in-one file."""
    return key.startswith(prefix) and not key.startswith(PART_PREFIXES)


def model_part(source: TensorSource, prefix: str) -> TensorView:
    """A file's DiT or ControlNet, named without ``prefix``."""
    return rename(source, lambda key: key[len(prefix) :] if belongs_to_model(key, prefix) else None)


# Names that only this model has, in each layout: the ends of keys, after any prefix.
_ANCHORS: tuple[tuple[Layout, str], ...] = (
    ("tencent", "mlp_t5.0.weight"),
    ("diffusers", "text_embedder.linear_1.weight"),
)
_KNOWN_PREFIXES = (COMFY_PREFIX, "model.", "", "module.", "transformer.", "base_model.model.")


def find_model(keys: Iterable[str]) -> tuple[Layout, str] | None:
    """The layout of the DiT or ControlNet among these keys and the prefix of its names, or None.

    Any prefix is accepted (``module.``, ``model.``, ``model.diffusion_model.``, ``base_model.model.``,
    ``transformer.``, ``_orig_mod.`` ...): it is what comes before a name that only this model has.
    """
    present = keys if isinstance(keys, (set, dict)) else set(keys)
    found: list[tuple[Layout, str]] = []
    for key in present:
        for layout, anchor in _ANCHORS:
            if key.endswith(anchor) and not key.startswith(PART_PREFIXES):
                prefix = key[: -len(anchor)]
                pooler = "pooler." if layout == "tencent" else "time_extra_emb.pooler."
                if f"{prefix}{pooler}positional_embedding" in present:
                    found.append((layout, prefix))
    if not found:
        return None
    ranks: dict[Any, int] = {prefix: rank for rank, prefix in enumerate(_KNOWN_PREFIXES)}
    layout, prefix = min(found, key=lambda item: (ranks.get(item[1], len(ranks)), len(item[1]), item[1]))
    return ("comfy" if layout == "tencent" and prefix in _KNOWN_PREFIXES[:2] else layout), prefix
