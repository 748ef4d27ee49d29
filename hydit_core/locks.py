"""One writer at a time in a folder: a lock of the operating system's, which dies with its holder."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import ConfigError

FILE = ".lock"
_HELD_ELSEWHERE = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_WINDOWS_BYTE = 1 << 30
"""What is locked on Windows, where locked bytes cannot be read: one behind the holder's name."""

_held: set[int] = set()


def _let_go_in_child() -> None:
    # A forked data worker shares the lock, and lives on for seconds when its parent is killed.
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


@contextlib.contextmanager
def hold(folder: Path, in_use: Callable[[str], str], *, file: str = FILE) -> Iterator[None]:
    """Be the only one who writes into ``folder``, which exists, until the block ends or the process does.

    On a file system without locks a warning goes to stderr, and the run goes on without one.

    Args:
        in_use: the error's text for a folder that the process of this name holds.
        file: the lock's name; those with different names hold at the same time.

    Raises:
        ConfigError: another process holds it; the error says which.
        OSError: the folder cannot be written to.
    """
    handle = os.open(folder / file, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(handle)
    try:
        try:
            _lock_patiently(handle)
        except OSError as error:
            if error.errno in _HELD_ELSEWHERE:
                raise ConfigError(in_use(_name(handle))) from None
            print(
                f"warning: {folder}: its file system has no locks ({error.strerror}): see to it that no "
                "other process writes there",
                file=sys.stderr,
            )
        if not (folder / file).exists():  # one that was refused took it back in between
            raise ConfigError(in_use(_name(handle)))
        os.ftruncate(handle, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode())
        yield
    finally:
        _held.discard(handle)
        os.close(handle)  # which ends the lock


def holder(folder: Path) -> str | None:
    """Who writes into ``folder`` at this moment; None if nobody does."""
    try:
        handle = os.open(folder / FILE, os.O_RDWR)
    except OSError:
        return None
    try:
        _lock(handle)
    except OSError as error:
        return _name(handle) if error.errno in _HELD_ELSEWHERE else None
    finally:
        os.close(handle)
    return None


def _lock_patiently(handle: int) -> None:
    """Take the lock; :func:`holder`, asked by another process, has it for a moment only."""
    for _ in range(5):
        try:
            _lock(handle)
            return
        except OSError as error:
            if error.errno not in _HELD_ELSEWHERE:
                raise
            time.sleep(0.1)
    _lock(handle)


def _name(handle: int) -> str:
    """What the holder wrote about itself. It only tells: the lock is what counts."""
    os.lseek(handle, 0, os.SEEK_SET)
    text = os.read(handle, 200).decode("utf-8", "replace").strip()
    return "".join(c if c.isprintable() else "?" for c in text) or "a process that did not say its name"


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> None:
        os.lseek(handle, _WINDOWS_BYTE, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)

else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
