"""HyDiTTrainLoRA in ComfyUI: from pictures to a picture drawn with the LoRA."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import pytest
from graphs import Graph, Node
from training_graphs import BASE, FAST, train, training_folders

from hydit_core.embedded import embedded_model


@pytest.fixture(autouse=True)
def folders(host: Any, monkeypatch: Any) -> Any:
    yield from training_folders(host, monkeypatch)


def steps(host: Any, name: str = "shapes") -> list[int]:
    """The steps that a run has recorded."""
    path = host.output_dir / "hydit_train" / name / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [record["step"] for record in records if "loss" in record]


def told(result: Any, node: Node) -> list[str]:
    return result.outputs[node.id]["hydit_train"][0].split("\n")


def drawn(graph: Graph, model: Any, base: Node) -> Node:
    text = graph.add("HyDiTTextEncode", clip=base.out(1), prompt="hexagon", _defaults=True)
    empty = graph.add("EmptyLatentImage", width=128, height=128, batch_size=1)
    latent = graph.add(
        "KSampler", model=model, positive=text, negative=text, latent_image=empty, seed=1, steps=3, cfg=2.0,
        sampler_name="euler", scheduler="normal", denoise=1.0,
    )  # fmt: skip
    return graph.add("VAEDecode", samples=latent, vae=base.out(2))


def test_from_pictures_to_a_picture_with_the_lora(host):
    """By ComfyUI's own LoRA node and by ours from the file; once trained, it is not trained again."""
    graph = Graph()
    base = graph.add("HyDiTCheckpointLoader", ckpt_name=BASE, _defaults=True)
    trained = train(graph, steps=8)
    stock = graph.add("LoraModelLoader", model=base, lora=trained, strength_model=1.0, bypass=False)
    plain, styled, lora, name = host.values(
        graph, drawn(graph, base, base), drawn(graph, stock, base), trained, (trained.id, 1)
    )
    assert (plain - styled).abs().mean() > 1e-3
    assert name == "shapes.safetensors" and len(lora) > 10
    assert steps(host) == list(range(1, 9))
    assert any(node == trained.id and value > 0 for node, value, _ in host.progress)
    assert any(node == trained.id for node, _ in host.previews)
    texts = [data for event, data in host.events if event == 3]  # BinaryEventTypes.TEXT
    assert any(b"step" in data and b"of 8" in data for data in texts)

    done = (host.output_dir / "hydit_train" / "shapes" / "metrics.jsonl").stat().st_mtime_ns
    again = host.run(Graph(graph.prompt)).check()  # with an empty cache, as after a restart
    assert (host.output_dir / "hydit_train" / "shapes" / "metrics.jsonl").stat().st_mtime_ns == done
    assert told(again, trained)[0].startswith("trained: 8 steps in ")
    assert told(again, trained)[1:3] == ["LoRA: shapes.safetensors", "run: hydit_train/shapes"]
    assert trained.id in host.run(Graph(graph.prompt), keep_cache=True).check().cached

    host.refresh()
    ours = Graph()
    base = ours.add("HyDiTCheckpointLoader", ckpt_name=BASE, _defaults=True)
    loaded = ours.add("HyDiTLoraLoader", model=base, lora_name=name, _defaults=True)
    (same,) = host.values(ours, drawn(ours, loaded, base))
    assert (same - styled).abs().max() < 1e-3


def test_interrupted_it_goes_on_and_another_run_is_another(host):
    graph = Graph()
    trained = train(graph, steps=40)
    interrupted = host.run(graph, on_progress=lambda *_: len(steps(host)) > 3 and host.interrupt())
    assert interrupted.interrupted and not (host.models_dir / "loras" / "shapes.safetensors").exists()
    before = steps(host)
    assert 3 < len(before) < 40
    host.run(graph).check()
    assert steps(host)[: len(before)] == before and steps(host)[-1] == 40
    assert "continuing from" in (host.output_dir / "hydit_train" / "shapes" / "log.txt").read_text()
    graph.set(trained, settings=FAST.format(steps=2))
    result = host.run(graph).check()
    assert steps(host, "shapes-2")[-1] == 2 and steps(host)[-1] == 40
    assert told(result, trained)[1:3] == ["LoRA: shapes-2.safetensors", "run: hydit_train/shapes-2"]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "the training ended unexpectedly (exit code -9)"),
        (signal.SIGTERM, "the training was stopped from outside; everything is saved: run this again"),
    ],
)
def test_a_trainer_that_is_killed_is_one_line_and_the_next_run_goes_on(host, number, said):
    graph = Graph()
    train(graph, steps=40)

    def kill(*_: Any) -> None:
        if len(steps(host)) > 10:
            lock = (host.output_dir / "hydit_train" / "shapes" / ".lock").read_text()
            os.kill(int(lock.split()[1]), number)

    result = host.run(graph, on_progress=kill)
    assert result.error is not None and result.error.exception_message.startswith(said)
    assert "\n" not in result.error.exception_message
    host.run(graph).check()
    assert steps(host)[-1] == 40


