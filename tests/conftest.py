"""Shared by every test: the package on the path, one thread, no network, a tiny complete model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say at the end that the tests inside ComfyUI were left out, and why: many skips are easily missed."""
    skipped = [
        report
        for report in terminalreporter.stats.get("skipped", [])
        # whole modules: a single test has reasons of its own
        if report.nodeid.startswith(("host/", "browser/")) and "::" not in report.nodeid
    ]
    for reason in sorted({report.longrepr[2].removeprefix("Skipped: ") for report in skipped}):
        terminalreporter.write_line(f"NOT RUN inside ComfyUI: {reason}", yellow=True)
