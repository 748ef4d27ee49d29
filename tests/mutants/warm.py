"""Tries changes in children of a process that has imported the library and collected every test.

A child gets the functions of the changed file as the changed source compiles them, so that nothing is
imported or collected again. What is run on import (constants, defaults, class bodies) cannot be changed so.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, FunctionType

import pytest

Pairs = Sequence[tuple[CodeType, CodeType]]
"""codes of functions, and what they become"""
_OPTIMIZED = 0x1
"""CO_OPTIMIZED: the code of a function, and not of a module or a class"""


def _inside(code: CodeType) -> list[CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _walk(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in _inside(code):
        yield from _walk(inner)


def _shell(code: CodeType) -> list[object]:
    """What a module and its classes run on import, without the functions that they make."""
    plain = [(type(c), c) for c in code.co_consts if not isinstance(c, CodeType)]
    found: list[object] = [(code.co_code, code.co_names, repr(plain), code.co_varnames)]
    for inner in _inside(code):
        found.append(inner.co_qualname)
        if not inner.co_flags & _OPTIMIZED:
            found += _shell(inner)
    return found


def replacements(path: str, old: bytes, new: bytes) -> Pairs | None:
    """The codes of a file's functions and those of its changed source; None if that must be imported."""
    before, after = (compile(source, path, "exec", dont_inherit=True) for source in (old, new))
    ones, others = list(_walk(before)), list(_walk(after))
    if _shell(before) != _shell(after) or len(ones) != len(others):
        return None
    pairs = list(zip(ones, others, strict=True))
    if any(a.co_qualname != b.co_qualname or a.co_freevars != b.co_freevars for a, b in pairs):
        return None
    return [(a, b) for a, b in pairs if a.co_flags & _OPTIMIZED]


def put_in(pairs: Pairs) -> None:
    """Give living functions their new code."""
    known = {(a.co_filename, a.co_qualname, a.co_firstlineno): b for a, b in pairs}
    for thing in gc.get_objects():
        if type(thing) is FunctionType:  # not isinstance, which asks proxies for their class
            code = thing.__code__
            new = known.get((code.co_filename, code.co_qualname, code.co_firstlineno))
            if new is not None:
                thing.__code__ = new


class Loop:
    """A plugin of pytest that collects tests and calls ``work`` in place of running them."""

    def __init__(self, work: Callable[[Loop], None]) -> None:
        self.failed = ""
        self._work = work
        self._items: dict[str, pytest.Item] = {}
        self._sound: dict[str, bool] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self._items = {item.nodeid: item for item in session.items}
        self._work(self)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid

    def is_sound(self, name: str) -> bool:
        """Whether a test passes here as long as nothing is changed."""
        if name not in self._sound:
            self._sound[name] = self.try_tests((), [name], 300.0) == ("survived", "")
        return self._sound[name]

    def try_tests(self, pairs: Pairs, names: Sequence[str], cpu_seconds: float) -> tuple[str, str]:
        """What becomes of a forked child, and the test that failed.

        "survived", "killed", "timeout" for too much computing; "silent" for one that waits for good, maybe
        for a thread that was not forked with it, which says nothing about the change.
        """
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reading)
                _quieten(cpu_seconds)
                put_in(pairs)
                self._run(names)
                os.write(writing, (self.failed or "-").encode())
            finally:
                os._exit(0)
        os.close(writing)
        ended, status = wait(child, 60 + 8 * cpu_seconds)
        with os.fdopen(reading, "rb") as file:
            said = file.read().decode() if ended else ""
        if said:
            return ("survived", "") if said == "-" else ("killed", said)
        if not ended:
            return "silent", ""
        late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
        return ("timeout" if late else "killed"), ""

    def _run(self, names: Sequence[str]) -> None:
        items = [self._items[name] for name in names if name in self._items]
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed:
                return


def _quieten(cpu_seconds: float) -> None:
    """A group of processes without a terminal, which ends after so many seconds of computing."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    limit = int(cpu_seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)


def wait(child: int, seconds: float) -> tuple[bool, int]:
    """Whether a child ended in time, and how; afterwards it has, with all that it started."""
    deadline = time.monotonic() + seconds
    ended, status = os.waitpid(child, os.WNOHANG)
    while not ended and time.monotonic() < deadline:
        time.sleep(0.02)
        ended, status = os.waitpid(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    if not ended:
        os.waitpid(child, 0)
    return bool(ended), status
