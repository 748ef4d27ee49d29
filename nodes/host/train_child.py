"""The trainer as a process of its own: it is started, asked to stop, and heard when it fails."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from ...hydit_core.errors import ConfigError, HyditError, printable

PACK = Path(__file__).resolve().parents[2]
_STOPPED = 3
"""The trainer's exit code after a stop that can be continued."""
_NEEDED = {"peft": "peft", "diffusers": "diffusers", "transformers": "transformers", "pydantic": "pydantic"}
# The Python of a portable ComfyUI does not look at PYTHONPATH. What this process can import,
# the trainer can; those places come last, so that nothing in ComfyUI's folders hides what the trainer needs.
_START = (
    "import os, runpy, sys; pack, *others = sys.argv.pop(1).split(os.pathsep); sys.path.insert(0, pack); "
    "sys.path += [path for path in others if path not in sys.path]; "
    "runpy.run_module('hydit_core.train', run_name='__main__', alter_sys=True)"
)
_TAIL = 64 * 1024
_LAST_LINES = 20
_BAR = re.compile(r"\d+%\||\d+(it|step) \[|it/s\]|step/s")


def require_trainer(python: str = sys.executable) -> None:
    """Raise :class:`ConfigError` with what to install if this Python lacks what the trainer needs."""
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"training needs {' and '.join(missing)}, which this ComfyUI's Python lacks; install with: "
            f'"{python}" -m pip install {" ".join(missing)}'
        )


class Child:
    """A running trainer. It ends by itself, with everything saved, when this process does."""

    def __init__(self, config: Path, log: Path) -> None:
        """Start it. ``log`` gets what it says, after what earlier ones said."""
        self.log = log
        groups = {"start_new_session": True}  # a Ctrl-C in ComfyUI's terminal is for ComfyUI
        if sys.platform == "win32":
            groups = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        paths = os.pathsep.join([str(PACK), *(str(Path(path).resolve()) for path in sys.path)])
        arguments = ["-c", _START, paths, str(config), "--resume", "auto", "--attended"]
        with log.open("ab") as said:
            self._from = said.tell()
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=subprocess.STDOUT,
                cwd=PACK,
                env={**os.environ, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"},
                **groups,  # type: ignore[call-overload]
            )

    def running(self) -> bool:
        return self.process.poll() is None

    def ask_to_stop(self) -> None:
        """Have it save everything and end; returns at once."""
        if self.process.stdin is not None:
            self.process.stdin.close()

    def kill(self) -> None:
        """End it at once: its last checkpoint counts."""
        self.ask_to_stop()
        self.process.kill()
        self.process.wait()

    def lines(self) -> list[str]:
        """What it said last, a line each; of a progress bar its last state."""
        with self.log.open("rb") as file:
            file.seek(max(self._from, self.log.stat().st_size - _TAIL))
            text = file.read().decode("utf-8", "replace")
        found = (re.split(r"\r", line.rstrip("\r"))[-1].rstrip() for line in text.split("\n"))
        return [printable(line) for line in found if line.strip()]

    def check(self) -> None:
        """Raise :class:`HyditError`, in one line, unless it came to its end."""
        code = self.process.wait()
        lines = [line for line in self.lines() if not _BAR.search(line)]
        starts = [i for i, line in enumerate(lines) if line.startswith("error: ")]
        if code == 0:
            return
        if code == _STOPPED and not starts:
            raise TrainingFailed(
                "the training was stopped from outside; everything is saved: run this again to go on", lines
            )
        if not starts:
            last = f": {lines[-1]}" if lines else ""
            raise TrainingFailed(f"the training ended unexpectedly (exit code {code}){last}", lines)
        first, *more = lines[starts[-1] :]
        told = "; ".join([first.removeprefix("error: "), *(line.strip() for line in more[:3])])
        left = f"; and {len(more) - 3} more lines in its log" if len(more) > 3 else ""
        raise TrainingFailed(f"the training ended: {told}{left}", lines)


class TrainingFailed(HyditError):
    """The trainer ended with an error. ``lines`` are the last that it said."""

    def __init__(self, text: str, lines: list[str]) -> None:
        super().__init__(text)
        self.lines = lines[-_LAST_LINES:]
