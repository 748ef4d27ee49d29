"""One LoRA file everywhere: `generate`, our loader, ComfyUI's own, both models, and merged into a file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from find_host import ROOT
from graphs import Graph
from lora_files import forms
from PIL import Image
from sampling_models import native_model, weights
from test_lora import off, patched
from test_workflows import apart, pictures, redrawn
from training_graphs import ENVIRONMENT, write_dataset

from hydit_core.embedded import embedded_loras, embedded_model
from hydit_core.generate.__main__ import main
from hydit_core.lora import reading, writing
from hydit_core.lora.merge import merge_files
from hydit_core.weights.files import open_tensors

EMBEDDED = "[embedded] hydit-icons-128"


@pytest.fixture
def lora(host: Any, request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A LoRA of this project's trainer among the user's own: the embedded one, or one of another kind."""
    kind = getattr(request, "param", "delft")
    made = embedded_loras()[0] if kind == "delft" else trained(kind, tmp_path / "run")
    folder = host.models_dir / "loras"
    folder.mkdir(exist_ok=True)
    path = Path(shutil.copy(made, folder / f"{kind}.safetensors"))
    host.refresh()
    yield path
    path.unlink()
    host.refresh()


def trained(kind: str, folder: Path) -> Path:
    """A few large steps on the embedded model, in a process of their own."""
    pictures = write_dataset(folder / "pictures")
    (folder / "config.toml").write_text(
        f"""
        model.init_from = "{embedded_model().as_posix()}"
        data = {{ sources = [{{ path = "{pictures.as_posix()}" }}], resolution = 128 }}
        objective.kind = "lora"
        lora = {{ kind = "{kind}", rank = 4 }}
        optimizer.lr = 2e-2
        run = {{ output_dir = ".", steps = 6, batch_size = 2, threads = 1, device = "cpu" }}
        ema.enabled = false
        metrics.tensorboard = false
        """,
        encoding="utf-8",
    )
    path = os.pathsep.join((str(ROOT), ENVIRONMENT["PYTHONPATH"]))
    subprocess.run(
        [sys.executable, "-m", "hydit_core.train", folder / "config.toml"],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
        timeout=600,
        check=True,
    )
    return folder / "lora.safetensors"


@pytest.mark.parametrize("lora", ["delft", "loha", "lokr"], indirect=True)
def test_generate_our_loader_and_comfyuis_draw_the_same(host: Any, lora: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "a.png"
    options = ["--prompt", "a bell", "--seed", "3", "--steps", "8", "--device", "cpu", "--out", str(drawn)]
    assert main([*options, "--lora", f"{lora}:0.8"]) == 0
    assert redrawn(host, drawn).max() <= 2

    with Image.open(drawn) as picture:
        prompt = json.loads(picture.text["prompt"])
        (loader,) = (node for node in prompt.values() if node["class_type"] == "HyDiTLoraLoader")
        del loader["inputs"]["block_weights"]
        assert (loader["inputs"]["lora_name"], loader["inputs"]["strength_model"]) == (lora.name, 0.8)
        loader["class_type"] = "LoraLoader"
        (stock,) = pictures(host, host.run(prompt).check())
        assert apart(picture, stock).max() <= 2

    assert main([*options[:-1], str(tmp_path / "plain.png")]) == 0
    with Image.open(tmp_path / "plain.png") as plain, Image.open(drawn) as picture:
        assert apart(plain, picture).max() > 50


@pytest.mark.parametrize("format", ["comfy", "kohya"])
def test_what_is_written_here_fits_comfyuis_model_in_comfyuis_loader(
    host: Any, tmp_path: Path, format: str
) -> None:
    form = forms()["peft"]
    adapter = reading.read(form.write(tmp_path / "peft"))
    path = host.models_dir / "loras" / f"written-{format}.safetensors"
    path.parent.mkdir(exist_ok=True)
    writing.write(adapter, path, format=format)
    host.refresh()
    try:
        g = Graph()
        model = host.give(g, native_model(host))
        node = g.add("LoraLoaderModelOnly", model=model, lora_name=path.name, strength_model=0.8)
        found = patched(host.values(g, node)[0])
    finally:
        path.unlink()
        host.refresh()
    assert off(found, form.expected(weights(), 0.8)) <= 1e-5


def test_a_model_saved_with_a_lora_is_the_merged_file(host: Any, lora: Path, tmp_path: Path) -> None:
    g = Graph()
    ckpt = g.add("HyDiTCheckpointLoader", _defaults=True, ckpt_name=EMBEDDED)
    loader = g.add(
        "HyDiTLoraLoader", _defaults=True, model=ckpt.out(0), lora_name=lora.name, strength_model=0.7
    )
    parts = {"clip": ckpt.out(1), "vae": ckpt.out(2)}
    node = g.add("HyDiTModelSave", model=loader.out(0), filename_prefix="checkpoints/styled", **parts)
    name = host.run(g).check().outputs[node.id]["hydit_saved"][0]
    saved = open_tensors(host.output_dir / name)

    merged_file = tmp_path / "merged.safetensors"
    merge_files(embedded_model(), [(lora, 0.7)], merged_file, dtype=torch.float32)
    merged, plain = open_tensors(merged_file), open_tensors(embedded_model())
    changed = 0
    assert set(saved) == set(merged)
    for key in merged:
        expected, found = merged.get(key), saved.get(key)
        if not expected.is_floating_point():
            continue
        step = float(expected.abs().max()) * float(torch.finfo(found.dtype).eps)
        assert float((found.float() - expected.float()).abs().max()) <= max(step, 1e-6), key
        changed += not torch.equal(expected.float(), plain.get(key).float())
    assert changed == len(reading.read(lora).modules)
