"""Which files of tests cost most, as the end of a run tells it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import slowest

TESTS = Path(__file__).resolve().parents[1]


def report(nodeid: str, cpu: float, duration: float) -> SimpleNamespace:
    return SimpleNamespace(nodeid=nodeid, cpu=cpu, duration=duration)


def test_setups_and_calls_of_a_file_are_added_up():
    reports = [
        report("unit/test_b.py::one[x::y]", 1.0, 1.5),
        report("unit/test_b.py::one[x::y]", 2.0, 2.25),
        report("unit/test_b.py::two", 0.5, 9.0),
        report("unit/test_a.py::one", 20.0, 10.0),
        report("unit/test_c.py::one", 0.1, 50.0),
        SimpleNamespace(nodeid="host/test_d.py", duration=0.0),  # a module that is skipped
    ]
    assert slowest.lines(reports, shown=2) == [
        "   20.0 s of CPU    10.0 s    1 tests  unit/test_a.py",
        "    3.5 s of CPU    12.8 s    2 tests  unit/test_b.py",
    ]


def test_slow_files_run_first_and_the_cost_of_processes_is_told(tmp_path: Path):
    """A run of its own with the hooks of our conftest, and with workers."""
    burn = "import time\nwhile time.process_time() < 1: pass"
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow: x\n")
    for number in range(slowest.SHOWN):
        (tmp_path / f"test_{number:02}.py").write_text("def test_nothing(): pass\n")
    (tmp_path / "test_last.py").write_text(
        "import subprocess, sys, pytest\n"
        "def test_first(): pass\n"
        "@pytest.mark.slow\n"
        f"def test_processes(): subprocess.run([sys.executable, '-c', {burn!r}])\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-v", "-n", "1", "--dist", "loadfile"]
    done = subprocess.run(
        [*command, "--no-loadscope-reorder", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ran = re.findall(r"PASSED (\S+)", done.stdout)
    assert ran[:2] == ["test_last.py::test_first", "test_last.py::test_processes"]
    assert ran[2:] == [f"test_{number:02}.py::test_nothing" for number in range(slowest.SHOWN)]
    (cost,) = re.findall(r"^ +([\d.]+) s of CPU +[\d.]+ s +2 tests  test_last.py$", done.stdout, re.M)
    assert float(cost) >= 1
