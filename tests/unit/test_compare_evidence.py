"""The evidence of the fast modes: its prompts, its sides, and the embedded model's judge."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hydit_core.compare.judge import load_judge
from hydit_core.compare.sides import parse_side

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def fast():
    spec = importlib.util.spec_from_file_location("fast", ROOT / "benchmarks" / "fast.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["fast"] = module  # for its dataclass
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fast"]


def test_every_side_is_understood(fast, tmp_path):
    for one in fast.sets(tmp_path).values():
        reference = one.sides["a"]
        sides = {letter: parse_side(letter, text, reference) for letter, text in one.sides.items()}
        assert all(side.peer is None or side.peer in sides for side in sides.values())


def test_prompts_are_what_the_model_was_taught_half_in_each_language(fast, tmp_path):
    sys.path.insert(0, str(ROOT / "examples" / "embedded"))
    try:
        from icons import read_concepts
    finally:
        sys.path.pop(0)
    lines = fast.PROMPTS.read_text("utf-8").splitlines()
    assert len(lines) == len(set(lines)) == 64
    assert sum(line.isascii() for line in lines) == 32
    taught = {name for c in read_concepts() if not c.held_out for name in (*c.english, *c.chinese)}
    assert set(lines) <= taught
    fewer = fast.chosen_prompts(8, tmp_path).read_text("utf-8").splitlines()
    assert len(set(fewer)) == 8 and set(fewer) <= set(lines)
    assert sum(line.isascii() for line in fewer) == 4


def test_the_judge_knows_what_was_asked_for():
    right = load_judge(f"{ROOT / 'examples/embedded/evaluate.py'}:right")
    with np.load(ROOT / "examples/embedded/signatures.npz") as stored:
        at = stored["ids"].tolist().index("red-heart")
        heart = Image.fromarray(stored["signatures"][at]).resize((128, 128), Image.Resampling.NEAREST)
    assert right(heart, "red heart") and right(heart, "红心")
    assert not right(heart, "grapes")
    assert right(heart, "a castle in the sky") is None
