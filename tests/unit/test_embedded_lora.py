"""The style LoRA that ships: more strength is more style, and the thing stays what it was."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import hydit_core
from hydit_core.embedded import embedded_loras

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "lora"
PROMPTS = ["orange", "green triangle", "红苹果"]


@pytest.fixture(scope="module")
def evaluate() -> ModuleType:
    pytest.importorskip("cv2")
    sys.path.append(str(EXAMPLE))
    spec = importlib.util.spec_from_file_location("lora_evaluate", EXAMPLE / "evaluate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(strength: float) -> list[Image.Image]:
    pipe = hydit_core.load(device="cpu")
    if strength:
        (lora,) = embedded_loras()
        assert len(pipe.load_lora(lora, strength).unmatched) == 0
    settings = pipe.settings(steps=12)
    return [picture.image for prompt in PROMPTS for picture in pipe.pictures([prompt], settings, seed=1)]


def redness(picture: Image.Image) -> float:
    """How much red and green are above blue: everything in the style is below 0."""
    pixels = np.asarray(picture, np.float32)
    subject = pixels[(255 - pixels).max(2) > 25]
    return float(subject[:, :2].max(1).mean() - subject[:, 2].mean())


def test_it_is_small() -> None:
    (lora,) = embedded_loras()
    assert lora.stat().st_size < 1_000_000


def test_strength_brings_the_style_and_leaves_the_subject(evaluate: ModuleType) -> None:
    plain, half, full = (drawn(strength) for strength in (0.0, 0.5, 1.0))
    for none, some, all_of_it in zip(plain, half, full, strict=True):
        assert redness(none) > 40
        assert redness(none) > redness(some)
        assert redness(all_of_it) < 0
        shape = evaluate.silhouette(none)
        assert evaluate.overlap(shape, evaluate.silhouette(all_of_it)) > 0.75
