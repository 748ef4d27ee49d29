"""``python ...`` in processes that need not import torch, transformers and diffusers anew.

Each is forked from a process that has imported them. With its own environment, arguments, output and exit
code it does what the command does, less six seconds of CPU. What is tested of the start itself needs a real
one.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

FORKS = "forkserver" in multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if FORKS else "spawn")
if FORKS:
    CONTEXT.set_forkserver_preload(
        ["hydit_core.train.launch", "hydit_core.train.parallel.sharded", "diffusers.models", "peft"]
    )


METHOD = multiprocessing.get_start_method()
"""How a process starts its own, such as data workers; one of CONTEXT would do so by CONTEXT."""


class Started:
    """A process that runs."""

    def __init__(
        self, command: list[str], cwd: Path | None, environment: dict[str, str], anew: Collection[str]
    ) -> None:
        self._command, self._folder = command, tempfile.TemporaryDirectory()
        outputs = [f"{self._folder.name}/{name}" for name in ("out", "err")]
        self._process = CONTEXT.Process(target=_run, args=(command, cwd, environment, anew, outputs, METHOD))
        self._process.start()

    def wait(self, timeout: float = 600) -> subprocess.CompletedProcess[str]:
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
    *arguments: object,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    anew: Collection[str] = (),
) -> Started:
    """Start what Python does with these arguments: ``-m MODULE ...``, ``-c CODE ...`` or ``FILE ...``.

    ``environment`` is that of this process if it is not given. Packages that read it when they are imported
    are imported ``anew``.
    """
    return Started(list(map(str, arguments)), cwd, dict(environment or os.environ), anew)


def _run(
    command: list[str],
    cwd: Path | None,
    environment: dict[str, str],
    anew: Collection[str],
    outputs: list[str],
    method: str,
) -> None:
    multiprocessing.set_start_method(method, force=True)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    if cwd is not None:
        os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for name in list(sys.modules):
        if name.partition(".")[0] in anew:
            del sys.modules[name]
    kind, *rest = command
    sys.argv = rest if kind == "-m" else ["-c", *rest[1:]] if kind == "-c" else command
    if kind == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(kind, run_name="__main__")
