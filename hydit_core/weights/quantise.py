"""Making quantised files: which layers are stored in 8 bits, and writing them, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import ConfigError
from .bundle import Bundle, Place, bundle
from .convert import Converted, convert, full_name, kept_metadata
from .layouts import Layout
from .output import check_output
from .packed import INT8, Scheme, group_for
from .packing import QuantisingSource
from .source import TensorSource
from .writer import Progress, save_safetensors

FORMATS: dict[str, str] = {
    "int8": "8-bit integers, a scale for each row",
    "int8_convrot": "the same after a rotation that spreads outliers, a little more exact",
    "fp8_scaled": "8-bit floats, one scale for each layer; as small, less exact, unpacked for every product",
}
"""What can be written, and what it is."""

_PLACES = {"dit": "blocks.", "bert": "encoder.layer.", "t5": "encoder.block."}
# Looked up, not multiplied.
_TABLES = ("relative_attention_bias",)
# Of their own loaders, ComfyUI 0.33 has only those of diffusion models read quantised layers.
_ONLY_OURS = "ComfyUI's own loaders do not read {} in quantised layers, hydit's nodes and commands do"


def quantise(
    path: Place,
    out: str | os.PathLike[str],
    *,
    format: str,
    keep: Sequence[str] = (),
    text_encoders: bool = False,
    load_key: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Write a DiT, ControlNet or text encoder with its large matrices in 8 bits, one tensor at a time.

    In a DiT and a ControlNet these are the matrices inside the blocks, in a text encoder those of its layers.
    Everything else stays as it is: embedders, norms, biases and the final layer, whose errors would reach
    every token, and tables that are looked up.

    Args:
        path: a DiT, ControlNet, all-in-one checkpoint or text encoder: a file, a folder, or what was opened.
        out: a .safetensors file, in the input's layout; for one in diffusers' folder, ComfyUI's.
        format: one of :data:`FORMATS`.
        keep: patterns of layers that are to stay as they are, such as ``dit.blocks.0.*`` or ``mlp.fc2``: a
            whole name as ``lora inspect`` shows it, or whole words at its end.
        text_encoders: of an all-in-one file too.

    Raises:
        ConfigError: the format is unknown, a pattern fits no layer, or no layer is left.
        WeightsError: the input is something else, or the output cannot be written or exists. Nothing
            half-written is left.
    """
    if format not in FORMATS:
        raise ConfigError(f"format {format!r}: use one of {', '.join(FORMATS)}")
    opened = bundle(path, kinds=("dit", "controlnet", "bert", "t5"), load_key=load_key)
    place, kind = opened.place, opened.kind
    out = Path(out)
    check_output(out, (place,), overwrite=overwrite, form="a quantised file")
    alone = kind.kind in ("bert", "t5")
    parts = ("dit", "bert", "t5") if text_encoders or alone else ("dit",)
    plan = _Plan(format, keep, parts)
    if alone:
        source = opened.source
        prefix = f"{kind.kind}."
        changed = plan.change(source, lambda key: prefix + key.removeprefix(kind.prefix))
        plan.check(place)
        save_safetensors(out, changed, kept_metadata(source), progress=progress)
        return Converted(out, kind, (*plan.notes(), _ONLY_OURS.format("text encoders")))
    layout = _layout(opened)
    for part in (opened.dit or opened.controlnet, *_others(opened, layout)):
        if part is not None:
            plan.change(part, full_name)
    plan.check(place)
    done = convert(
        opened,
        out,
        layout=layout,
        change=lambda part: plan.change(part, full_name),
        overwrite=overwrite,
        progress=progress,
        told=False,
    )
    foreign = ["ControlNets"] if kind.kind == "controlnet" else []
    foreign += ["text encoders"] if plan.counts.keys() & {"bert", "t5"} else []
    told = [_ONLY_OURS.format(" or ".join(foreign))] if foreign else []
    return Converted(out, done.kind, (*plan.notes(), *told, *done.notes))


