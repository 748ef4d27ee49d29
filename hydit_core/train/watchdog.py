"""Ends a process that hangs: a launcher can then start it anew, and the run goes on from its checkpoint."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .distributed import Processes
from .sections import WatchdogSection
from .stopping import tell

TICK = 1.0
"""Seconds between two looks."""
STUCK = 3
"""The exit code: the run ended in the middle and can be continued."""


class Watchdog:
    """Knows in which phase the main thread is, and since when; a thread calls ``bite`` if that is too long.

    A thread that says every few seconds that the process lives would miss a deadlock: this one looks at the
    progress of the main thread. Time in which the whole process stands still, stopped by a terminal or with
    its machine asleep, does not count.

    ``bite`` gets the phase and the seconds spent in it.
    """

    def __init__(
        self, limits: WatchdogSection, bite: Callable[[str, float], None], *, tick: float = TICK
    ) -> None:
        self.limits = limits.model_dump()
        self.bite = bite
        self.tick = tick
        self._phase = ""
        self._spent = 0.0
        self._lock = threading.Lock()
        self._over = threading.Event()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a part of the main thread's work that has a limit; what was before begins anew after it."""
        outer = self._phase
        self._enter(name)
        try:
            yield
        finally:
            self._enter(outer)

    def _enter(self, name: str) -> None:
        with self._lock:
            self._phase, self._spent = name, 0.0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within it the thread looks."""
        if not any(self.limits.values()):
            yield
            return
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.wait(self.tick):
            now = time.monotonic()
            with self._lock:
                self._spent += min(now - last, 2 * self.tick)
                phase, spent = self._phase, self._spent
            last = now
            if 0 < self.limits.get(phase, 0.0) < spent:
                self.bite(phase, spent)
                return


def end_stuck(processes: Processes, folder: Path, step: int, phase: str, seconds: float) -> None:
    """End this process at once, from any thread, with its stacks in a file and one line that says why.

    The others are told.
    """
    rank = processes.rank
    path = folder / f"stuck-{rank}.txt"
    try:
        with path.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        where = f"where each thread stood is in {path}"
    except OSError as error:
        where = f"where it stood cannot be written to {path}: {error.strerror or error}"
    processes.fail(f"hangs ({phase} after step {step})")
    # A line of its own: the progress bar has left the cursor behind itself.
    tell(
        f"\nerror: process {rank}: {phase} after step {step} has taken {seconds:.0f} s, more than "
        f"watchdog.{phase} allows, so it is ended; {where}. The last checkpoint counts. "
        f"Continue with --resume {folder}"
    )
    os._exit(STUCK)
