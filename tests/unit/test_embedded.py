"""The model that ships: does it draw what was asked, in both languages? Behavior, never stored pixels.

Pictures are compared with 16 x 16 signatures of the concepts after cropping to what is not white, so neither
position nor size counts (examples/embedded/evaluate.py).
"""

from __future__ import annotations

import colorsys
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import hydit_core

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "embedded"
STEPS = 16

HUES = {  # degrees of the mean color of what is not white
    "red heart": (340, 10),
    "blue heart": (190, 225),
    "green circle": (80, 140),
    "yellow star": (35, 60),
    "purple square": (245, 295),
    "红色的心": (340, 10),
    "蓝色的方块": (190, 225),
    "绿色的汽车": (80, 150),
    "橙色的圆形": (20, 45),
    "紫色的书": (245, 295),
}


@pytest.fixture(scope="module")
def evaluate() -> ModuleType:
    sys.path.append(str(EXAMPLE))
    spec = importlib.util.spec_from_file_location("embedded_evaluate", EXAMPLE / "evaluate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pipeline() -> hydit_core.Pipeline:
    return hydit_core.load()


@pytest.fixture(scope="module")
def drawn(evaluate: ModuleType, pipeline: hydit_core.Pipeline) -> dict[str, list[Image.Image]]:
    """Pictures of the 30 chosen concepts and of the held-out ones, by group and language."""
    concepts = evaluate.read_concepts()
    groups = {"trained": evaluate.chosen(concepts), "held_out": [c for c in concepts if c.held_out]}
    return {
        f"{name}_{language}": pipeline([getattr(c, language)[0] for c in group], seed=1, steps=STEPS)
        for name, group in groups.items()
        for language in ("english", "chinese")
    }


@pytest.mark.slow
@pytest.mark.parametrize("language", ["english", "chinese"])
@pytest.mark.parametrize(("group", "share"), [("trained", 0.9), ("held_out", 0.7)])
def test_draws_what_was_asked(
    evaluate: ModuleType, drawn: dict[str, list[Image.Image]], group: str, share: float, language: str
) -> None:
    concepts = evaluate.read_concepts()
    references = evaluate.References(concepts)
    asked = evaluate.chosen(concepts) if group == "trained" else [c for c in concepts if c.held_out]
    found = [references.nearest(picture) for picture in drawn[f"{group}_{language}"]]
    wrong = {
        c.english[0]: f.english[0] for c, f in zip(asked, found, strict=True) if not references.alike(c, f)
    }
    assert len(asked) - len(wrong) >= share * len(asked), wrong


@pytest.mark.slow
def test_both_languages_draw_the_same_thing(
    evaluate: ModuleType, drawn: dict[str, list[Image.Image]]
) -> None:
    english, chinese = (
        np.stack([evaluate.signature(p) for p in drawn[f"trained_{language}"]])
        for language in ("english", "chinese")
    )
    mirrored = chinese[:, :, ::-1]
    distances = np.minimum(
        *(np.sqrt(((english[:, None] - other[None]) ** 2).mean((2, 3, 4))) for other in (chinese, mirrored))
    )
    same = distances.argmin(1) == np.arange(len(english))
    assert same.mean() >= 0.9


@pytest.mark.slow
def test_colors_are_those_asked_for(pipeline: hydit_core.Pipeline) -> None:
    wrong = {}
    for prompt, (low, high) in HUES.items():
        (picture,) = pipeline(prompt, seed=3, steps=STEPS)
        pixels = np.asarray(picture, np.float32).reshape(-1, 3) / 255
        content = pixels[pixels.min(1) < 0.75]
        assert len(content) > 200, f"{prompt}: nothing drawn"
        hue = colorsys.rgb_to_hsv(*content.mean(0))[0] * 360
        inside = low <= hue <= high if low < high else hue >= low or hue <= high
        if not inside:
            wrong[prompt] = hue
    assert not wrong


def test_seed_and_guidance_matter(evaluate: ModuleType, pipeline: hydit_core.Pipeline) -> None:
    def draw(**settings: float) -> np.ndarray:
        (picture,) = pipeline("red apple", **{"steps": 8, "seed": 1, **settings})
        return np.asarray(picture, np.float32)

    first = draw()
    assert np.array_equal(first, draw())
    assert np.abs(first - draw(seed=2)).mean() > 2
    assert np.abs(first - draw(cfg=1.0)).mean() > 1


def test_the_file_is_like_every_other(tmp_path: Path, pipeline: hydit_core.Pipeline) -> None:
    """A copy elsewhere, under another name, draws the same picture."""
    (source,) = (ROOT / "hydit_core" / "assets").glob("*.safetensors")
    copy = tmp_path / "mine.safetensors"
    shutil.copy(source, copy)
    again = hydit_core.load(copy)
    (first,), (second,) = (p("a blue car", seed=5, steps=4) for p in (pipeline, again))
    assert np.array_equal(np.asarray(first), np.asarray(second))


def test_size_of_what_ships() -> None:
    assets = ROOT / "hydit_core" / "assets"
    assert sum(file.stat().st_size for file in assets.iterdir()) <= 16 * 2**20
