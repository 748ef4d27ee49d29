"""Work beside the training, one job at a time, and copies of tensors for it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..offload.copier import available_memory

SPARE = 1 << 30
"""What a copy leaves free of the host's memory."""
_SLAB = 1 << 28
_ALIGNMENT = 64


class Background:
    """Runs one job at a time in a thread. What a job raises is kept for whoever asks for it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Begin ``job``. The one before has to be over, see :meth:`wait`."""
        # A daemon: a second Ctrl-C, which asks for an end at once, does not wait for it.
        self._thread = threading.Thread(target=self._run, args=(job,), name="saving", daemon=True)
        self._thread.start()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:  # told where the training can end because of it
            self._error = error

    def join(self) -> None:
        """Until the job is over."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(1.0)  # on Windows, Ctrl-C is not heard within one long wait

    def check(self) -> None:
        """Raise what the last job that is over has raised, once."""
        if self._thread is None or not self._thread.is_alive():
            error, self._error = self._error, None
            if error is not None:
                raise error

    def wait(self) -> None:
        """Until the job is over; raises what it raised."""
        self.join()
        self.check()

    def settle(self) -> None:
        """Until the job is over, however it ended."""
        with contextlib.suppress(Exception):
            self.wait()


class HostCopies:
    """Copies of tensors in the host's memory, whose places are used again for the next ones.

    Pinned where the tensors are on a GPU: copies are then made at the full speed of the bus.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._places: dict[str, Tensor] = {}
        self._rest = torch.empty(0, dtype=torch.uint8)

    def fit(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether there is memory for their copies, beside those of this machine's other processes."""
        if self._places:
            return True
        size = sum(tensor.nbytes for tensor in tensors.values())
        return size + SPARE <= memory_for_copies()

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of ``tensors``, complete when this returns. The next call may overwrite them."""
        copies = {name: self._place(name, tensor) for name, tensor in tensors.items()}
        with torch.no_grad():
            for name, tensor in tensors.items():
                copies[name].copy_(tensor, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return copies

    def _place(self, name: str, like: Tensor) -> Tensor:
        found = self._places.get(name)
        if found is None or found.shape != like.shape or found.dtype != like.dtype:
            found = self._places[name] = self._fresh(like.nbytes).view(like.dtype).view(like.shape)
        return found

    def _fresh(self, size: int) -> Tensor:
        """So many bytes. Large pieces are cut up: torch rounds each pinned one up to a power of two."""
        padded = -(-size // _ALIGNMENT) * _ALIGNMENT
        if padded > len(self._rest):
            pinned = self._device.type == "cuda"
            made = torch.empty(max(padded, _SLAB), dtype=torch.uint8, pin_memory=pinned)
            if padded >= _SLAB:
                return made[:size]
            self._rest = made
        piece, self._rest = self._rest[:size], self._rest[padded:]
        return piece


def memory_for_copies() -> int:
    """Bytes of the host's memory for this process's copies; where the system does not tell, a few."""
    free = available_memory()
    if free is None:
        return 2 * SPARE
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
