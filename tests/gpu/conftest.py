"""Tests of the library on an accelerator, and a table of their figures at the end.

They run on the device that HYDIT_GPU_DEVICE names, else on a CUDA device if there is one, else not at all. On
"cpu" it is the tests themselves that are tried.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS / "unit"), str(TESTS / "parity")]  # train_setup and the like

from on_device import DEVICE  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)
            if DEVICE is None:
                item.add_marker(
                    pytest.mark.skip("no CUDA device; HYDIT_GPU_DEVICE=cpu tries these tests on a CPU")
                )


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str, float], None]:
    """``figure(name, value)`` puts a number into the table at the end."""
    return record_property


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line a test: outcome, seconds, figures; as JSON too where HYDIT_GPU_OUT names a folder."""
    rows = []
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            if "gpu/" in report.nodeid and (report.when == "call" or outcome != "passed"):
                rows.append(
                    {
                        "file": Path(report.nodeid.partition("::")[0]).stem,
                        "test": report.nodeid.rpartition("::")[2].removeprefix("test_"),
                        "outcome": outcome,
                        "seconds": round(report.duration, 2),
                        "figures": dict(report.user_properties),
                        "reason": _reason(report),
                    }
                )
    if not rows:
        return
    terminalreporter.section(f"on {DEVICE}")
    for row in rows:
        shown = ", ".join(f"{name} {_number(value)}" for name, value in row["figures"].items())
        terminalreporter.write_line(f"{row['outcome']:6} {row['seconds']:5.1f} s  {row['test']}: {shown}")
        if row["reason"]:
            terminalreporter.write_line(f"       {row['reason']}")
    if folder := os.environ.get("HYDIT_GPU_OUT"):
        files = sorted({row["file"].removeprefix("test_gpu_") for row in rows})
        name = "-".join(files)
        (Path(folder) / f"tests-{name}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _reason(report: Any) -> str:
    """The line of a failure that says most."""
    if report.passed:
        return ""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = (
        str(report.longrepr) if crash is None else f"{Path(crash.path).name}:{crash.lineno} {crash.message}"
    )
    return " ".join(text.split())[:300]


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
