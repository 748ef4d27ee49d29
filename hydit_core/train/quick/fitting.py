"""The batch, precision and checkpointing with which a step fits into the memory that is free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...offload.copier import available_memory
from ...plan import free_memory
from .choices import Fit

SPARE = 1.5 * 2**30
"""Libraries, buffers and what else is not in the estimate."""


def memory_of(device: torch.device) -> int | None:
    """Bytes that a training can take there; None if nobody tells."""
    return free_memory(device) if device.type == "cuda" else available_memory()


def candidates(batch: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Ways to make a step of ``batch`` samples, the fastest first."""
    precision = "bf16" if device.type == "cuda" else "fp32"
    for size in dict.fromkeys(size for size in (batch, 2, 1) if batch % size == 0):
        yield {"batch": size, "precision": precision, "checkpointing": False}
    frugal = {"batch": 1, "precision": precision, "checkpointing": True}
    if batch > 1:
        yield {**frugal, "batch": batch}
    yield frugal
    if precision != "bf16":
        yield {**frugal, "precision": "bf16"}
    yield {**frugal, "precision": "bf16", "base_precision": "fp8"}


def fit(
    batch: int, device: torch.device, free: int | None, needs: Callable[[dict[str, Any]], int]
) -> tuple[Fit, bool]:
    """The first candidate that fits, and whether it does; the most frugal one where none does.

    ``needs`` estimates the bytes of one.
    """
    where = "GPU" if device.type == "cuda" else "computer"
    found: dict[str, Any] = {}
    for found in candidates(batch, device):
        need = needs(found)
        if free is None or need + SPARE <= free:
            room = "" if free is None else f" of {_size(free)} free on this {where}"
            return _fit(found, batch, f"takes about {_size(need + SPARE)}{room}"), True
    assert free is not None
    reason = f"takes about {_size(need + SPARE)}, but only {_size(free)} are free on this {where}"
    return _fit(found, batch, reason), False


def _fit(found: dict[str, Any], batch: int, reason: str) -> Fit:
    size = found["batch"]
    return Fit(
        size, batch // size, found["precision"], found["checkpointing"], found.get("base_precision"), reason
    )


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
