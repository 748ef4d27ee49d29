"""HyDiTTrainLoRA in ComfyUI: from pictures to a picture drawn with the LoRA."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from graphs import Graph
from training_graphs import BASE, train, trainer_here, write_dataset


@pytest.fixture(autouse=True)
def folders(host: Any, monkeypatch: Any) -> Any:
    trainer_here(monkeypatch)
    write_dataset(host.input_dir / "shapes")
    (host.models_dir / "loras").mkdir(exist_ok=True)
    yield
    shutil.rmtree(host.input_dir / "shapes")
    for folder in (host.output_dir / "hydit_train", host.models_dir / "loras"):
        shutil.rmtree(folder, ignore_errors=True)
    host.refresh()


def records(host: Any, name: str = "shapes") -> list[dict[str, Any]]:
    path = host.output_dir / "hydit_train" / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(host: Any, name: str = "shapes") -> list[int]:
    return [record["step"] for record in records(host, name) if "loss" in record]


def told(result: Any, node: Any) -> str:
    return "\n".join(result.outputs[node.id]["hydit_train"])


def drawn(graph: Graph, model: Any, clip: Any, vae: Any) -> Any:
    text = graph.add("HyDiTTextEncode", clip=clip, prompt="hexagon", _defaults=True)
    empty = graph.add("EmptyLatentImage", width=128, height=128, batch_size=1)
    latent = graph.add(
        "KSampler", model=model, positive=text, negative=text, latent_image=empty, seed=1, steps=3, cfg=2.0,
        sampler_name="euler", scheduler="normal", denoise=1.0,
    )  # fmt: skip
    return graph.add("VAEDecode", samples=latent, vae=vae)


def test_from_pictures_to_a_picture_with_the_lora(host):
    graph = Graph()
    base = graph.add("HyDiTCheckpointLoader", ckpt_name=BASE, _defaults=True)
    trained = train(graph)
    model = graph.add("LoraModelLoader", model=base, lora=trained, strength_model=1.0, bypass=False)
    without = drawn(graph, base, base.out(1), base.out(2))
    with_lora = drawn(graph, model, base.out(1), base.out(2))
    plain, styled, lora, name = host.values(graph, without, with_lora, trained, (trained.id, 1))
    assert (plain - styled).abs().mean() > 1e-3
    assert name == "shapes.safetensors" and (host.models_dir / "loras" / name).is_file()
    assert lora and steps(host) == list(range(1, 9))
