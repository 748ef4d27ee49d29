"""How a run ends before its last step: signals that ask for it, and what an error's cause is called."""

from __future__ import annotations

import _thread
import contextlib
import errno
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import HyditError

ERROR_FILE = "error.txt"
_ASKING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)
)
_HANG_UP = getattr(signal, "SIGHUP", None)
_DEBOUNCE_SECONDS = 1.0
"""A terminal, a shell and a launcher may all pass on one Ctrl-C: one more within this time is the same."""


class TrainingStopped(HyditError):
    """Something went wrong during the run. The message says what, what is saved, and how to continue."""


class StopSignals:
    """Within :meth:`handled`, signals ask for a clean stop: ``name`` is then the first one's.

    A second Ctrl-C, a second after the first or later, stops at once.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._since = 0.0

    def ask(self, name: str) -> None:
        """Ask for a stop, as a signal of this name does; only the first one counts."""
        if self.name is None:
            self.name, self._since = name, time.monotonic()

    def _handle(self, number: int, frame: Any) -> None:
        if self.name and number == signal.SIGINT and time.monotonic() - self._since >= _DEBOUNCE_SECONDS:
            raise KeyboardInterrupt
        self.ask(signal.Signals(number).name)

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        with _handlers(self._handle, *_ASKING):
            yield


@contextlib.contextmanager
def ending_at_once() -> Iterator[threading.Event]:
    """Signals that would kill this process end it by an exception, so that half-finished work is cleaned up.

    Once the event is set, when training is over, they do nothing any more.
    """
    over = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if not over.is_set():
            tell(f"stopped ({signal.Signals(number).name}) before training began")
            raise SystemExit(128 + number)

    with _handlers(handle, *(number for number in _ASKING if number != signal.SIGINT)):
        yield over


def ignore_signals() -> None:
    """For a process that is about to end with its own exit code: a closing terminal tells it twice."""
    for number in _ASKING:
        signal.signal(number, signal.SIG_IGN)


def stop_with_input() -> None:
    """Be asked to stop, as by Ctrl-C, when standard input ends: whoever started this process is gone.

    It works where programs cannot send each other signals, as on Windows without a console.
    """

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1024):
                pass
        _thread.interrupt_main()

    threading.Thread(target=wait, name="end of input", daemon=True).start()


@contextlib.contextmanager
def _handlers(handle: Any, *numbers: signal.Signals) -> Iterator[None]:
    old: dict[int, Any] = {}
    try:
        for number in numbers:
            # nohup ignores the end of the terminal, which then is none.
            if number != _HANG_UP or signal.getsignal(number) is not signal.SIG_IGN:
                old[number] = signal.signal(number, handle)
    except ValueError:  # not in the main thread
        pass
    try:
        yield
    finally:
        for changed, previous in old.items():
            signal.signal(changed, previous)


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """Data workers that are started inside do not hear the signals, and their deaths are no signal here.

    Ctrl-C and a job scheduler's SIGTERM reach every process of the group, but only this one decides when to
    stop. Torch's handler for a worker's death raises wherever the program is, in the middle of an update too;
    the loader finds out by itself when the next batch is due.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    on_death = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    if getattr(on_death, "__module__", "").startswith("torch."):  # since an earlier loader of this process
        on_death = signal.SIG_DFL
    old = signal.pthread_sigmask(signal.SIG_BLOCK, _ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGCHLD, on_death)


def cause_of(error: BaseException) -> str:
    """One line for what happened, with what to do where that is known."""
    if isinstance(error, HyditError):
        return str(error)
    text = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
    if "out of memory" in str(error).lower():
        return (
            f"out of memory ({str(error).splitlines()[0]}); lower run.batch_size, or set "
            "run.gradient_checkpointing"
        )
    if isinstance(error, OSError) and error.strerror:
        full = "; make room on the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return f"{error.filename or 'the run'}: {error.strerror}{full}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def keep_traceback(error: Exception, folder: Path) -> str:
    """Where the details of an error that nobody foresaw are, for the report of a bug."""
    path = folder / ERROR_FILE
    try:
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError:
        return ""
    return f" (details in {path})"


def forget_frames(error: BaseException | None) -> None:
    """Release what the error's frames still hold: half a step's memory, and the data workers.

    Data workers do not hear a SIGTERM. They end when their loader goes; else this process would wait for
    them for ever.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def tell(text: str) -> None:
    """A line on stderr; if nobody reads it any more (a closed terminal or pipe), it is lost."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        silence_stderr()


def silence_stderr() -> None:
    """Write into nothing from now on."""
    sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for good
