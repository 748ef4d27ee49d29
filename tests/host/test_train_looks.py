"""HyDiTDatasetCheck and HyDiTTrainMonitor: what they say and show of pictures and of runs."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from graphs import Graph, Node
from PIL import Image
from training_graphs import BASE, training_folders

from hydit_core.train import lock


@pytest.fixture(autouse=True)
def folders(host: Any, monkeypatch: Any) -> Any:
    yield from training_folders(host, monkeypatch)


def check(graph: Graph, **inputs: Any) -> Node:
    return graph.add("HyDiTDatasetCheck", dataset_name="shapes", base_name=BASE, resolution=0, **inputs)


def write_run(folder: Path, steps: int) -> Path:
    """What a run that has come to step 40 has left so far."""
    (folder / "samples").mkdir(parents=True)
    records = [{"step": step, "loss": 1 / step, "seconds": 2.0 * step} for step in range(1, 41)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    Image.new("RGB", (96, 64), "red").save(folder / "samples" / "step_00000000.png")
    Image.new("RGB", (96, 64), "lime").save(folder / "samples" / "step_00000020.png")
    state = folder / "checkpoints" / "step_00000040" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"config": {"run": {"steps": steps}}}))
    return folder


def test_a_folder_is_told_and_shown(host):
    (host.input_dir / "shapes" / "more").mkdir()
    Image.new("RGB", (300, 100), "blue").save(host.input_dir / "shapes" / "more" / "wide.png")
    graph = Graph()
    checked = check(graph)
    result = host.run(graph).check()
    text = result.outputs[checked.id]["hydit_train"][0]
    assert "7 pictures" in text and "without a caption: 1 (red frames)\n  more/wide.png" in text
    assert str(host.base) not in text
    (shown,) = result.outputs[checked.id]["images"]
    assert shown["type"] == "temp"
    report, sheet = host.values(graph, checked, (checked.id, 1))
    assert (
        report == text and sheet.shape[0] == 1 and sheet.shape[3] == 3 and 0 <= sheet.min() < sheet.max() <= 1
    )
    red = (sheet[0, :, :, 0] > 0.8) & (sheet[0, :, :, 1] < 0.3) & (sheet[0, :, :, 2] < 0.2)
    assert 4 * 128 < red.sum() < 136 * 136
    # Another caption is another look, with everything else in the cache.
    (host.input_dir / "shapes" / "more" / "wide.txt").write_text("a red bar")
    again = host.run(graph, keep_cache=True).check()
    assert checked.id not in again.cached
    assert "without a caption" not in again.outputs[checked.id]["hydit_train"][0]
    assert checked.id in host.run(graph, keep_cache=True).check().cached


def test_a_picture_that_cannot_be_read_is_named(host):
    (host.input_dir / "shapes" / "zz.png").write_bytes(b"no picture")
    graph = Graph()
    checked = check(graph)
    text = host.run(graph).check().outputs[checked.id]["hydit_train"][0]
    assert "6 pictures\ncannot be read, so left out: 1\n" in text and "zz.png" in text


def test_a_run_is_shown_as_it_is(host):
    folder = write_run(host.output_dir / "runs" / "mine", 100)
    paths = host.module("nodes.host.train_paths")
    assert paths.run_names() == ["runs/mine"]
    graph = Graph()
    monitor = graph.add("HyDiTTrainMonitor", run_name="runs/mine", follow=False)
    report, curve, samples = host.values(graph, monitor, (monitor.id, 1), (monitor.id, 2))
    assert report == ("stopped: step 40, loss 0.0250\ntrained for 80 s\nnewest samples: step_00000020.png")
    assert curve.shape[1] > 300 and curve.std() > 0.05
    assert samples.shape == (1, 64, 96, 3) and samples[0, 0, 0].tolist() == [0, 1, 0]
    with lock.hold(folder):
        (text,) = host.values(graph, monitor)
        assert text.startswith("running: step 40 of 100, loss 0.0250, 2 min left\n")
    ended = write_run(host.output_dir / "ended", 40)
    graph.set(monitor, run_name="ended")
    (text,) = host.values(graph, monitor)
    assert text.startswith("ended: step 40") and paths.run_names()[0] == ended.name
    for file in (ended / "samples").iterdir():
        file.unlink()
    (black,) = host.values(graph, (monitor.id, 2))
    assert black.max() == 0


def test_it_follows_a_run_until_it_ends(host):
    """Whose lock another process would hold."""
    folder = write_run(host.output_dir / "followed", 60)
    held, release = threading.Event(), threading.Event()

    def run() -> None:
        with lock.hold(folder):
            held.set()
            release.wait(60)
            with (folder / "metrics.jsonl").open("a") as file:
                file.write('{"step": 60, "loss": 0.5, "seconds": 120.0}\n')

    trainer = threading.Thread(target=run)
    trainer.start()
    assert held.wait(10)
    graph = Graph()
    monitor = graph.add("HyDiTTrainMonitor", run_name="followed", follow=True)
    seen: list[float] = []

    def progress(node_id: str, value: float, total: float) -> None:
        seen.append(value / total)
        release.set()

    result = host.run(graph, on_progress=progress).check()
    trainer.join(10)
    assert result.outputs[monitor.id]["hydit_train"][0].startswith("ended: step 60, loss 0.5000")
    assert seen[0] == pytest.approx(40 / 60, abs=0.01)
    assert any(node == monitor.id for node, _ in result.previews)


def test_interrupting_ends_the_watching(host):
    folder = write_run(host.output_dir / "followed", 60)
    graph = Graph()
    graph.add("HyDiTTrainMonitor", run_name="followed", follow=True)
    with lock.hold(folder):
        began = time.monotonic()
        result = host.run(graph, on_progress=lambda *_: host.interrupt())
        assert result.interrupted and time.monotonic() - began < 30
        assert lock.holder(folder) is not None


@pytest.fixture(autouse=True)
def no_runs(host: Any) -> Any:
    import shutil

    yield
    for name in ("runs", "ended", "followed"):
        shutil.rmtree(host.output_dir / name, ignore_errors=True)
