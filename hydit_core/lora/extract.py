"""LoRAs from matrices: several LoRAs as one, the difference of two checkpoints as a LoRA.

A matrix is replaced by the best one of a lower rank, its truncated singular value decomposition. The energy
that is kept is the share of the squared singular values, which is that of the squared Frobenius norm.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LoraError, WeightsError
from ..model.config import DiTConfig
from ..weights.bundle import Bundle, Place, bundle
from ..weights.modelspec import file_metadata
from ..weights.source import TensorSource
from .adapter import Adapter
from .blocks import each_weights
from .combined import combined_metadata, recipe_entry
from .kinds import BiasOnly, LoRA
from .patch import Patch
from .weighted import factors

EXTRACTED_KEY = "hydit.extracted"

# Matrices that no LoRA format has: tables that are looked up.
_TABLES = ("style_embedder", "embeddings.", "shared.", "embed_tokens", "relative_attention_bias")

Progress = Callable[[int, int], object]
"""``(modules done, modules in all)``."""


class Combined(NamedTuple):
    """One LoRA made of several, the share of their energy that it keeps, and that of each module."""

    adapter: Adapter
    energy: float
    modules: dict[str, float]


class Extracted(NamedTuple):
    """A LoRA that stands for a difference.

    Attributes:
        energy: the share of the difference of all adapted matrices that is kept.
        modules: the same of each module.
        left_out: tensors that differ but have no place in a LoRA (biases, norms, tables), and the norm of
            each one's difference.
    """

    adapter: Adapter
    energy: float
    modules: dict[str, float]
    left_out: dict[str, float]


class _Energy:
    """Adds up the energy that is kept and the total."""

    def __init__(self) -> None:
        self.kept = self.total = 0.0
        self.modules: dict[str, float] = {}

    def add(self, module: str, kept: float, total: float) -> None:
        self.kept += kept
        self.total += total
        self.modules[module] = kept / total if total else 1.0

    @property
    def share(self) -> float:
        return self.kept / self.total if self.total else 1.0


def combine(
    adapters: Sequence[tuple[Adapter, float]],
    rank: int | None = None,
    *,
    block_weights: Any = None,
    depth: int | None = None,
    progress: Progress | None = None,
) -> Combined:
    """Several LoRAs with their strengths as one that does at strength 1 what they do together.

    Args:
        rank: None: concatenate the factors, exactly; the ranks add up. Else the rank to cut modules to that
            have more.
        block_weights: what :meth:`BlockWeights.parse` takes, for all; or a list of :class:`BlockWeights`,
            one for each LoRA. What they take to 0 is left out.
        depth: how many blocks the model has; default: see :func:`~.weighted.factors`.

    Raises:
        ConfigError: if the block weights do not fit the number of blocks, or it is not known.
        LoraError: for numbers that are not finite; if all strengths are 0; for DoRA, whose change depends on
            the weights below it; without a rank also for kinds that are no product of two factors (LoHa,
            LoKr, full differences).
    """
    if rank is not None and rank < 1:
        raise LoraError(f"rank {rank}: use 1 or more")
    for adapter, _ in adapters:
        adapter.require_finite()
    weights = each_weights(block_weights, len(adapters))
    groups: dict[str, Given] = {}
    for (adapter, strength), share in zip(adapters, weights, strict=True):
        for module, factor in factors(adapter, strength, share, depth).items():
            if factor:
                own = [(patch, factor, adapter.name) for patch in adapter.modules[module]]
                groups.setdefault(module, []).extend(own)
    if not groups:
        raise LoraError("all strengths are 0: nothing is left to combine")
    energy, modules = _Energy(), {}
    for number, (module, given) in enumerate(groups.items(), 1):
        _check_independent(module, given)
        modules[module] = [
            _combined(module, own, rank, energy) for own in _by_rows(module, given).values() if own
        ]
        if progress is not None:
            progress(number, len(groups))
    recipe = [recipe_entry(*given, share) for given, share in zip(adapters, weights, strict=True)]
    metadata = combined_metadata(adapters, recipe)
    name = " + ".join(adapter.name for adapter, _ in adapters)
    files = tuple(file for adapter, _ in adapters for file in adapter.files)
    return Combined(Adapter(modules, name, "peft", metadata, files), energy.share, energy.modules)


Given = list[tuple[Patch, float, str]]


def _check_independent(module: str, given: Given) -> None:
    """Raise for a change whose effect depends on the weights below it."""
    for patch, _, name in given:
        if patch.needs_base:
            raise LoraError(
                f"{name} {patch.needs_base} ({module}): what it does depends on the weights that it is"
                " applied to; merge it into a checkpoint and extract the difference"
            )


def _by_rows(module: str, given: Given) -> dict[tuple[int, int] | None, Given]:
    """The patches grouped by rows. Slices next to a patch of all rows are widened to all rows."""
    whole = next((patch.shape[0] for patch, _, _ in given if patch.rows is None and patch.shape), None)
    groups: dict[tuple[int, int] | None, Given] = {}
    for patch, strength, name in given:
        if patch.rows is not None and whole is not None:
            patch = _spread(module, patch, whole, name)
        groups.setdefault(patch.rows, []).append((patch, strength, name))
    return groups


def _spread(module: str, patch: Patch, rows: int, name: str) -> Patch:
    """A change of some rows as one of all rows."""
    if not isinstance(patch, LoRA) or patch.bias is not None:
        raise LoraError(f"{name}: {module} is {patch.kind} for some of its rows and cannot be combined")
    return patch.widened(rows)


def _combined(module: str, given: Given, rank: int | None, energy: _Energy) -> Patch:
    """One patch that is the sum of patches of the same rows."""
    rows, bias = given[0][0].rows, _bias(given)
    matrices = [(patch, strength) for patch, strength, _ in given if patch.tensors]
    if not matrices:
        return BiasOnly(rows=rows, bias=bias)
    factors = [(patch, strength) for patch, strength in matrices if isinstance(patch, LoRA)]
    if len(factors) == len(matrices):
        if rank is None or rank >= sum(patch.rank for patch, _ in factors):
            return replace(_joined(module, factors, energy), rows=rows, bias=bias)
        down = torch.cat([patch.tensors["down"].detach().double().flatten(1) for patch, _ in factors])
        ups = [patch.tensors["up"].detach().double().flatten(1) * (patch.scale * s) for patch, s in factors]
        down, up, kept, total = _cut_factors(torch.cat(ups, dim=1), down, rank)
    else:
        if rank is None:
            kinds = ", ".join(sorted({patch.kind for patch, _ in matrices}))
            raise LoraError(f"{given[0][2]}: {module} is {kinds}, not a product of two factors: give a rank")
        whole = sum(s * patch.delta().double() for patch, s in matrices)
        down, up, kept, total = cut(whole, rank)  # type: ignore[arg-type]
    energy.add(module, kept, total)
    return LoRA({"down": down.float(), "up": up.float()}, rows=rows, bias=bias)


def _joined(module: str, matrices: list[tuple[LoRA, float]], energy: _Energy) -> LoRA:
    """The factors side by side. Where all have one scale, their numbers stay what they were."""
    scales = [patch.scale * strength for patch, strength in matrices]
    common = scales[0] if len(set(scales)) == 1 else 1.0
    down = torch.cat([patch.tensors["down"].detach().flatten(1).float() for patch, _ in matrices])
    ups = [
        patch.tensors["up"].detach().flatten(1).float() * (scale / common if common else 1.0)
        for (patch, _), scale in zip(matrices, scales, strict=True)
    ]
    joined = LoRA({"down": down, "up": torch.cat(ups, dim=1)}, common)
    norm = joined.norm()
    energy.add(module, norm * norm, norm * norm)
    return joined


def _bias(given: Given) -> Tensor | None:
    found = [strength * patch.bias.detach().float() for patch, strength, _ in given if patch.bias is not None]
    return sum(found[1:], found[0]) if found else None


def _balanced(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The same product from factors of the same size, component by component: 16 bits hold both well."""
    a, b = down.norm(dim=1), up.norm(dim=0)
    ratio = torch.where((a > 0) & (b > 0), (b / a.clamp_min(1e-300)).sqrt(), torch.ones_like(a))
    return down * ratio[:, None], up / ratio