def test_missing_captions_are_told_and_trained_with_another(host):
    for caption in sorted((host.input_dir / "shapes").glob("*.txt"))[:2]:
        caption.unlink()
    graph = Graph()
    trained = train(graph, steps=2)
    said = told(host.run(graph).check(), trained)
    assert any(line.startswith("2 of 6 pictures have no caption, while others have one: ") for line in said)
    config = (host.output_dir / "hydit_train" / "shapes" / "config.toml").read_text()
    assert '"caption" = "hexagon' in config or 'caption = "hexagon' in config


def test_missing_captions_that_nothing_can_take_the_place_of_are_one_line(host):
    (host.input_dir / "shapes").rename(host.input_dir / "images")
    for caption in (host.input_dir / "images").glob("*.txt"):
        caption.unlink()
    graph = Graph()
    train(graph, dataset_name="images", trigger="", steps=2)
    message = host.run(graph).error.exception_message
    (host.input_dir / "images").rename(host.input_dir / "shapes")
    assert "caption" in message and "\n" not in message
    assert not (host.output_dir / "hydit_train" / "shapes" / "config.toml").exists()


def test_pictures_that_go_while_it_trains_are_one_line(host, caplog):
    """The trainer's own error: its first line on the node, what it said last in ComfyUI's log."""
    graph = Graph()
    train(graph, steps=4)
    child = host.module("nodes.host.train_child")
    start = child.Child.__init__

    def removing(self: Any, *arguments: Any) -> None:
        for picture in (host.input_dir / "shapes").glob("*.png"):
            picture.unlink()
        start(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child.Child, "__init__", removing)
        result = host.run(graph)
    message = result.error.exception_message
    assert message.startswith("the training ended: data source ") and "no pictures found" in message
    assert "\n" not in message
    assert any("no pictures found" in record.message for record in caplog.records)
    assert not (host.models_dir / "loras" / "shapes.safetensors").exists()


def test_a_folder_without_anything_to_learn_is_one_line(host):
    for picture in (host.input_dir / "shapes").glob("*.png"):
        picture.write_bytes(b"no picture")
    graph = Graph()
    train(graph, steps=2)
    message = host.run(graph).error.exception_message
    assert "shapes" in message and "\n" not in message
    assert not (host.output_dir / "hydit_train" / "shapes" / "config.toml").exists()


def test_a_setting_that_the_trainer_refuses_is_one_line(host):
    graph = Graph()
    train(graph, settings="[lora]\nrank = -1")
    message = host.run(graph).error.exception_message
    assert message.startswith("settings: lora.rank") and "\n" not in message


def test_minutes(host):
    """A budget of time ends it with what there is, and it is done."""
    run = host.module("nodes.host.train_run")
    wishes = host.module("hydit_core.train.quick.wish")
    settings = host.module("nodes.host.train_settings").user_settings(FAST.format(steps=100_000))
    wish = wishes.Wish(host.input_dir / "shapes", "hexagon", embedded_model(), "style", minutes=0.02)
    done = run.train(wish, settings, "timed", "a key")
    trained = steps(host, "timed")[-1]
    assert 0 < trained < 100_000 and done.lora == host.models_dir / "loras" / "timed.safetensors"
    before = time.monotonic()
    assert run.train(wish, settings, "timed", "a key").lora == done.lora
    assert steps(host, "timed")[-1] == trained and time.monotonic() - before < 5


def test_what_is_missing_is_named_with_the_command(host, monkeypatch):
    child = host.module("nodes.host.train_child")
    monkeypatch.setattr(child, "_NEEDED", {"peft": "peft", "nothing_of_this_name": "some-package"})
    graph = Graph()
    train(graph)
    message = host.run(graph).error.exception_message
    assert "training needs some-package, which" in message and "\n" not in message
    assert message.endswith('" -m pip install some-package')


def test_files_of_the_same_name_stay(host):
    path = host.models_dir / "loras" / "shapes.safetensors"
    path.write_bytes(b"another's")
    graph = Graph()
    trained = train(graph, steps=1)
    assert told(host.run(graph).check(), trained)[1] == "LoRA: shapes-2.safetensors"
    assert path.read_bytes() == b"another's"
    assert told(host.run(graph).check(), trained)[1] == "LoRA: shapes-2.safetensors"
    assert len(list(path.parent.iterdir())) == 2
