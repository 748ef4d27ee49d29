"""Describes a LoRA, as text and as a picture."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..dtypes import dtype_name
from ..embedded import embedded_model
from ..errors import LoraError
from ..model.config import DIT_G2_V11, DIT_G2_V12, DIT_XL2_V12, DiTConfig
from ..model.dit import DiT
from ..new_files import atomic_path
from ..untrusted import parse_json
from ..weights.bundle import bundle
from .adapter import Adapter, Match, module_shapes
from .blocks import depth_of
from .kinds import DoRA

_BLOCK = re.compile(r"^(dit\.blocks|bert\.encoder\.layer|t5\.encoder\.block)\.(0|[1-9][0-9]{0,3})\.(.+)$")
_OTHER = "outside"
_BAR = 30
_SHOWN_METADATA = ("modelspec.title", "modelspec.architecture", "hydit.version", "hydit.source")

Norms = dict[str, dict[str, float]]
"""By place (``dit.blocks 3``, ``dit outside``), by module there: the norm of the change."""


def norms(adapter: Adapter) -> Norms:
    """The Frobenius norm of each module's change at strength 1 (of a DoRA: without its magnitude)."""
    table: Norms = {}
    for module, patches in adapter.modules.items():
        match = _BLOCK.match(module)
        place = f"{match[1]} {match[2]}" if match else f"{module.partition('.')[0]} {_OTHER}"
        name = match[3] if match else module.partition(".")[2]
        table.setdefault(place, {})[name] = math.hypot(*(patch.norm() for patch in patches))
    return dict(sorted(table.items(), key=lambda item: _order(item[0])))


def _order(place: str) -> tuple[str, int]:
    name, _, number = place.partition(" ")
    return (name, int(number)) if number.isdigit() else (name + ".", 10**9)


def base_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """The modules of a checkpoint: its DiT and the text encoders that it has.

    Raises:
        WeightsError: if it is no checkpoint of HunyuanDiT or of a text encoder.
    """
    parts = bundle(path, only=("dit", "bert", "t5"))
    sources = {"dit": parts.dit, "bert": parts.bert, "t5": parts.mt5}
    shapes: dict[str, tuple[int, ...]] = {}
    for part, source in sources.items():
        if source is not None:
            shapes |= module_shapes(source.shapes(), part)
    return shapes


def fitting(adapter: Adapter) -> tuple[str, Match] | None:
    """The known DiT that it fits, the embedded or a published one, and how well."""
    best = _fitting(adapter)
    return best and best[:2]


def known_depth(adapter: Adapter) -> int | None:
    """The number of blocks of the known DiT that it fits; None if it fits none."""
    best = _fitting(adapter)
    return best and depth_of(best[2])


def _fitting(adapter: Adapter) -> tuple[str, Match, Mapping[str, Sequence[int]]] | None:
    dits: list[tuple[str, Any]] = [
        ("HunyuanDiT-g/2 v1.2", DIT_G2_V12),
        ("HunyuanDiT-g/2 v1.0 or v1.1", DIT_G2_V11),
        ("HunyuanDiT-XL/2", DIT_XL2_V12),
        (f"the embedded {embedded_model().stem}", embedded_model()),
    ]
    own = Adapter({key: value for key, value in adapter.modules.items() if key.startswith("dit.")})
    found: list[tuple[str, Match, Mapping[str, Sequence[int]]]] = []
    for name, base in dits:
        shapes = _published(base) if isinstance(base, DiTConfig) else base_shapes(base)
        try:
            found.append((name, own.require(shapes, base=name, partial=True), shapes))
        except LoraError:
            continue
    return max(found, key=lambda item: len(item[1].matched), default=None)


