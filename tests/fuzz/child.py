"""Run one command on one damaged file in a forked child, under limits, and judge what it did."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECONDS = 2.0  # of CPU, beyond what the good file takes
MEMORY = 200 * 2**20  # bytes resident, beyond what the good file takes
_HARD = 6 * 2**30  # of addresses beyond the warm process: a mistake must not take the machine down


@dataclass(frozen=True)
class Outcome:
    code: int | None  # exit code; None: killed by a signal or by us
    text: str  # stdout and stderr
    seconds: float  # CPU
    memory: int  # bytes of peak residence above the parent's at the fork
    signal: int = 0
    left: tuple[str, ...] = ()  # what it began and left behind although it refused


def _resident(field: str = "VmRSS") -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def run(command: Callable[[], int], folder: Path, seconds: float = 30.0, whole: bool = False) -> Outcome:
    """Fork, limit, run ``command`` inside ``folder`` and wait; ``seconds`` of CPU at most.

    ``whole``: it makes what it is to make or nothing.
    """
    output = folder / "output.txt"
    there = set(folder.rglob("*"))
    receive, send = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(receive)
        _child(command, folder, output, send, seconds)
    os.close(send)
    status, usage, killed = _wait(child, started, seconds * 10 + 20)
    with os.fdopen(receive, "rb") as pipe:
        memory = int(pipe.read() or 0)
    text = output.read_bytes().decode("utf-8", "replace") if output.exists() else ""
    code = os.waitstatus_to_exitcode(status)
    cpu = usage.ru_utime + usage.ru_stime
    if code < 0 or killed:
        return Outcome(None, text, cpu, memory, signal=-code)
    left = set(folder.rglob("*")) - there - {output} if code and whole else ()
    return Outcome(code, text, cpu, memory, left=tuple(sorted(str(p.relative_to(folder)) for p in left)))


def _wait(child: int, started: float, limit: float) -> tuple[int, resource.struct_rusage, bool]:
    """Wait for the child; one that sleeps for ever burns no CPU and is killed by the clock."""
    pause = 0.001
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            return status, usage, False
        if time.monotonic() - started > limit:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            return status, usage, True
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)


def _child(command: Callable[[], int], folder: Path, output: Path, send: int, seconds: float) -> None:
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        cpu = int(seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + _HARD, size + _HARD))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        before = _resident()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        code = _run(command)
        os.write(send, str(max(0, _resident("VmHWM") - before)).encode())
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _run(command: Callable[[], int]) -> int:
    try:
        return command()
    except SystemExit as exit_:  # argparse
        return exit_.code if isinstance(exit_.code, int) else 2
    except BaseException:
        traceback.print_exc()
        return 70


def is_costly(outcome: Outcome, good: Outcome) -> bool:
    """Whether it took more time or memory than is allowed."""
    return outcome.seconds > good.seconds + SECONDS or outcome.memory > good.memory + MEMORY


def complaint(outcome: Outcome, good: Outcome) -> str | None:
    """What is wrong with how a command took a damaged file; None if nothing is."""
    lines = outcome.text.splitlines()
    if outcome.code is None:
        name = signal.Signals(outcome.signal).name if outcome.signal else "the clock"
        return f"ended by {name} after {outcome.seconds:.1f} s"
    if "Traceback (most recent call last)" in outcome.text:
        return "traceback: " + (lines[-1] if lines else "")
    if outcome.code not in (0, 2, 3):
        return f"exit code {outcome.code}: {lines[-1] if lines else ''}"
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]", outcome.text.replace("\r", "")):
        return "control characters on the terminal"
    if outcome.code and not any(line.startswith("error:") or ": error:" in line for line in lines):
        return f"exit code {outcome.code} without an `error:` line"
    if outcome.left:
        return f"refused, but left {outcome.left[:3]} behind"
    if outcome.seconds > good.seconds + SECONDS:
        return f"{outcome.seconds:.1f} s of CPU, {good.seconds:.1f} s for the good file"
    if outcome.memory > good.memory + MEMORY:
        return f"{outcome.memory >> 20} MB above idle, {good.memory >> 20} MB for the good file"
    return None
