"""What a run waits for and how much memory it takes, for its records."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from .distributed import Processes

MEBIBYTE = 1 << 20
NOTABLE_WAIT = 0.1
"""The share of a step's time from which on waiting for data is told on the bar and on the page."""


class Usage:
    """Seconds spent on steps, on waiting for data and on saving, and memory; since the last :meth:`flush`.

    The first wait of a process is not counted: it starts the data workers.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._waited = self._worked = self._saved = 0.0
        self._steps = 0
        self._started = False

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what takes the next batch."""
        begun = time.monotonic()
        yield
        if self._started:
            self._waited += time.monotonic() - begun
        self._started = True

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Around one micro-batch."""
        begun = time.monotonic()
        yield
        self._worked += time.monotonic() - begun

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around what a checkpoint takes of the training's time."""
        begun = time.monotonic()
        yield
        self._saved += time.monotonic() - begun

    def step_done(self) -> None:
        """One more optimizer step."""
        self._steps += 1

    def flush(self) -> dict[str, float]:
        """For a record, of the process that has the most of each; all processes have to call it.

        ``data_wait`` seconds a step waited for data, ``data_share`` of the step's time; ``save_stall``
        seconds in all that training stood still for checkpoints; ``rss_mib`` what the process holds in
        memory, ``device_peak_mib`` the most that its tensors took on a GPU, in MiB. What cannot be known, and
        a stall that there was not, is left out.
        """
        own = {
            "data_wait": self._waited / max(1, self._steps),
            "data_share": self._waited / max(1e-9, self._waited + self._worked),
            "save_stall": self._saved,
            "rss_mib": resident_bytes() / MEBIBYTE,
            "device_peak_mib": device_peak_bytes(self.processes.device) / MEBIBYTE,
        }
        self._waited = self._worked = self._saved = 0.0
        self._steps = 0
        table = torch.zeros(self.processes.world, len(own), dtype=torch.float64)
        table[self.processes.rank] = torch.tensor([*own.values()], dtype=torch.float64)
        most = self.processes.sum(table.to(self.processes.device)).amax(0).tolist()
        found = dict(zip(own, most, strict=True))
        digits = {"data_wait": 6, "data_share": 4, "save_stall": 3}
        return {
            name: round(value, digits.get(name, 1))
            for name, value in found.items()
            if value or name.startswith("data_")
        }


def resident_bytes() -> int:
    """The memory of this process; on systems that tell only the most so far, that; 0 if nobody tells."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_peak_bytes(device: torch.device) -> int:
    """The most that tensors took on a GPU so far; 0 elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
