"""Copies of weights on the device, made beside its computing where the device can do both."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Copier:
    """Copies tensors to ``device`` and says when they may be used and forgotten; here, all at once.

    What a mark is, is the subclass's business: the device's progress up to a point.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """Begin to copy; returns the copies and a mark behind them."""
        return [tensor.to(self.device) for tensor in tensors], None

    def use(self, mark: Any) -> None:
        """What is computed from now on waits for the copies before ``mark``. The host does not."""

    def mark(self) -> Any:
        """A mark behind everything that was given to the device to compute."""
        return None

    def wait(self, mark: Any) -> None:
        """Let the host wait until the device has passed ``mark``."""

    def pins(self, size: int) -> bool:
        """Whether ``size`` bytes of the host's memory should be pinned, which speeds copies up."""
        return False


class CudaCopier(Copier):
    """Copies on a stream of their own.

    No copy may be forgotten before the host has waited for a mark behind its last use: the allocator knows
    of the copies' stream only.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.stream = torch.cuda.Stream(device)

    def start(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        with torch.cuda.stream(self.stream):
            copies = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
            return copies, self.stream.record_event()

    def use(self, mark: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def mark(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, mark: Any) -> None:
        mark.synchronize()

    def pins(self, size: int) -> bool:
        """Up to half of what the host has left: pinned memory cannot be swapped out."""
        available = available_memory()
        return available is not None and 2 * size <= available


def copier_for(device: torch.device) -> Copier:
    """The copier of a device."""
    return CudaCopier(device) if device.type == "cuda" else Copier(device)


def available_memory() -> int | None:
    """Bytes that this process can take on the host without swapping; None where Linux does not tell."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        with contextlib.suppress(OSError, ValueError):  # a container's own limit; "max" is none
            group = Path("/sys/fs/cgroup")
            limit = int((group / "memory.max").read_text("ascii"))
            available = min(available, limit - int((group / "memory.current").read_text("ascii")))
        return max(0, available)
    return None


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """The ordinary tensors that a tensor of another class, such as a quantized one, is made of; or itself."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    return [part for name in flatten()[0] for part in plain_parts(getattr(tensor, name))]


def pin(tensors: Sequence[Tensor]) -> None:
    """Put tensors of the host into pinned memory."""
    for tensor in tensors:
        for part in plain_parts(tensor):
            if not part.is_pinned():
                part.data = part.data.pin_memory()
