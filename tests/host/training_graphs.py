"""A small data set in ComfyUI's input, and graphs that train with it on the embedded model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from find_host import ROOT, side_folder
from graphs import Graph, Node

PICTURES = ROOT / "examples" / "first" / "pictures"
BASE = "[embedded] hydit-icons-128"
FAST = "[run]\nsteps = {steps}\nbatch_size = 2\nthreads = 1\n[lora]\nrank = 4\n[samples]\nsteps = 3\n"


def write_dataset(folder: Path, count: int = 6, *, captions: bool = True) -> Path:
    """The first pictures of the README's example."""
    folder.mkdir(parents=True)
    for picture in sorted(PICTURES.glob("*.png"))[:count]:
        shutil.copy(picture, folder)
        if captions:
            shutil.copy(picture.with_suffix(".txt"), folder)
    return folder


def trainer_here(patch: pytest.MonkeyPatch) -> None:
    """What the trainer needs and this Python lacks comes from the tests' side folder."""
    patch.setenv("PYTHONPATH", os.pathsep.join([str(side_folder()), os.environ.get("PYTHONPATH", "")]))


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
