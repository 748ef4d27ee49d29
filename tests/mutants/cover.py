"""Plugins of pytest: which lines of the library each test runs, and chosen tests in a chosen order."""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

Lines = set[tuple[str, int]]


class Recorder:
    """Records lines by test; what a fixture runs counts for every test that asks for it."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.tests: dict[str, dict[str, Any]] = {}
        self._stack: list[Lines] = [set()]
        self._fixtures: dict[str, Lines] = defaultdict(set)
        self._failed: set[str] = set()

    def _call(self, frame: Any, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(self.prefix) else None

    def _line(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            self._stack[-1].add((frame.f_code.co_filename, frame.f_lineno))
        return self._line

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._stack, start = [set()], time.monotonic()
        threading.settrace(self._call)
        sys.settrace(self._call)
        yield
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        names: Sequence[str] = getattr(item, "fixturenames", ())
        lines = self._stack[0].union(*(self._fixtures[name] for name in names))
        if item.nodeid not in self._failed:
            by_file: dict[str, list[int]] = defaultdict(list)
            for file, line in sorted(lines):
                by_file[file.removeprefix(self.prefix)].append(line)
            self.tests[item.nodeid] = {"seconds": time.monotonic() - start, "lines": by_file}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        self._stack.append(set())
        yield
        lines = self._stack.pop()
        self._fixtures[fixturedef.argname] |= lines
        self._stack[-1] |= lines

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:  # skipped ones kill nothing either
            self._failed.add(report.nodeid)


class Selection:
    """Only these tests, in this order; ``failed`` names the first that failed."""

    def __init__(self, names: Sequence[str]) -> None:
        self.failed = ""
        self._place = {name: place for place, name in enumerate(names)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self._place), key=lambda item: self._place[item.nodeid]
        )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid
