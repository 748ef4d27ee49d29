"""ComfyUI's page: fixtures `page` (classic), `page2` (Nodes 2.0), `either_page` and `open_page`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from find_host import side_folder, why_not

if TYPE_CHECKING:
    from comfy_page import ComfyPage


def _reason() -> str:
    reason = why_not()
    if reason:
        return reason
    # As tests/host has it; alone, tests/browser does not start a ComfyUI in this process.
    import sys

    if str(side_folder()) not in sys.path:
        sys.path.append(str(side_folder()))
    if importlib.util.find_spec("playwright") is None:
        return "no playwright in this Python: use `make test-host`"
    from comfy_page import find_browser

    return "" if find_browser() else "no Chromium found (COMFYUI_BROWSER, or chromium on PATH)"


REASON = _reason()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Last of all: while Playwright runs, the thread has an event loop, so the host cannot start its own."""
    items.sort(key=lambda item: item.nodeid.startswith("browser/"))


class SkippedModule(pytest.Module):
    def collect(self) -> list[pytest.Item]:
        raise pytest.skip.Exception(REASON, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return SkippedModule.from_parent(parent, path=module_path) if REASON else None


@pytest.fixture(scope="session")
def open_page(server: Any) -> Iterator[Callable[..., ComfyPage]]:
    """`open_page(nodes2=False, locale="en")`; the same page is handed out again, emptied."""
    from comfy_page import FLAGS, ComfyPage, find_browser
    from playwright.sync_api import sync_playwright

    pages: dict[tuple[bool, str], ComfyPage] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=FLAGS)

        def open_one(*, nodes2: bool = False, locale: str = "en") -> ComfyPage:
            key = (nodes2, locale)
            if key not in pages:
                pages[key] = ComfyPage(browser, server, nodes2=nodes2, locale=locale)
            pages[key].reset()
            return pages[key]

        yield open_one
        browser.close()


@pytest.fixture
def page(open_page: Callable[..., ComfyPage], request: pytest.FixtureRequest) -> Iterator[ComfyPage]:
    yield from _kept(open_page(nodes2=False), request)


@pytest.fixture
def page2(open_page: Callable[..., ComfyPage], request: pytest.FixtureRequest) -> Iterator[ComfyPage]:
    yield from _kept(open_page(nodes2=True), request)


@pytest.fixture(params=["classic", "nodes2"])
def either_page(open_page: Callable[..., ComfyPage], request: pytest.FixtureRequest) -> Iterator[ComfyPage]:
    """The classic page, then Nodes 2.0."""
    yield from _kept(open_page(nodes2=request.param == "nodes2"), request)


def _kept(opened: ComfyPage, request: pytest.FixtureRequest) -> Iterator[ComfyPage]:
    """A screenshot when the test failed."""
    yield opened
    report = getattr(request.node, "rep_call", None)
    if report is not None and report.failed:
        opened.screenshot(f"FAILED-{request.node.name}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    setattr(item, f"rep_{report.when}", report)
