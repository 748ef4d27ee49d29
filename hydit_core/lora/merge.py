"""Merges LoRAs into weights: those of a model in memory, or from file to file, one tensor at a time."""

from __future__ import annotations

import itertools
import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import FP8_DTYPES, dtype_name
from ..errors import LoraError
from ..facts import METADATA_KEY
from ..untrusted import parse_json
from ..weights import kitchen
from ..weights.bundle import Bundle, Place, bundle
from ..weights.convert import convert, full_name
from ..weights.detect import FileKind
from ..weights.layouts import Layout
from ..weights.output import check_output
from ..weights.packed import Packed, Scheme, pack
from ..weights.source import TensorSource, cast
from ..weights.writer import Progress
from .adapter import Adapter, Match, changed, changed_bias
from .blocks import BlockWeights, check_strength, depth_of, each_weights
from .combined import recipe_entry
from .distilled import merged_info
from .patch import Patch
from .reading import read
from .scaling import LARGEST

MERGED_KEY = "hydit.merged"
"""Metadata of a merged file: a JSON list of what went in, oldest first."""

_KEPT_BYTES = 2**26


@dataclass(frozen=True)
class Change:
    """What a LoRA does to one tensor: patches at their strength, on a weight or on a bias."""

    patches: Sequence[Patch]
    strength: float
    bias: bool

    def __call__(self, tensor: Tensor) -> Tensor:
        """The changed tensor in float32, a new one."""
        if self.bias:
            return changed_bias(tensor.float(), self.patches, self.strength)
        return changed(tensor, self.patches, self.strength, dtype=torch.float32)


def plan(
    adapter: Adapter,
    shapes: Mapping[str, Sequence[int]],
    strength: float = 1.0,
    block_weights: Any = None,
    *,
    base: str,
    partial: bool = False,
) -> tuple[Match, dict[str, Change]]:
    """Which tensors a LoRA changes, and how.

    Args:
        shapes: of all tensors, named ``dit.blocks.0.attn1.Wqkv.weight``, ``bert. ...``, ``t5. ...``.
        block_weights: what :meth:`BlockWeights.parse` takes.
        base: what the tensors belong to, for messages.
        partial: see :meth:`Adapter.require`.

    Returns:
        The match of modules, with biases that the base lacks among the unmatched, and the changes by tensor
        name. Tensors whose strength is 0 have none.

    Raises:
        LoraError: if too few modules match or one has another size.
        ConfigError: if the strength is not finite or the block weights do not fit the number of blocks.
    """
    check_strength(strength, adapter.name)
    modules = {name.removesuffix(".weight"): name for name in shapes if not name.endswith(".bias")}
    own = {module: shapes[name] for module, name in modules.items()}
    match = adapter.require(own, base=base, partial=partial)
    weights, depth = BlockWeights.parse(block_weights), depth_of(shapes)
    changes, lost = {}, []
    for module in match.matched:
        patches = adapter.modules[module]
        share = strength * weights.of(module, depth)
        check_strength(share, f"{adapter.name}, {module}")
        if large := next((patch.scale for patch in patches if abs(patch.scale) > LARGEST), None):
            raise LoraError(
                f"{adapter.name}: the alpha of {module} makes a scale of {large:g}; expected "
                f"{LARGEST:g} at most"
            )
        if any(patch.bias is not None for patch in patches):
            name = f"{module}.bias"
            if name not in shapes:
                lost.append(name)
            else:
                _check_bias(adapter, name, patches, shapes[name][0])
                if share:
                    changes[name] = Change(patches, share, bias=True)
        if share and any(patch.tensors for patch in patches):
            changes[modules[module]] = Change(patches, share, bias=False)
    return Match(match.matched, [*match.unmatched, *lost]), changes


def _check_bias(adapter: Adapter, name: str, patches: Sequence[Patch], rows: int) -> None:
    for patch in patches:
        start, stop = patch.span(rows)
        if patch.bias is not None and (stop > rows or patch.bias.numel() != stop - start):
            raise LoraError(f"{adapter.name}: {patch.bias.numel()} numbers for {name}, which has {rows}")


