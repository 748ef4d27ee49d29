"""What the tests cost, file by file: the lines at the end of a run that show the next slow test."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

SHOWN = 15


def cpu_seconds() -> float:
    """Of this process and of those it has started and waited for, so far."""
    return sum(os.times()[:4])


def lines(reports: Iterable[Any], shown: int = SHOWN) -> list[str]:
    """The dearest files of a run of many.

    ``reports`` are pytest's, of setups, calls and teardowns, each with its ``cpu``.

    CPU seconds first, for they hardly depend on what else the machine does. A test that waits takes more
    seconds than that, one that computes in several processes fewer.
    """
    cpu: dict[str, float] = defaultdict(float)
    seconds: dict[str, float] = defaultdict(float)
    tests: dict[str, set[str]] = defaultdict(set)
    for report in reports:
        file = report.nodeid.split("::", 1)[0]
        cpu[file] += getattr(report, "cpu", 0.0)
        seconds[file] += report.duration
        tests[file].add(report.nodeid)
    if len(cpu) <= shown:
        return []  # who runs a few files knows which
    dearest = sorted(cpu, key=lambda file: (-cpu[file], file))[:shown]
    return [
        f"{cpu[file]:7.1f} s of CPU {seconds[file]:7.1f} s {len(tests[file]):4} tests  {file}"
        for file in dearest
    ]