@cache
def _published(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return module_shapes({key: tuple(t.shape) for key, t in DiT(config).state_dict().items()})


def describe(adapter: Adapter, base: str | os.PathLike[str] | None = None) -> str:
    """Everything a user may want to know about a LoRA, as lines of text.

    Args:
        base: a checkpoint to compare with; default: the models that are known.

    Raises:
        LoraError: if it has nothing for ``base`` or is of other dimensions.
    """
    lines = [f"{label:13} {text}" for label, text in _rows(adapter)]
    lines += [f"{label:13} {text}" for label, text in _fit_rows(adapter, base)]
    return "\n".join([*lines, "", *_targets(adapter), "", *_table(norms(adapter))])


def _rows(adapter: Adapter) -> Iterator[tuple[str, str]]:
    yield "LoRA", f"{adapter.name}: {adapter.describe()}"
    patches = list(adapter.patches())
    dtypes = {dtype_name(tensor.dtype) for patch in patches for tensor in patch.tensors.values()}
    count = sum(tensor.numel() for patch in patches for tensor in patch.tensors.values())
    yield "numbers", f"{count:,} in {', '.join(sorted(dtypes)) or 'biases'}"
    with_rank = [patch for patch in patches if patch.rank]
    if with_rank:
        yield "rank", _counts(Counter(patch.rank for patch in with_rank))
        yield "alpha", _counts(Counter(_short(patch.alpha) for patch in with_rank))
        yield "scale", _counts(Counter(_short(patch.scale) for patch in with_rank))
    axes = Counter(patch.axis for patch in patches if isinstance(patch, DoRA))
    for axis, number in sorted(axes.items()):
        yield "DoRA", f"{number} modules, one length for each {('output row', 'input column')[axis]}"
    if whole := sum(patch.whole for patch in patches):
        yield "whole", f"{whole} modules with weights or biases that take the place of the base's"
    if biases := sum(patch.bias is not None for patch in patches):
        yield "biases", f"{biases}"
    wrong = {module: sum(p.not_finite() for p in own) for module, own in adapter.modules.items()}
    if count := sum(wrong.values()):
        places = [module for module, number in wrong.items() if number]
        yield "not finite", f"{count:,} numbers in {len(places)} modules, first {places[0]}: it is damaged"
    if adapter.trigger():
        yield "trigger", adapter.trigger()
    if tags := _tags(adapter.metadata):
        yield "tags", tags
    for key in _SHOWN_METADATA:
        if adapter.metadata.get(key):
            yield key.rpartition(".")[2], " ".join(adapter.metadata[key].split())[:200]


def _fit_rows(adapter: Adapter, base: str | os.PathLike[str] | None) -> Iterator[tuple[str, str]]:
    if base is not None:
        match = adapter.require(base_shapes(base), base=str(base), partial=True)
        yield "base", f"{base}: {match}"
        if match.unmatched:
            yield "unmatched", ", ".join(match.unmatched)
        return
    if not any(key.startswith("dit.") for key in adapter.modules):
        return
    found = fitting(adapter)
    yield "fits", f"{found[0]}: {found[1]}" if found else "no DiT that is known; name yours with --base"


def _counts(counter: Mapping[Any, int]) -> str:
    if len(counter) == 1:
        return str(next(iter(counter)))
    return ", ".join(f"{value} ({number} modules)" for value, number in sorted(counter.items()))


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _tags(metadata: Mapping[str, str]) -> str:
    """The most frequent words of the captions, in files from kohya's trainer."""
    try:
        sets = parse_json(metadata.get("ss_tag_frequency", "{}"), "ss_tag_frequency", error=LoraError)
        counts: Counter[str] = Counter()
        for tags in sets.values():
            counts.update(tags)
    except (LoraError, AttributeError, TypeError):
        return ""
    return ", ".join(tag.strip() for tag, _ in counts.most_common(8))


def _targets(adapter: Adapter) -> list[str]:
    counts: Counter[str] = Counter()
    for module in adapter.modules:
        counts[_BLOCK.sub(lambda match: f"{match[1]}.*.{match[3]}", module)] += 1
    return ["modules", *(f"  {number:4} x {name}" for name, number in counts.items())]


def _table(table: Norms) -> list[str]:
    totals = {place: math.hypot(*modules.values()) for place, modules in table.items()}
    longest = max(filter(math.isfinite, totals.values()), default=0.0) or 1.0
    width = max(map(len, totals), default=0)
    lines = ["norm of the change at strength 1"]
    for place, total in totals.items():
        filled = total / longest if math.isfinite(total) else 0
        lines.append(f"  {place:{width}}  {total:10.4g}  {'#' * round(_BAR * filled)}")
    return lines


def plot(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Draw the norms as a picture: a row for each kind of module, a column for each block.

    Raises:
        LoraError: if the name does not have the suffix of a picture.
        WeightsError: if it cannot be written.
    """
    from PIL import Image, ImageDraw

    encoding = Image.registered_extensions().get(Path(path).suffix.lower())
    if encoding not in Image.SAVE:
        raise LoraError(f"cannot write {path}: give it the suffix of a picture, such as .png")
    table = norms(adapter)
    kinds = list(dict.fromkeys(_kind(place, name) for place, row in table.items() for name in row))
    # Those that occur: a LoRA of two blocks is no wide picture, whatever their numbers.
    columns = sorted({int(p.split()[1]) for p in table if p.split()[1].isdigit()}) or [0]
    values = (value for row in table.values() for value in row.values())
    top = max(filter(math.isfinite, values), default=0.0) or 1.0
    cell, left, head = 20, 8 + 7 * max(map(len, kinds)), 40
    title = f"{adapter.name}: norm of the change by block, white 0, black {top:.3g}"
    wide = int(ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(title)) + 16
    image = Image.new(
        "RGB", (max(left + len(columns) * cell + 10, wide), head + len(kinds) * cell + 24), "white"
    )
    draw = ImageDraw.Draw(image)
    draw.text((8, 8), title, fill="black")
    for y, kind in enumerate(kinds):
        draw.text((4, head + y * cell + 4), kind, fill="black")
    for index, block in enumerate(columns):
        if block % 5 == 0 or (index and block != columns[index - 1] + 1):
            draw.text((left + index * cell + 4, head + len(kinds) * cell + 4), str(block), fill="black")
    for place, row in table.items():
        number = place.split()[1]
        x = left + (columns.index(int(number)) if number.isdigit() else 0) * cell
        for name, value in row.items():
            y = head + kinds.index(_kind(place, name)) * cell
            share = value / top if math.isfinite(value) else 1.0
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=_color(share), outline="lightgray")
    with atomic_path(path) as temporary:
        image.save(temporary, format=encoding)


def _kind(place: str, name: str) -> str:
    part, number = place.split()
    return f"{part}.*.{name}" if number.isdigit() else f"{part}.{name}"


def _color(share: float) -> tuple[int, int, int]:
    """White over blue to black."""
    level = 1 - share
    return round(255 * level**2), round(255 * level**1.3), round(255 * level**0.6)
