"""Several patches of one layer, such as slices of a fused projection, as one patch of all of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import LoraError
from .kinds import BiasOnly, Diff, DoRA, LoRA
from .patch import Patch


def fused(patches: Sequence[Patch], rows: int, *, where: str = "a module") -> Patch:
    """Several patches of one weight with ``rows`` rows as one patch of the whole weight.

    Plain LoRA stays LoRA: ranks add up, and rows that a slice does not touch get zeros. Other kinds become
    their difference. A DoRA on each slice of rows stays one if no row is left out.

    Raises:
        LoraError: a DoRA that cannot be one patch: it shares rows with another, or leaves some out; whole
            weights or biases of some rows.
    """
    if len(patches) == 1 and patches[0].rows in (None, (0, rows)):
        return replace(patches[0], rows=None)
    if any(patch.whole for patch in patches):
        raise LoraError(
            f"{where}: whole weights of a part of it, or beside changes, cannot be written as one; merge the "
            "LoRA into a base instead"
        )
    magnitude = _fused_magnitude(patches, rows, where)
    bias = _fused_bias(patches, rows)
    plain = [patch.plain for patch in patches if patch.tensors]
    if not plain:
        return BiasOnly(bias=bias)
    factors = [patch for patch in plain if isinstance(patch, LoRA)]
    one: Patch
    if len(factors) == len(plain):
        one = replace(_joined(factors, rows), bias=bias)
    else:
        one = Diff({"diff": _sum(plain, rows)}, bias=bias)
    return one if magnitude is None else DoRA.over(one, magnitude)


def _joined(patches: Sequence[LoRA], rows: int) -> LoRA:
    """Their factors side by side."""
    scales = {patch.scale for patch in patches}
    scale = scales.pop() if len(scales) == 1 else 1.0
    dtype = functools.reduce(torch.promote_types, (t.dtype for p in patches for t in p.tensors.values()))
    if scale != patches[0].scale:
        dtype = torch.float32  # the scales go into the tensors
    ups, downs = [], []
    for patch in patches:
        down, up = (patch.tensors[name].detach().to(dtype) for name in ("down", "up"))
        scaled = up if scale == patch.scale else up * patch.scale
        ups.append(replace(patch, tensors={"down": down, "up": scaled}).widened(rows).tensors["up"])
        downs.append(down)
    return LoRA({"down": torch.cat(downs), "up": torch.cat(ups, 1)}, scale)


def _sum(patches: Sequence[Patch], rows: int) -> Tensor:
    total: Tensor | None = None
    for patch in patches:
        delta = patch.delta()
        if total is None:
            total = delta.new_zeros(rows, delta.shape[1])
        start, stop = patch.span(rows)
        total[start:stop] += delta
    assert total is not None
    return total


def _fused_magnitude(patches: Sequence[Patch], rows: int, where: str) -> Tensor | None:
    if not any(isinstance(patch, DoRA) for patch in patches):
        return None
    ordered = sorted(patches, key=lambda patch: patch.span(rows))
    starts, stops = zip(*(patch.span(rows) for patch in ordered), strict=True)
    whole = [patch.magnitude for patch in ordered if isinstance(patch, DoRA) and not patch.axis]
    if len(whole) < len(ordered) or [*starts, rows] != [0, *stops]:
        raise LoraError(
            f"{where}: several changes with a DoRA among them cannot be written as one; merge the LoRA into"
            " a base instead"
        )
    return torch.cat([magnitude.detach().flatten() for magnitude in whole])


def _fused_bias(patches: Sequence[Patch], rows: int) -> Tensor | None:
    given = [patch for patch in patches if patch.bias is not None]
    if not given:
        return None
    bias = torch.zeros(rows)
    for patch in given:
        start, stop = patch.span(rows)
        bias[start:stop] += patch.bias.detach().float().flatten()  # type: ignore[union-attr]
    return bias