def _cut_factors(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """As :func:`cut` of up @ down, without that matrix."""
    left, small_left = torch.linalg.qr(up)
    right, small_right = torch.linalg.qr(down.T)
    u, values, v = torch.linalg.svd(small_left @ small_right.T, full_matrices=False)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    energy = values.square()
    return (
        root[:, None] * (v[:rank] @ right.T),
        (left @ u[:, :rank]) * root,
        float(energy[:rank].sum()),
        float(energy.sum()),
    )


def cut(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The best factors of a rank: down (r, in) and up (out, r), and the energy kept and in all.

    By the eigenvectors of the smaller Gram matrix, in float64: as exact as single precision needs, and
    several times faster than a full singular value decomposition. The factors are balanced in size.
    """
    matrix = matrix.double()
    tall = matrix.shape[0] >= matrix.shape[1]
    gram = matrix.T @ matrix if tall else matrix @ matrix.T
    values, vectors = torch.linalg.eigh(gram)  # ascending
    vectors = vectors[:, max(0, len(values) - rank) :].flip(1)
    if tall:
        up, down = matrix @ vectors, vectors.T
    else:
        up, down = vectors, vectors.T @ matrix
    # With orthonormal vectors on one side, the product's energy is that of the other.
    kept = float((up if tall else down).square().sum())
    down, up = _balanced(down, up)
    return down.contiguous(), up.contiguous(), kept, float(matrix.square().sum())


def extract(
    tuned: Place,
    base: Place,
    rank: int,
    *,
    load_key: str | None = None,
    progress: Progress | None = None,
) -> Extracted:
    """The difference of two checkpoints as a LoRA of the base; one matrix is in memory at a time.

    Args:
        tuned, base: files or folders in any layout, or what was opened there. Text encoders are compared
            where both have them.
        load_key: which weights of a torch file that holds several; of a base, too, if it has such.
        rank: of each module; matrices that are smaller get their full rank.

    Raises:
        WeightsError: if one is no HunyuanDiT.
        LoraError: if they have other dimensions, numbers that are not finite, or no matrix differs.
    """
    if rank < 1:
        raise LoraError(f"rank {rank}: use 1 or more")
    only = ("dit", "bert", "t5")
    ours = bundle(tuned, only=only, kinds=("dit",), load_key=load_key)
    try:
        theirs = bundle(base, only=only, kinds=("dit",), load_key=load_key)
    except WeightsError:  # of a base with one set of weights, or with a fault that is told here
        theirs = bundle(base, only=only, kinds=("dit",))
    pairs = _pairs(ours, theirs)
    total = sum(len(below) for _, _, below in pairs)
    energy, left_out, done = _Energy(), {}, 0
    modules: dict[str, list[Patch]] = {}
    for part, above, below in pairs:
        for key in below:
            change = above.get(key).float() - below.get(key).float()
            name = f"{part}.{key}"
            _check_finite(change, key, above, below)
            if bool(change.count_nonzero()):
                if _is_matrix(key, change):
                    module = name.removesuffix(".weight")
                    down, up, kept, whole = cut(change, rank)
                    energy.add(module, kept, whole)
                    modules[module] = [LoRA({"down": down.float(), "up": up.float()})]
                else:
                    left_out[name] = float(change.norm())
            for source in (above, below):
                source.release(key)
            done += 1
            if progress is not None:
                progress(done, total)
    if not modules:
        raise LoraError(
            f"no matrix of {ours.place} differs from {theirs.place}: there is nothing that a LoRA could hold"
            + (f" ({len(left_out)} other tensors differ)" if left_out else "")
        )
    recipe = {
        "tuned": ours.path.name,
        "base": theirs.path.name,
        "rank": rank,
        "energy": round(energy.share, 6),
    }
    assert theirs.dit is not None
    config = DiTConfig.from_state_dict(
        theirs.dit.shapes(), pooler_heads=theirs.info.pooler_heads, rope_base=theirs.info.rope_base
    )
    metadata = file_metadata(
        config, theirs.info, role="lora", extra={EXTRACTED_KEY: json.dumps(recipe, ensure_ascii=False)}
    )
    name, files = f"{ours.path.stem} - {theirs.path.stem}", (ours.place, theirs.place)
    adapter = Adapter(modules, name, "peft", metadata, files)
    return Extracted(adapter, energy.share, energy.modules, left_out)


def _pairs(ours: Bundle, theirs: Bundle) -> list[tuple[str, TensorSource, TensorSource]]:
    """What both have, part by part, with the same names and shapes."""
    assert ours.dit is not None and theirs.dit is not None
    found = [("dit", ours.dit, theirs.dit)]
    if ours.bert is not None and theirs.bert is not None:
        found.append(("bert", ours.bert, theirs.bert))
    if ours.mt5 is not None and theirs.mt5 is not None:
        found.append(("t5", ours.mt5, theirs.mt5))
    for part, above, below in found:
        one, two = above.shapes(), below.shapes()
        other = [key for key in {**two, **one} if one.get(key) != two.get(key)]
        if other:
            key = other[0]
            raise LoraError(
                f"{ours.path} is no tuned {theirs.path}: {len(other)} tensors of {part} have other shapes"
                f" or are missing, such as {key}: {one.get(key, 'absent')} and {two.get(key, 'absent')}"
            )
    return found


def _check_finite(change: Tensor, key: str, *sources: TensorSource) -> None:
    """Raise where a difference is not finite, for what it is the difference of."""
    if bool(change.isfinite().all()):
        return
    for source in sources:
        tensor = source.get(key).float()
        if count := tensor.numel() - int(tensor.isfinite().sum()):
            raise LoraError(f"{source.path}: {key} has {count:,} numbers that are not finite; it is damaged")
    raise LoraError(f"{sources[0].path}: the difference of {key} leaves the range of fp32")


def _is_matrix(key: str, change: Tensor) -> bool:
    return key.endswith(".weight") and change.dim() == 2 and not any(word in key for word in _TABLES)
