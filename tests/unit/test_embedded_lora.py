"""The LoRAs that ship.

A style: more strength brings more of it, and the thing stays what it was. And one that draws in few steps.
"""

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
STYLE, TURBO = embedded_loras()
PROMPTS = ["orange", "green triangle", "红苹果"]
FEW = ["a rocket", "一只狗", "three blue stars"]


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
        assert len(pipe.load_lora(STYLE, strength).unmatched) == 0
    settings = pipe.settings(steps=12)
    return [picture.image for prompt in PROMPTS for picture in pipe.pictures([prompt], settings, seed=1)]


def redness(picture: Image.Image) -> float:
    """How much red and green are above blue: everything in the style is below 0."""
    pixels = np.asarray(picture, np.float32)
    subject = pixels[(255 - pixels).max(2) > 25]
    return float(subject[:, :2].max(1).mean() - subject[:, 2].mean())


def test_they_are_small() -> None:
    assert max(lora.stat().st_size for lora in embedded_loras()) < 1_000_000


def test_strength_brings_the_style_and_leaves_the_subject(evaluate: ModuleType) -> None:
    plain, half, full = (drawn(strength) for strength in (0.0, 0.5, 1.0))
    for none, some, all_of_it in zip(plain, half, full, strict=True):
        assert redness(none) > 40
        assert redness(none) > redness(some)
        assert redness(all_of_it) < 0
        shape = evaluate.silhouette(none)
        assert evaluate.overlap(shape, evaluate.silhouette(all_of_it)) > 0.75


def test_few_steps_without_guidance_draw_what_the_model_draws() -> None:
    """By the file's own settings; the same settings without the LoRA are far off."""
    pipe = hydit_core.load(device="cpu")
    full = pipe(FEW, seed=1)
    pipe.load_lora(TURBO)
    settings = pipe.settings()
    assert (settings.sampler, settings.spacing, settings.steps, settings.cfg) == ("euler", "trailing", 8, 1.0)
    few = pipe(FEW, seed=1)
    pipe = hydit_core.load(device="cpu")
    bare = pipe(FEW, seed=1, sampler="euler", spacing="trailing", steps=8, cfg=1.0)

    def apart(pictures: list[Image.Image]) -> float:
        pairs = zip(pictures, full, strict=True)
        return float(np.mean([np.square(np.asarray(a, float) - np.asarray(b, float)) for a, b in pairs]))

    assert apart(few) < 0.5 * apart(bare)
