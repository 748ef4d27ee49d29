"""Key names and dimensions of CLIP's image encoders, which IP-Adapters take their embeddings from.

Two layouts, anywhere in a file:

* ``clip``: OpenAI's and Chinese-CLIP's (``visual.transformer.resblocks.N...``), also with the fused
  projections that flash attention renames (``attn.Wqkv``).
* ``transformers``: CLIPVisionModelWithProjection's (``vision_model.encoder.layers.N...``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import WeightsError
from ..untrusted import count_numbered, parse_json, read_json
from .source import TensorSource, cast
from .views import Piece, TensorView, without_prefix

VISION_KEY = "hydit.vision"
"""Metadata key: what the shapes of an image encoder do not tell, as JSON (``heads``, ``activation``)."""
ACTIVATIONS = ("quick_gelu", "gelu")

_MARKS = {
    "clip": ("transformer.resblocks.0.ln_1.weight", "conv1.weight"),
    "transformers": (
        "vision_model.encoder.layers.0.layer_norm1.weight",
        "vision_model.embeddings.patch_embedding.weight",
    ),
}
_EMBEDDINGS = "vision_model.embeddings."
_PROJECTION = "visual_projection.weight"
# transformers' names of what is outside the layers, and in a layer; CLIP's after them.
_OUTSIDE = {
    f"{_EMBEDDINGS}class_embedding": "class_embedding",
    f"{_EMBEDDINGS}patch_embedding.weight": "conv1.weight",
    f"{_EMBEDDINGS}position_embedding.weight": "positional_embedding",
    **{f"vision_model.pre_layrnorm.{x}": f"ln_pre.{x}" for x in ("weight", "bias")},
    **{f"vision_model.post_layernorm.{x}": f"ln_post.{x}" for x in ("weight", "bias")},
}
_INSIDE = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_FUSED = (("attn.in_proj_weight", "attn.in_proj_bias"), ("attn.Wqkv.weight", "attn.Wqkv.bias"))
# Of the published encoders; all others' heads are 64 wide.
_HEADS = {1280: 16, 1664: 16}


class VisionKind(NamedTuple):
    """Where an image encoder is in a file: its layout and the prefix before every name."""

    layout: str
    prefix: str


@dataclass(frozen=True)
class VisionConfig:
    """An image encoder's dimensions: square pictures of ``size`` pixels become ``embed_dim`` values."""

    width: int
    layers: int
    heads: int
    mlp_hidden: int
    patch: int
    size: int
    embed_dim: int
    activation: str = "quick_gelu"

    def to_json(self) -> str:
        """For :data:`VISION_KEY`."""
        return json.dumps({"heads": self.heads, "activation": self.activation})


def find_vision(keys: Iterable[str]) -> VisionKind | None:
    """Where among these names an image encoder is, whatever is before its names; None without one."""
    present = keys if isinstance(keys, (set, dict)) else set(keys)
    found = [
        VisionKind(layout, key[: -len(mark)])
        for layout, (mark, also) in _MARKS.items()
        for key in present
        if key.endswith(mark) and key[: -len(mark)] + also in present
    ]
    return min(found, key=lambda kind: (len(kind.prefix), kind), default=None)


def vision_view(source: TensorSource, kind: VisionKind) -> TensorView:
    """A file's image encoder under the names of transformers' CLIPVisionModelWithProjection."""
    inner = without_prefix(source, kind.prefix)
    recipes: dict[str, tuple[Piece, ...]] = {}
    if kind.layout == "transformers":
        names = [key for key in inner if key.startswith("vision_model.") or key == _PROJECTION]
        recipes = {key: (Piece(key),) for key in names if not key.endswith(".position_ids")}
        return TensorView(inner, recipes)
    recipes = {new: (Piece(old),) for new, old in _OUTSIDE.items() if old in inner}
    for number in range(count_numbered(inner, "transformer.resblocks.")):
        old, new = f"transformer.resblocks.{number}.", f"vision_model.encoder.layers.{number}."
        for ending in ("weight", "bias"):
            for theirs, ours in _INSIDE.items():
                if f"{old}{ours}.{ending}" in inner:
                    recipes[f"{new}{theirs}.{ending}"] = (Piece(f"{old}{ours}.{ending}"),)
        for fused in (old + name for names in _FUSED for name in names if old + name in inner):
            rows = inner.shape(fused)[0] // 3 if inner.shape(fused) else 0
            ending = "weight" if fused.endswith("weight") else "bias"
            for i, part in enumerate("qkv"):
                recipes[f"{new}self_attn.{part}_proj.{ending}"] = (Piece(fused, i * rows, (i + 1) * rows),)
    if "proj" in inner:
        recipes[_PROJECTION] = (Piece("proj"),)
    return _Turned(inner, recipes)


