"""The model that came with hydit before this one loads and draws, for whoever kept its file.

tests/data/first_edition has all of that file but its weights: metadata, names, shapes, types, tokenizers.
"""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import hydit_core

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "tests/data/first_edition/hydit-icons-128.json.gz"


def tensor(told: dict[str, Any], random: torch.Generator) -> torch.Tensor:
    if "base64" in told:
        return torch.frombuffer(bytearray(base64.b64decode(told["base64"])), dtype=torch.uint8)
    shape = told["shape"]
    width = max(1, int(np.prod(shape[1:])))
    return (torch.randn(shape, generator=random) / width**0.5).to(getattr(torch, told["dtype"]))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole file, with random weights."""
    stored = json.loads(gzip.decompress(STORED.read_bytes()))
    random = torch.Generator().manual_seed(1)
    path = tmp_path_factory.mktemp("first") / "hydit-icons-128.safetensors"
    save_file(
        {name: tensor(told, random) for name, told in stored["tensors"].items()}, path, stored["metadata"]
    )
    assert path.stat().st_size > 11_000_000
    return path


def test_it_draws(file: Path) -> None:
    pipe = hydit_core.load(file, device="cpu")
    assert pipe.title == "hydit icons 128" and pipe.name == "hydit-icons-128.safetensors"
    assert pipe.dit.config.hidden_size == 160 and len(pipe.dit.blocks) == 6
    assert pipe.info.defaults.width == 128 and pipe.info.defaults.steps == 25
    (picture,) = pipe("a red apple", steps=2, seed=1)
    assert picture.size == (128, 128) and np.asarray(picture).std() > 5


def test_it_has_its_own_words(file: Path) -> None:
    pipe = hydit_core.load(file, device="cpu")
    now = hydit_core.load(device="cpu")
    assert pipe.advice(["a red apple"], pipe.settings()) == []
    assert any("只" in note for note in pipe.advice(["一只狗"], pipe.settings()))
    assert now.advice(["一只狗"], now.settings()) == []
