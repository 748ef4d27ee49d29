"""How much memory a process has used at most (Linux)."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


def held(process: int | str = "self") -> int:
    """Bytes of a process's own memory and of the files that it has mapped (RssAnon + RssFile)."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return sum(1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))


class Peak:
    """The largest growth of a process's memory inside a `with`, sampled by a thread."""

    def __init__(self, process: int | str = "self") -> None:
        self.process = process

    def __enter__(self) -> Peak:
        gc.collect()
        self.start, self.grown, self._on = held(self.process), 0, True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._on:
            self.grown = max(self.grown, held(self.process) - self.start)
            time.sleep(0.005)

    def __exit__(self, *_: Any) -> None:
        self._on = False
        self._thread.join()
        self.grown = max(self.grown, held(self.process) - self.start)
