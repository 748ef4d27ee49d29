"""Slices of a fused projection as one patch: DoRA's magnitudes, and what cannot be one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hydit_core.errors import LoraError
from hydit_core.lora.adapter import changed
from hydit_core.lora.fuse import fused
from hydit_core.lora.kinds import Diff, DoRA, LoRA
from hydit_core.lora.patch import Patch


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)))


def slice_of(start: int, stop: int, *, dora: bool = True, axis: int = 0) -> Patch:
    """A change of rank 2 of some rows of a weight (12, 5)."""
    up, down = rand(stop - start, 2, seed=start), rand(2, 5, seed=start)
    length = 5 if axis else stop - start
    magnitude = rand(length, seed=start).abs() + 1 if dora else None
    plain = LoRA({"up": up, "down": down}, 0.5, rows=(start, stop))
    return plain if magnitude is None else DoRA.over(plain, magnitude, axis)


def test_doras_on_every_slice_are_one_dora_whatever_their_order() -> None:
    slices = [slice_of(8, 12), slice_of(0, 4), slice_of(4, 8)]
    weight, expected = rand(12, 5, seed=9).double(), torch.zeros(12, 5, dtype=torch.float64)
    for patch in slices:
        start, stop = patch.rows or (0, 0)
        up, down = (patch.tensors[name].double() for name in ("up", "down"))
        moved = weight[start:stop] + 0.5 * up @ down
        assert isinstance(patch, DoRA)
        expected[start:stop] = patch.magnitude.double()[:, None] * moved / moved.norm(dim=1, keepdim=True)
    whole = fused(slices, 12)
    assert whole.rows is None and isinstance(whole, DoRA)
    torch.testing.assert_close(changed(weight.float(), [whole], 1.0).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "slices",
    [
        [slice_of(0, 4), slice_of(4, 8)],
        [slice_of(0, 4), slice_of(8, 12)],
        [slice_of(4, 8), slice_of(8, 12)],
        [slice_of(0, 8), slice_of(4, 12)],
        [slice_of(0, 8), slice_of(8, 12, dora=False)],
        [slice_of(0, 8), slice_of(8, 12, axis=1)],
    ],
    ids=["end left out", "middle left out", "start left out", "shared rows", "one plain", "by columns"],
)
def test_a_dora_that_is_not_one_change_of_the_whole_is_refused(slices: list[Patch]) -> None:
    with pytest.raises(LoraError, match=r"^blocks\.0: .*DoRA.*cannot be written as one; merge the LoRA into"):
        fused(slices, 12, where="blocks.0")


@pytest.mark.parametrize("kind", ["diff", "lora"])
def test_changes_of_the_whole_and_of_slices_add_up(kind: str) -> None:
    up, down, whole = rand(4, 2, seed=1), rand(2, 5, seed=2), rand(12, 5, seed=3)
    expected = torch.zeros(12, 5, dtype=torch.float64)
    expected[4:8] = 0.5 * up.double() @ down.double()
    if kind == "diff":
        other = Diff({"diff": whole})
        expected += whole.double()
    else:
        other = LoRA({"up": rand(12, 1), "down": rand(1, 5)}, 2.0)
        expected += 2 * rand(12, 1).double() @ rand(1, 5).double()
    one = fused([LoRA({"up": up, "down": down}, 0.5, rows=(4, 8)), other], 12)
    assert one.kind == kind and one.rows is None
    weight = rand(12, 5, seed=9)
    found = changed(weight, [one], 0.7).double()
    torch.testing.assert_close(found, weight.double() + 0.7 * expected, rtol=0, atol=1e-5)
