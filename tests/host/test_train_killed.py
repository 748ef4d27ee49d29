"""A ComfyUI that is killed in the middle of a training: the trainer ends by itself, and the next goes on."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from comfy_server import ComfyServer
from graphs import Graph
from training_graphs import ENVIRONMENT, train, write_dataset

from hydit_core.train import lock


@pytest.fixture
def server() -> Iterator[ComfyServer]:
    running = ComfyServer(name="server-training", environment=ENVIRONMENT)
    write_dataset(running.input_dir / "shapes")
    yield running
    running.close()


def steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [record["step"] for record in records if "loss" in record]


def wait(until: Callable[[], bool], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)


def test_a_killed_server_leaves_a_run_that_goes_on(server):
    graph = Graph()
    trained = train(graph, steps=24)
    run = server.output_dir / "hydit_train" / "shapes"

    def queue() -> None:
        with contextlib.suppress(Exception):  # the connection ends with the server
            server.run(graph)

    queued = threading.Thread(target=queue, daemon=True)
    queued.start()
    wait(lambda: len(steps(run)) > 3)
    server.kill()
    wait(lambda: lock.holder(run) is None)
    before = steps(run)
    assert 3 < len(before) < 24 and not (server.models_dir / "loras" / "shapes.safetensors").exists()
    assert "everything is saved" in (run / "log.txt").read_text()

    server.start_again()
    result = server.run(graph, timeout=900).check()
    assert steps(run)[: len(before)] == before and steps(run)[-1] == 24
    assert "continuing from" in (run / "log.txt").read_text()
    assert (server.models_dir / "loras" / "shapes.safetensors").is_file()
    assert result.outputs[trained.id]["hydit_train"][0].startswith("trained: 24 steps in ")
