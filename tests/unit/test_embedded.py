"""The model that ships: does it draw what was asked, in both languages? Behavior, never stored pixels.

Pictures are judged as examples/embedded/judge.py does it, with the miniatures of all its things.
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

# How many questions of each of the judge's groups are asked, and the share that has to be right.
GROUPS = {
    "thing": (30, 0.85),
    "held-out color": (10, 0.8),
    "count": (8, 0.75),
    "place": (8, 0.85),
    "pair": (8, 0.6),
}
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
def judge() -> ModuleType:
    pytest.importorskip("cv2")
    sys.path.insert(0, str(EXAMPLE))
    try:
        spec = importlib.util.spec_from_file_location("embedded_judge", EXAMPLE / "judge.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["embedded_judge"] = module  # for its dataclass
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLE))
    return module


@pytest.fixture(scope="module")
def pipeline() -> hydit_core.Pipeline:
    return hydit_core.load()


def questions(judge: ModuleType, group: str) -> list:
    of_group = [q for q in judge.questions(list(judge.vocabulary().things)) if q.group == group]
    return judge.spread(of_group, GROUPS[group][0])


@pytest.fixture(scope="module")
def drawn(judge: ModuleType, pipeline: hydit_core.Pipeline) -> dict[tuple[str, str], list[Image.Image]]:
    """Pictures of some questions of each group, by group and language."""
    return {
        (group, language): pipeline(
            [getattr(q, language) for q in questions(judge, group)], seed=1, steps=STEPS
        )
        for group in GROUPS
        for language in ("english", "chinese")
    }


def test_draws_a_few_things_that_anybody_would_ask_for(
    judge: ModuleType, pipeline: hydit_core.Pipeline
) -> None:
    prompts = ["a red apple", "三颗蓝色的星星", "a cat and a dog", "红色的汽车在左边"]
    pictures = pipeline(prompts, seed=5, steps=12)
    wrong = [prompt for p, prompt in zip(pictures, prompts, strict=True) if not judge.right(p, prompt)]
    assert not wrong
    # each picture is right for its own prompt alone
    others = [judge.right(p, prompt) for p, prompt in zip(pictures, prompts[1:] + prompts[:1], strict=True)]
    assert not any(others)


@pytest.mark.slow
@pytest.mark.parametrize("language", ["english", "chinese"])
@pytest.mark.parametrize("group", GROUPS)
def test_draws_what_was_asked(judge: ModuleType, drawn: dict, group: str, language: str) -> None:
    asked = questions(judge, group)
    wrong = [
        prompt
        for question, picture in zip(asked, drawn[group, language], strict=True)
        if not judge.examine(picture, prompt := getattr(question, language))[question.respect]
    ]
    assert len(asked) - len(wrong) >= GROUPS[group][1] * len(asked), wrong


@pytest.mark.slow
def test_both_languages_draw_the_same_thing(judge: ModuleType, drawn: dict) -> None:
    english, chinese = (
        np.stack([sys.modules["looks"].signature(picture) for picture in drawn["thing", language]])
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


def test_seed_and_guidance_matter(pipeline: hydit_core.Pipeline) -> None:
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