def apply(
    adapter: Adapter,
    model: nn.Module | Mapping[str, nn.Module],
    strength: float = 1.0,
    block_weights: Any = None,
    *,
    base: str = "the model",
    partial: bool = False,
) -> Match:
    """Add a LoRA to a model's weights in place; the opposite strength takes a plain LoRA off again.

    Everything is computed before anything is changed: after an error the model is as it was. Weights that are
    kept quantised are quantised again.

    Args:
        model: a DiT, or networks by part: ``dit``, ``bert``, ``t5``.
        block_weights: see :class:`BlockWeights`.
        partial: see :meth:`Adapter.require`.

    Raises:
        LoraError: if too little matches, a module has another size, or a weight leaves its dtype's range.
        ConfigError: if the block weights do not fit the number of blocks.
    """
    parts = {"dit": model} if isinstance(model, nn.Module) else model
    tensors = {f"{part}.{name}": p for part, net in parts.items() for name, p in net.named_parameters()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    match, changes = plan(adapter, shapes, strength, block_weights, base=base, partial=partial)
    new = {name: _new_value(name, tensors[name], change) for name, change in changes.items()}
    for name, value in new.items():
        if kitchen.is_quantised(tensors[name]):
            kitchen.put(tensors[name], value)
        else:
            tensors[name].data = value
    return match


def _new_value(name: str, parameter: Tensor, change: Change) -> Tensor:
    """In a parameter's dtype; in float32 for one that is kept quantised."""
    if kitchen.is_quantised(parameter):
        return _result(name, kitchen.packed_of(parameter).dense(), [change])
    return _result(name, parameter.data, [change])


def _result(name: str, tensor: Tensor, changes: Sequence[Change], dtype: torch.dtype | None = None) -> Tensor:
    """The tensor with all changes, rounded once."""
    dtype, value = dtype or tensor.dtype, tensor
    for change in changes:
        value = change(value)
    limit = torch.finfo(dtype).max
    low, high = (float(end) for end in value.aminmax())
    if not (-limit <= low and high <= limit):  # NaN is in no range
        raise LoraError(
            f"{name} would reach from {low:.4g} to {high:.4g}, which {dtype_name(dtype)} does not hold: "
            "use a lower strength or a wider dtype; if it does not help, the LoRA is damaged"
        )
    return cast(value, dtype)


class MergingSource(TensorSource):
    """A source that changes some of its tensors as they are read.

    Args:
        changes: by the source's names. The last few results are kept, since the diffusers layout reads each
            fused projection three times, a third at a time.
    """

    def __init__(self, source: TensorSource, changes: Mapping[str, Sequence[Change]]) -> None:
        self.path = source.path
        self.metadata = source.metadata
        self._source = source
        self._changes = changes
        self._kept: OrderedDict[tuple[str, torch.dtype], Tensor] = OrderedDict()

    def keys(self) -> list[str]:
        return self._source.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._source.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._source.dtype(key)

    def get(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        if key not in self._changes:
            return self._source.get(key, dtype)
        dtype = dtype or self.dtype(key)
        if (key, dtype) not in self._kept:
            size = self.numel(key) * dtype.itemsize
            while self._kept and size + sum(kept.nbytes for kept in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)
            value = _result(key, self._source.get(key), self._changes[key], dtype)
            if size > _KEPT_BYTES:
                return value
            self._kept[key, dtype] = value
        return self._kept[key, dtype]

    def scheme(self, key: str) -> Scheme | None:
        return self._source.scheme(key)

    def packed(self, key: str) -> Packed:
        """Quantised again, as it was, if it is changed."""
        scheme = self._source.scheme(key)
        if key not in self._changes or scheme is None:
            return self._source.packed(key)
        return pack(self.get(key, torch.float32), scheme, f"{self.path}: {key}")

    def release(self, key: str) -> None:
        self._source.release(key)

    def __contains__(self, key: object) -> bool:
        return key in self._source


@dataclass(frozen=True)
class Merged:
    """What :func:`merge_files` did: how each LoRA matched, and a line for each thing a user should know."""

    path: Path
    kind: FileKind
    layout: Layout
    matches: tuple[Match, ...]
    notes: tuple[str, ...]


def merge_files(
    base: Place,
    loras: Sequence[tuple[str | os.PathLike[str] | Adapter, float]],
    out: str | os.PathLike[str],
    *,
    layout: Layout | None = None,
    dtype: torch.dtype | None = None,
    block_weights: Any = None,
    load_key: str | None = None,
    overwrite: bool = False,
    partial: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Write a checkpoint with LoRAs merged into it, one tensor at a time and atomically.

    A weight is changed in float32 and rounded once, to the dtype of the output.

    Args:
        base: a DiT or an all-in-one checkpoint: a file, a folder, or what was opened there.
        loras: files, folders or adapters, each with its strength.
        layout: as of :func:`~..weights.convert.convert`; default: the base's own, for one in diffusers'
            folder and an ``out`` that ends in .safetensors ``comfy``.
        dtype: of the DiT; default: as it is.
        block_weights: what :meth:`BlockWeights.parse` takes, for all; or a list of :class:`BlockWeights`,
            one for each LoRA.
        load_key: which weights of a torch file that holds several.
        overwrite: an existing ``out`` may be replaced, if it is a file and no input.
        partial: see :meth:`Adapter.require`.
        progress: is called with bytes written and bytes in all.

    Raises:
        LoraError: if a LoRA cannot be read or does not fit, or a weight leaves its dtype's range.
        WeightsError: if the base is something else, or the output cannot be written or is there. Nothing
            half-written is left, and an older output stays.
        ConfigError: if the block weights do not fit the number of blocks.
    """
    out = Path(out)
    opened = bundle(base, only=("dit",), kinds=("dit",), load_key=load_key)
    layout = layout or _default_layout(opened.kind, out)
    if layout == "comfy":  # which alone holds text encoders and a VAE
        opened = bundle(opened)
    shapes = _shapes(opened, layout)
    given = [lora.files if isinstance(lora, Adapter) else (lora,) for lora, _ in loras]
    inputs = [opened.place, *itertools.chain.from_iterable(given)]
    form = f"the layout {layout}"
    check_output(out, inputs, overwrite=overwrite, folder=layout == "diffusers", form=form)
    adapters = [lora if isinstance(lora, Adapter) else read(lora) for lora, _ in loras]
    strengths = [strength for _, strength in loras]
    weights = each_weights(block_weights, len(loras))
    matches: list[Match] = []
    changes: dict[str, list[Change]] = {}
    for adapter, strength, share in zip(adapters, strengths, weights, strict=True):
        match, own = plan(adapter, shapes, strength, share, base=str(opened.place), partial=partial)
        matches.append(match)
        for name, one in own.items():
            changes.setdefault(name, []).append(one)
    extra = _record(opened.source, adapters, strengths, weights, matches)
    info, told = merged_info(opened.info, adapters, strengths)
    if told:
        extra[METADATA_KEY] = info.to_json()
    notes = [*_notes(opened.source, dtype, adapters, matches), *_requantised(opened, layout, dtype, changes)]

    def change(part: TensorSource) -> TensorSource:
        return MergingSource(
            part, {key: changes[name] for key in part if (name := full_name(key)) in changes}
        )

    done = convert(
        opened,
        out,
        layout=layout,
        dtype=dtype,
        told=False,
        change=change,
        extra=extra,
        inputs=inputs,
        overwrite=overwrite,
        progress=progress,
    )
    return Merged(out, done.kind, layout, tuple(matches), (*notes, *told, *done.notes))


def _default_layout(kind: FileKind, out: Path) -> Layout:
    file = kind.layout == "diffusers" and out.suffix == ".safetensors"
    return "comfy" if file else kind.layout  # type: ignore[return-value]


def _shapes(opened: Bundle, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Of what is written and can be changed; only the layout comfy holds text encoders."""
    only = ("dit", "bert", "t5") if layout == "comfy" else ("dit",)
    parts = {"dit": opened.dit, "bert": opened.bert, "t5": opened.mt5}
    return {
        f"{part}.{key}": source.shape(key)
        for part, source in parts.items()
        if source is not None and part in only
        for key in source
    }


def _record(
    source: TensorSource,
    adapters: Sequence[Adapter],
    strengths: Sequence[float],
    weights: Sequence[BlockWeights],
    matches: Sequence[Match],
) -> dict[str, str]:
    """Metadata that says what went in."""
    try:
        entries = parse_json(source.metadata.get(MERGED_KEY, "[]"), MERGED_KEY, kind=list, error=LoraError)
    except LoraError:
        entries = []
    for adapter, strength, share, match in zip(adapters, strengths, weights, matches, strict=True):
        entries.append({**recipe_entry(adapter, strength, share), "modules": len(match.matched)})
    names = [source.path.name, *(adapter.name for adapter in adapters)]
    metadata = {
        MERGED_KEY: json.dumps(entries, ensure_ascii=False),
        "modelspec.merged_from": ", ".join(names),
    }
    triggers = [adapter.trigger() for adapter in adapters if adapter.trigger()]
    if triggers:
        metadata["modelspec.trigger_phrase"] = ", ".join(dict.fromkeys(triggers))
    return metadata


def _requantised(
    opened: Bundle, layout: Layout, dtype: torch.dtype | None, changes: Mapping[str, object]
) -> list[str]:
    """What happens to quantised layers of what is written."""
    if layout == "diffusers":
        return []
    parts = {"dit": None if dtype else opened.dit, "bert": opened.bert, "t5": opened.mt5}
    schemes = {
        f"{part}.{key}": scheme
        for part, source in parts.items()
        if source is not None
        for key, scheme in source.schemes().items()
    }
    again = sorted({scheme.name for name, scheme in schemes.items() if name in changes})
    count = sum(name in changes for name in schemes)
    return [f"unpacked, changed and quantised again ({', '.join(again)}): {count} layers"] if count else []


def _notes(
    source: TensorSource, dtype: torch.dtype | None, adapters: Sequence[Adapter], matches: Sequence[Match]
) -> list[str]:
    notes = [f"{adapter.name}: {match}" for adapter, match in zip(adapters, matches, strict=True)]
    if (dtype or source.main_dtype()) in FP8_DTYPES:
        notes.append("8-bit weights lose most of a small change: with --dtype bf16 or fp16 it is kept")
    return notes
