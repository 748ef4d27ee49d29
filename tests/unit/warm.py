"""``python -m MODULE`` and ``python FILE`` in processes that need not import torch and transformers anew.

Each is forked from a process that has. With its own environment, arguments, output and exit code it does
what the command does, less six seconds of CPU. What is tested of the start itself needs a real one.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

FORKS = "forkserver" in multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if FORKS else "spawn")
if FORKS:
    CONTEXT.set_forkserver_preload(
        ["peft", "diffusers.models", "hydit_core.train.launch", "hydit_core.train.parallel.sharded"]
    )


class Started:
    """A command that runs."""

    def __init__(self, command: list[str], cwd: Path | None, variables: Mapping[str, str]) -> None:
        self._command, self._folder = command, tempfile.TemporaryDirectory()
        outputs = [f"{self._folder.name}/{name}" for name in ("out", "err")]
        environment = {**os.environ, **variables}
        self._process = CONTEXT.Process(target=_run, args=(command, cwd, environment, outputs))
        self._process.start()

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """What it has printed and its exit code, which is negative if a signal ended it."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            self._process.join()
        out, err = (Path(self._folder.name, name).read_text("utf-8", "replace") for name in ("out", "err"))
        self._folder.cleanup()
        if code is None:
            raise subprocess.TimeoutExpired(self._command, timeout, out, err)
        return subprocess.CompletedProcess(self._command, code, out, err)


def start(
    what: str | Path, *arguments: object, cwd: Path | None = None, variables: Mapping[str, str] | None = None
) -> Started:
    """Start the module or script ``what``, in ``cwd``, with ``variables`` beside those of the environment."""
    return Started([str(what), *map(str, arguments)], cwd, variables or {})


def _run(command: list[str], cwd: Path | None, environment: dict[str, str], outputs: list[str]) -> None:
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    if cwd is not None:
        os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    if command[0].endswith(".py"):
        runpy.run_path(command[0], run_name="__main__")
    else:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