def scheme_for(format: str, shape: Sequence[int]) -> Scheme:
    """How a matrix of this shape is stored in a format of :data:`FORMATS`.

    ConvRot's groups are the largest power of 4 up to 256 that divides the columns; where 4 does not, there is
    no rotation. In fp8 the inputs of products are not in 8 bits: ComfyUI would clip them at 448.
    """
    if format == "fp8_scaled":
        return Scheme("float8_e4m3fn", full_precision=True)
    return Scheme(INT8, rows=True, group=group_for(shape[1]) if format == "int8_convrot" else 0)


class _Plan:
    """Which layers are quantised, by their full names."""

    def __init__(self, format: str, keep: Sequence[str], parts: Sequence[str]) -> None:
        self.format = format
        self.keep = keep
        self.parts = parts
        self.used: set[str] = set()
        self.schemes: dict[str, Scheme] = {}
        self.counts: dict[str, int] = {}

    def change(self, source: TensorSource, name: Callable[[str], str]) -> TensorSource:
        """``source`` with its layers quantised; parts that are not asked for stay as they are."""
        chosen: dict[str, Scheme] = {}
        for key in source:
            full = name(key)
            if full.partition(".")[0] not in self.parts:
                if scheme := source.scheme(key):
                    chosen[key] = scheme
            elif self._takes(full, source.shape(key)):
                chosen[key] = self.schemes[full] = scheme_for(self.format, source.shape(key))
        self.counts = {}
        for full in self.schemes:
            part = full.partition(".")[0]
            self.counts[part] = self.counts.get(part, 0) + 1
        return QuantisingSource(source, chosen)

    def _takes(self, full: str, shape: tuple[int, ...]) -> bool:
        part, _, inner = full.partition(".")
        fits = inner.startswith(_PLACES.get(part, "-")) and inner.endswith(".weight") and len(shape) == 2
        if not fits or any(table in inner for table in _TABLES):
            return False
        layer = full.removesuffix(".weight")
        matching = [one for one in self.keep if fnmatchcase(layer, one) or fnmatchcase(layer, f"*.{one}")]
        self.used.update(matching)
        return not matching

    def check(self, place: Path) -> None:
        """Raise ConfigError for a pattern without a layer, or if no layer is left."""
        if unused := [one for one in self.keep if one not in self.used]:
            raise ConfigError(
                f"--keep {unused[0]}: no layer of {place} that would be quantised has such a name; they are "
                "named as in dit.blocks.0.mlp.fc1"
            )
        if not self.schemes:
            raise ConfigError(f"{place}: no layer is left to quantise")

    def notes(self) -> list[str]:
        layers = ", ".join(f"{count} of {_LABELS[part]}" for part, count in self.counts.items())
        groups: dict[int, int] = {}
        for scheme in self.schemes.values():
            groups[scheme.group] = groups.get(scheme.group, 0) + 1
        rotated = ", ".join(
            f"{count} in groups of {group}" if group else f"{count} not at all"
            for group, count in sorted(groups.items(), reverse=True)
        )
        turned = f" (rotated: {rotated})" if self.format == "int8_convrot" else ""
        return [f"in {self.format}: layers: {layers}{turned}"]


_LABELS: Mapping[str, str] = {"dit": "the network", "bert": "BERT", "t5": "mT5"}


def _layout(opened: Bundle) -> Layout:
    if opened.kind.kind == "controlnet":
        return "tencent"
    return "comfy" if opened.kind.layout == "diffusers" else opened.kind.layout  # type: ignore[return-value]


def _others(opened: Bundle, layout: Layout) -> list[TensorSource]:
    """The other parts that are written, under the names of an all-in-one file."""
    if layout != "comfy" or opened.kind.kind == "controlnet":
        return []
    return [opened.source, *opened.beside.sources]