class _Turned(TensorView):
    """CLIP multiplies by its projection, transformers by the transposed one."""

    def shape(self, key: str) -> tuple[int, ...]:
        shape = super().shape(key)
        return shape[::-1] if key == _PROJECTION else shape

    def get(self, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        if key != _PROJECTION:
            return super().get(key, dtype)
        tensor = super().get(key)
        return cast(tensor.T.contiguous() if tensor.ndim == 2 else tensor, dtype)

    def rows(self, key: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        if key != _PROJECTION:
            return super().rows(key, start, stop, dtype)
        return cast(self.get(key)[start:stop], dtype)


def vision_config(view: TensorSource, layout: str) -> VisionConfig:
    """The dimensions of an image encoder under transformers' names.

    What shapes do not tell is in the file's metadata, or in a config.json beside it; else the published
    encoders' values apply: QuickGELU for CLIP's own layout and for transformers' narrower than 1280.

    Raises:
        WeightsError: a tensor is missing, or shapes or values are impossible.
    """
    where = str(view.path)

    def shape(key: str, ndim: int) -> tuple[int, ...]:
        if key not in view:
            raise WeightsError(f"{where}: the image encoder lacks {key}")
        found = view.shape(key)
        if len(found) != ndim or 0 in found:
            raise WeightsError(f"{where}: {key} has shape {found}; expected {ndim} dimensions")
        return found

    width, _, patch, _ = shape(f"{_EMBEDDINGS}patch_embedding.weight", 4)
    positions, _ = shape(f"{_EMBEDDINGS}position_embedding.weight", 2)
    side = round((positions - 1) ** 0.5)
    if side * side != positions - 1:
        raise WeightsError(f"{where}: the image encoder has {positions} positions; expected a square and one")
    wide = layout == "transformers" and width >= 1280
    told: dict[str, Any] = {"heads": _HEADS.get(width, max(1, width // 64)), "activation": ACTIVATIONS[wide]}
    told |= _told(view)
    if width % told["heads"]:
        raise WeightsError(f"{where}: a width of {width} cannot be split into {told['heads']} heads")
    return VisionConfig(
        width=width,
        layers=count_numbered(view, "vision_model.encoder.layers."),
        mlp_hidden=shape("vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        patch=patch,
        size=side * patch,
        embed_dim=shape(_PROJECTION, 2)[0],
        **told,
    )


def _told(view: TensorSource) -> dict[str, Any]:
    """Heads and activation, as far as the file's metadata or a config.json beside it says them."""
    if text := view.metadata.get(VISION_KEY):
        where = f"{view.path}: metadata {VISION_KEY!r}"
        return _checked(parse_json(text, where), where)
    folder = view.path if view.path.is_dir() else view.path.parent
    file = Path(folder) / "config.json"
    if not file.is_file():
        return {}
    values = read_json(file)
    values = values.get("vision_config", values)
    if not isinstance(values, dict) or "clip" not in str(values.get("model_type", "")):
        return {}
    names = {"heads": "num_attention_heads", "activation": "hidden_act"}
    found = {ours: values[theirs] for ours, theirs in names.items() if theirs in values}
    return _checked(found, str(file))


def _checked(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    heads, activation = values.get("heads", 1), values.get("activation", "gelu")
    if type(heads) is not int or heads < 1:
        raise WeightsError(f"{where}: {heads!r} heads; expected a number")
    if activation not in ACTIVATIONS:
        raise WeightsError(f"{where}: activation {activation!r}; expected {' or '.join(ACTIVATIONS)}")
    return {name: values[name] for name in ("heads", "activation") if name in values}
