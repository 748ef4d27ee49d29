"""The device under test, the precisions to try on it, and how far two results differ."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

_CHOSEN = os.environ.get("HYDIT_GPU_DEVICE") or ("cuda" if torch.cuda.is_available() else None)
DEVICE = None if _CHOSEN is None else torch.device(_CHOSEN)
CUDA = DEVICE is not None and DEVICE.type == "cuda"
SMALL = not CUDA
"""Whether sizes shrink, so that a CPU is done in a minute."""


class Precision(NamedTuple):
    """What to compute in, and how much of its result's norm a network may then lose.

    float32 sums in another order lose some 1e-6. TF32 and float16 have 10 bits of mantissa, so that one
    rounding costs up to 5e-4; bfloat16 has 7: 4e-3. Roundings of many layers add up like random steps, and
    the networks here lose 9e-3 in bfloat16 on a CPU; what is allowed is about three times that, and an eighth
    of it for 10 bits. A wrong operand or a lost term costs 1e-1 and more.
    """

    dtype: torch.dtype
    tf32: bool
    tolerance: float


ALL = {
    "fp32": Precision(torch.float32, False, 2e-5),
    "tf32": Precision(torch.float32, True, 3e-3),
    "fp16": Precision(torch.float16, False, 3e-3),
    "bf16": Precision(torch.bfloat16, False, 2.5e-2),
}
PRECISIONS = {name: ALL[name] for name in (ALL if CUDA else ("fp32", "bf16"))}


@contextmanager
def computing(precision: Precision) -> Iterator[None]:
    """TF32 on or off inside, for matrix products and convolutions; without gradients."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = precision.tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def distance(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, computed in float64; NaN if anything is not finite."""
    a, b = (value.detach().cpu().double() for value in (found, expected))
    assert a.shape == b.shape, f"{tuple(a.shape)} instead of {tuple(b.shape)}"
    return ((a - b).norm() / b.norm()).item()


def assert_close(
    found: Tensor,
    expected: Tensor,
    tolerance: float,
    figure: Callable[[str, float], None],
    name: str = "error",
) -> None:
    """``distance(found, expected)`` is a figure of the test and at most ``tolerance``; NaN never passes."""
    error = distance(found, expected)
    figure(name, error)
    assert error <= tolerance, f"{name} {error:.2e}, at most {tolerance:.0e} expected"
