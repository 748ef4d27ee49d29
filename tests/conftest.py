"""Shared by every test: the package on the path, one thread, no network, a tiny complete model."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import slowest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parent.parent
# At the end, not the front: a folder named `nodes` must not shadow anybody else's module.
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))
# Helpers of tests/host, which tests/browser uses too.
sys.path.append(str(ROOT / "tests" / "host"))


@pytest.fixture(scope="session")
def tiny_model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An all-in-one checkpoint with random weights; read it, do not write to it."""
    from tiny import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


@pytest.fixture(scope="session")
def server() -> Iterator[Any]:
    """A ComfyUI of its own process (comfy_server.ComfyServer), for tests/host and tests/browser."""
    from comfy_server import ComfyServer
    from training_graphs import ENVIRONMENT

    started = ComfyServer(environment=ENVIRONMENT)
    yield started
    started.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, lest one of them is the last, with a core that idles."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


SPENT = pytest.StashKey[float]()
"""CPU seconds at the end of the last setup, call or teardown."""


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[SPENT] = slowest.cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    now = slowest.cpu_seconds()
    report.cpu = now - item.config.stash.get(SPENT, now)  # pytest-xdist hands on what a report has
    item.config.stash[SPENT] = now
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Which files cost most; and that the tests inside ComfyUI were left out, and why."""
    reports = [one for some in terminalreporter.stats.values() for one in some if hasattr(one, "duration")]
    if dearest := slowest.lines(reports):
        terminalreporter.section("what cost most")
        terminalreporter.write("".join(f"{line}\n" for line in dearest))
    skipped = [
        report
        for report in terminalreporter.stats.get("skipped", [])
        # whole modules: a single test has reasons of its own
        if report.nodeid.startswith(("host/", "browser/")) and "::" not in report.nodeid
    ]
    for reason in sorted({report.longrepr[2].removeprefix("Skipped: ") for report in skipped}):
        terminalreporter.write_line(f"NOT RUN inside ComfyUI: {reason}", yellow=True)
