"""Patches in other shapes that change a weight just the same."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import LoraError
from .adapter import Patch


def swap_halves(patch: Patch) -> Patch:
    """The patch of a weight whose two halves of rows have changed places."""
    tensors = dict(patch.tensors)
    if patch.kind == "lokr":
        first = "w1" if "w1" in tensors else "w1_a"
        if tensors[first].shape[0] == 1:  # the rows are those of the second factor
            first = "w2" if "w2" in tensors else "w2_a"
        if tensors[first].shape[0] % 2:
            return _swap_rows(Patch("diff", {"diff": patch.delta()}), patch)
        tensors[first] = _swapped(tensors[first])
        return _swap_rows(replace(patch, tensors=tensors), patch)
    return _swap_rows(patch, patch)


def _swap_rows(patch: Patch, given: Patch) -> Patch:
    per_row = {"lora": ("up",), "loha": ("w1_a", "w2_a"), "diff": ("diff",), "set": ("value",)}.get(
        patch.kind, ()
    )
    tensors = {k: _swapped(v) if k in per_row else v for k, v in patch.tensors.items()}
    magnitude, bias = given.magnitude, given.bias
    if magnitude is not None and given.magnitude_axis == 0:
        magnitude = _swapped(magnitude)
    return replace(
        patch,
        tensors=tensors,
        magnitude=magnitude,
        magnitude_axis=given.magnitude_axis,
        bias=None if bias is None else _swapped(bias),
    )


def _swapped(tensor: Tensor) -> Tensor:
    return tensor.roll(len(tensor) // 2, 0)


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
    shaped = [patch for patch in patches if patch.tensors]
    if not shaped:
        return Patch("diff", {}, bias=bias)
    if any(patch.kind != "lora" for patch in shaped):
        return Patch("diff", {"diff": _sum(shaped, rows)}, magnitude=magnitude, bias=bias)
    scales = {patch.scale for patch in shaped}
    scale = scales.pop() if len(scales) == 1 else 1.0
    dtype = functools.reduce(torch.promote_types, (t.dtype for p in shaped for t in p.tensors.values()))
    if scale != shaped[0].scale:
        dtype = torch.float32  # the scales go into the tensors
    ups = []
    for patch in shaped:
        up = patch.tensors["up"].detach().reshape(-1, patch.rank).to(dtype)
        start, stop = patch.rows or (0, rows)
        whole = torch.zeros(rows, patch.rank, dtype=dtype, device=up.device)
        whole[start:stop] = up if scale == patch.scale else up * patch.scale
        ups.append(whole)
    down = torch.cat([patch.tensors["down"].detach().to(dtype) for patch in shaped])
    return Patch("lora", {"down": down, "up": torch.cat(ups, 1)}, scale, magnitude=magnitude, bias=bias)


def _sum(patches: Sequence[Patch], rows: int) -> Tensor:
    total: Tensor | None = None
    for patch in patches:
        delta = patch.delta()
        if total is None:
            total = delta.new_zeros(rows, delta.shape[1])
        start, stop = patch.rows or (0, rows)
        total[start:stop] += delta
    assert total is not None
    return total


def _fused_magnitude(patches: Sequence[Patch], rows: int, where: str) -> Tensor | None:
    if all(patch.magnitude is None for patch in patches):
        return None
    ordered = sorted(patches, key=lambda patch: patch.rows or (0, rows))
    ends = [0, *((patch.rows or (0, rows))[1] for patch in ordered)]
    starts = [(patch.rows or (0, rows))[0] for patch in ordered]
    whole = [patch.magnitude for patch in ordered if patch.magnitude is not None and not patch.magnitude_axis]
    if len(whole) < len(ordered) or starts != ends[:-1] or ends[-1] != rows:
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
        start, stop = patch.rows or (0, rows)
        bias[start:stop] += patch.bias.detach().float().flatten()  # type: ignore[union-attr]
    return bias
