"""Damaged files of every kind: fuzz/fuzz.py with fewer inputs than `make fuzz` takes, and how it judges."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FUZZ = Path(__file__).resolve().parents[1] / "fuzz"
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and reads /proc")


@pytest.fixture(scope="module")
def child() -> Any:
    spec = importlib.util.spec_from_file_location("fuzz_child", FUZZ / "child.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclass
    spec.loader.exec_module(module)
    return module


def refused() -> int:
    print("error: a.bin: holds nothing; give another", file=sys.stderr)
    return 2


def usage() -> int:
    print("usage: x\nx: error: unrecognized arguments: y", file=sys.stderr)
    raise SystemExit(2)


def unexpected() -> int:
    raise ValueError("a reader's own fault")


def wordless() -> int:
    return 2


def other_code() -> int:
    refused()
    return 5


def escaping() -> int:
    print("a name with \x1b]0;title\x07")
    return 0


def killed() -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def busy() -> int:
    while time.process_time() < 100:
        pass
    return 0


def slow() -> int:
    end = time.process_time() + 2.6
    while time.process_time() < end:
        pass
    return 0


def large() -> int:
    block = bytearray(os.urandom(1 << 20) * 300)
    return 0 if block else 1


def half_written() -> int:
    Path("out.part").write_bytes(b"x")
    return refused()


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (lambda: 0, None),
        (refused, None),
        (usage, None),
        (unexpected, "traceback: ValueError"),
        (wordless, "without an `error:` line"),
        (other_code, "exit code 5"),
        (escaping, "control characters"),
        (killed, "SIGKILL"),
        (busy, "SIGXCPU"),
        (slow, "s of CPU"),
        (large, "MB above idle"),
        (half_written, "left ('out.part',) behind"),
    ],
)
def test_each_fault_is_seen(
    command: Callable[[], int], wanted: str | None, child: Any, tmp_path: Path
) -> None:
    good = child.run(lambda: 0, tmp_path, whole=True)
    outcome = child.run(command, tmp_path, seconds=3, whole=True)
    found = child.complaint(outcome, good)
    assert found is None if wanted is None else found is not None and wanted in found
    assert child.is_costly(outcome, good) == (command in (busy, slow, large))


@pytest.mark.slow
def test_no_damaged_file_gives_a_traceback_a_crash_or_a_hang(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FUZZ / "fuzz.py"), "--inputs", "2000", "--keep", str(tmp_path)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "2000 inputs of" in done.stdout
