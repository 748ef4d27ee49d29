"""The training nodes in the page: what they show while they run and afterwards, stopped, and failed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from training_graphs import FAST, write_dataset
from workflow_files import WORKFLOWS, overlapping

WORKFLOW = next(path for path in WORKFLOWS if path.stem == "hydit_train_lora")
CHECK, TRAIN = "4", "5"

QUEUE = "async () => { window.__heard.length = 0; await app.queuePrompt(0, 1); }"
ENDED = """() => window.__heard.some(([kind]) =>
  ["execution_success", "execution_error", "execution_interrupted"].includes(kind))"""
#: Everything that can be read in the page, the classic canvas' texts aside.
TEXT = "() => document.body.innerText"


@pytest.fixture(scope="module")
def pictures(server: Any) -> str:
    write_dataset(server.input_dir / "page" / "shapes")
    return "page/shapes"


def opened(page: Any, name: str, pictures: str, settings: str) -> None:
    """The shipped workflow with a small data set."""
    page.evaluate("async () => { await app.refreshComboInNodes() }")
    page.load(WORKFLOW)
    page.close_dialogs()
    for number in (CHECK, TRAIN):
        page.set_widget(number, "dataset_name", pictures)
    page.set_widget(TRAIN, "output_name", name)
    page.set_widget(TRAIN, "settings", settings)


def steps(server: Any, name: str) -> list[int]:
    path = Path(server.output_dir, "hydit_train", name, "metrics.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [record["step"] for record in records if "loss" in record]


def wait(page: Any, until: Any, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it took too long"
        page.page.wait_for_timeout(200)


def told(page: Any, number: str) -> str:
    return page.evaluate("(n) => app.graph.getNodeById(n)?.properties?.hydit_train ?? ''", int(number))


def looks(page: Any) -> bool:
    return not page.nodes2 or page.offers_nodes2()


def test_a_training_is_seen_stopped_and_gone_on_with(either_page, pictures):
    page, name = either_page, f"page-{'new' if either_page.nodes2 else 'classic'}"
    opened(page, name, pictures, FAST.format(steps=24))
    page.evaluate(QUEUE)
    wait(page, lambda: len(steps(page.server, name)) > 4)
    page.page.wait_for_timeout(2500)
    page.fit()
    page.screenshot(f"training-runs-{name}")
    if looks(page):
        assert "of 24, loss" in page.evaluate(TEXT)
    page.server.interrupt()
    wait(page, lambda: page.evaluate(ENDED))
    stopped = len(steps(page.server, name))
    assert 4 < stopped < 24
    page.page.wait_for_timeout(500)
    page.screenshot(f"training-stopped-{name}")
    page.queue(timeout=900).check()
    assert steps(page.server, name) == list(range(1, 25))
    assert told(page, TRAIN).startswith("trained: 24 steps in ")
    assert told(page, CHECK).startswith("6 pictures\n")
    page.page.wait_for_timeout(1000)
    page.fit()
    page.screenshot(f"training-done-{name}")
    if looks(page):
        assert overlapping(page.boxes()) == []
    assert page.errors == []


def test_a_training_that_fails_says_why(page, pictures):
    opened(page, "page-fails", pictures, "[lora]\nrank = 9000\n")
    result = page.queue()
    assert "settings: lora.rank" in result.error.exception_message
    page.page.wait_for_timeout(1000)
    page.screenshot("training-failed")


def test_the_nodes_speak_chinese(open_page, pictures):
    page = open_page(locale="zh")
    opened(page, "page-zh", pictures, FAST.format(steps=2))
    page.queue(timeout=900).check()
    page.page.wait_for_timeout(1000)
    page.fit()
    page.screenshot("training-zh")
    shown = page.evaluate("() => [...document.querySelectorAll('.hydit_train')].map((e) => e.innerText)")
    assert any("6 张图像" in text for text in shown)
    assert any("已训练 2 步" in text for text in shown)
