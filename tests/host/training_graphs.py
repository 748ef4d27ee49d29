"""A small data set in ComfyUI's input, and graphs that train with it on the embedded model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from find_host import ROOT, side_folder
from graphs import Graph, Node

PICTURES = ROOT / "hydit_core" / "assets" / "pictures" / "hexagon"
BASE = "[embedded] hydit-icons-128"
FAST = (
    "[run]\nsteps = {steps}\nbatch_size = 2\nthreads = 1\n[lora]\nrank = 4\n[samples]\nsteps = 3\n"
    "[validation]\nprior = []\n[data.prior]\nprompts = []\n"
)


def write_dataset(folder: Path, count: int = 6, *, captions: bool = True) -> Path:
    """The first pictures of the README's example."""
    folder.mkdir(parents=True)
    for picture in sorted(PICTURES.glob("*.png"))[:count]:
        shutil.copy(picture, folder)
        if captions:
            shutil.copy(picture.with_suffix(".txt"), folder)
    return folder


#: What the trainer needs and this Python lacks is in the tests' side folder.
ENVIRONMENT = {"PYTHONPATH": str(side_folder()), "OMP_NUM_THREADS": "1"}


def train(graph: Graph, **inputs: Any) -> Node:
    """A HyDiTTrainLoRA that takes seconds."""
    steps = inputs.pop("steps", 8)
    return graph.add(
        "HyDiTTrainLoRA",
        **{
            "dataset_name": "shapes",
            "base_name": BASE,
            "output_name": "shapes",
            "trigger": "hexagon",
            "kind": "style",
            "budget": 0,
            "budget_unit": "steps",
            "settings": FAST.format(steps=steps),
            **inputs,
        },
    )


def training_folders(host: Any, patch: Any) -> Iterator[None]:
    """For a fixture: a data set `shapes`, a folder for LoRAs, and a trainer that runs; gone afterwards."""
    for name, value in ENVIRONMENT.items():
        patch.setenv(name, value)
    write_dataset(host.input_dir / "shapes")
    (host.models_dir / "loras").mkdir(exist_ok=True)
    yield
    places = (host.input_dir / "shapes", host.output_dir / "hydit_train", host.models_dir / "loras")
    for folder in places:
        shutil.rmtree(folder, ignore_errors=True)
    host.refresh()
