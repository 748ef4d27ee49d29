"""Errors that a user can act on, and how command lines show them."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Unicode categories of characters that a terminal obeys, or that hide or reverse the text around them.
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# Joiners that emoji and some scripts need.
_JOINERS = "\u200c\u200d"


def printable(text: str) -> str:
    """``text`` on one line, with every invisible character escaped: ESC as ``\\x1b``.

    Names and values in files can be anything; on a terminal or in a log they must not have any effect.
    """
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _UNSEEN and character not in _JOINERS
        else character
        for character in text
    )


class HyditError(Exception):
    """Base of every error that says what was found, what was expected and what to do.

    Each argument is one line of the text; unprintable characters are escaped (:func:`printable`).
    """

    def __str__(self) -> str:
        return "\n".join(printable(str(line)) for line in self.args)


class WeightsError(HyditError):
    """A weights file that cannot be read, is of the wrong kind, or does not fit."""


class LoraError(HyditError):
    """A LoRA that cannot be read, was made for another model, or does not fit."""


class ConfigError(HyditError):
    """A configuration or command-line value that is not accepted."""


class DataError(HyditError):
    """Training data that is missing, unreadable or inconsistent."""


class PrintableOutput:
    """A text stream in which only line breaks, tabs and the characters of ``kept`` move the cursor."""

    def __init__(self, stream: Any, kept: str = "") -> None:
        self._stream = stream
        self._kept = "\n\t" + kept

    def write(self, text: str) -> int:
        safe = text if text.isprintable() else "".join(c if c in self._kept else printable(c) for c in text)
        self._stream.write(safe)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _printable_streams() -> Iterator[None]:
    """Escape in all output what a terminal would obey, and what stdout's encoding lacks (on Windows)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    stdout, stderr = sys.stdout, sys.stderr
    sys.stdout = PrintableOutput(stdout)
    sys.stderr = PrintableOutput(stderr, "\r")  # progress bars
    try:
        yield
    finally:
        sys.stdout, sys.stderr = stdout, stderr


@contextlib.contextmanager
def _unwound_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit, unless they are already handled or ignored."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    changed = []
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        changed = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in changed:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def program(command: str) -> str:
    """One of our commands as the user typed it: ``hydit train``, or ``python -m hydit_core.train``."""
    front = "hydit " if Path(sys.argv[0]).stem == "hydit" else "python -m hydit_core."
    return front + command


def _shortened(name: str) -> str:
    return name if len(name) <= 300 else f"{name[:200]}...{name[-60:]}"


def cli_main(run: Callable[[], int | None]) -> int:
    """Run a command line; a :class:`HyditError` becomes ``error: ...`` on stderr and exit code 2.

    So does an :class:`OSError` that names a file, a path that the operating system does not accept, and a GPU
    whose memory is not enough.

    In everything that it prints, characters that a terminal would obey are escaped. A signal that ends the
    process lets it remove its temporary files.
    """
    with _printable_streams(), _unwound_by_signals():
        try:
            return run() or 0
        except HyditError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except BrokenPipeError:  # as in `... | head`: the reader has enough, and Python would flush once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
            return 1
        except OSError as error:
            if error.filename is None:  # not about a file that the user named
                raise
            name = _shortened(str(error.filename))
            print(f"error: {name}: {error.strerror or type(error).__name__}", file=sys.stderr)
            return 2
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not to be imported for this
                raise
            reason = str(error).splitlines()[0] if str(error) else "out of memory"
            print(f"error: {reason} Use a smaller size or batch; generate has --offload", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
