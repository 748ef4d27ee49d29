"""One ComfyUI inside the test process, for all of tests/host; fixture `host`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))

from find_host import why_not

REASON = why_not()


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Without a host, a module is one skip, and is not imported: it may import what only a host has."""
    if not REASON:
        return None
    return SkippedModule.from_parent(parent, path=module_path)


class SkippedModule(pytest.Module):
    def collect(self) -> list[pytest.Item]:
        raise pytest.skip.Exception(REASON, allow_module_level=True)


if not REASON:
    # Before any test module is collected: whatever imports `comfy` first decides how it starts.
    import in_process

    in_process.prepare()


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[in_process.Host]:
    """ComfyUI with the pack in its custom_nodes (by symlink, so that it is the code being edited)."""
    started = in_process.start()
    print(f"ComfyUI {started.version} at {started.comfy}, base {started.base}")
    yield started
    started.close()


@pytest.fixture(scope="module", params=["ours", "ComfyUI's own"])
def either_model(request: pytest.FixtureRequest, host: Any, tmp_path_factory: Any) -> Any:
    """A tiny MODEL of either kind, on the same random weights."""
    from sampling_models import native_model, our_model

    if request.param == "ours":
        return our_model(host, tmp_path_factory.mktemp("dit"))
    return native_model(host)


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    """No results, models or interrupts left from the test before."""
    yield
    if "host" in request.fixturenames:
        request.getfixturevalue("host").forget()


os.environ.setdefault("OMP_NUM_THREADS", "1")
