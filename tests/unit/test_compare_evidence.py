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


@pytest.fixture(scope="module")
def judge():
    pytest.importorskip("cv2")
    return ROOT / "examples" / "embedded" / "judge.py"


@pytest.fixture(scope="module")
def right(judge):
    return load_judge(f"{judge}:right")


def test_prompts_are_of_the_judges_vocabulary_half_in_each_language(fast, judge, right, tmp_path):
    lines = fast.PROMPTS.read_text("utf-8").splitlines()
    assert len(lines) == len(set(lines)) == 64
    assert [line.isascii() for line in lines] == [True, False] * 32
    assert str(fast.JUDGE) == f"{judge}:right"
    nothing = Image.new("RGB", (128, 128), "white")
    assert {line for line in lines if right(nothing, line) is None} == set()
    fewer = fast.chosen_prompts(8, tmp_path).read_text("utf-8").splitlines()
    assert len(set(fewer)) == 8 and set(fewer) <= set(lines)
    assert sum(line.isascii() for line in fewer) == 4


def test_every_caption_of_the_training_is_of_the_judges_vocabulary(judge, monkeypatch):
    """And is read as what it was written for."""
    monkeypatch.syspath_prepend(str(judge.parent))
    from asked import readings, vocabulary
    from things import chinese_nouns, describe, describe_count, describe_pair, english_nouns

    things = vocabulary().things
    for thing in things[::41]:
        for size, side in (("", ""), ("small", "left"), ("big", ""), ("", "top")):
            for said in describe(thing, size, side):
                parts = [(a.parts[0], a.place) for a in readings(said) if len(a.parts) == 1]
                assert any(thing in p.things and (p.size, place) == (size, side) for p, place in parts), said
        for count in (2, 3) if thing.plural else ():
            for said in describe_count(thing, count):
                assert any(thing in a.parts[0].things and a.parts[0].count == count for a in readings(said))
    for first, second in zip(things[::50], things[7::50], strict=False):
        nouns = [words(thing)[-1] for words in (english_nouns, chinese_nouns) for thing in (first, second)]
        for stacked in (False, True):
            for said in describe_pair(first, second, stacked, nouns):
                pairs = [a for a in readings(said) if len(a.parts) == 2]
                assert any(first in a.parts[0].things and second in a.parts[1].things for a in pairs), said
                assert any((a.place == "column") == stacked for a in pairs), said


class Looks:
    """Pictures of things, put together from the judge's own miniatures."""

    def __init__(self, folder: Path) -> None:
        with np.load(folder / "signatures.npz") as stored:
            self.of = dict(zip(stored["ids"].tolist(), stored["signatures"], strict=True))

    def __call__(self, *placed: tuple[str, int, int, int]) -> Image.Image:
        """Things by id, each with its left and upper edge and its side, on 128 x 128 pixels."""
        canvas = Image.new("RGB", (128, 128), "white")
        for name, left, top, side in placed:
            one = Image.fromarray(self.of[name]).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(one, (left, top))
        return canvas


APPLE, CAT, DOG = "1f34e", "1f431", "1f436"


@pytest.mark.parametrize(
    ("placed", "said", "not_said"),
    [
        ([("red-heart", 16, 16, 96)],
         ["red heart", "红心", "a heart", "一颗红色的心", "a picture of a red heart"],
         ["grapes", "blue heart", "two red hearts", "a small red heart", "a red heart on the left"]),
        ([("blue-star", 4, 44, 40)], ["a small blue star", "左边有一颗蓝色的星星", "a blue star on the left"],
         ["a blue star on the right", "a blue star at the top", "a big blue star"]),
        ([("blue-star", 4, 44, 38), ("blue-star", 45, 44, 38), ("blue-star", 86, 44, 38)],
         ["three blue stars", "三颗蓝色的星星", "3 blue stars"],
         ["two blue stars", "three red stars", "a blue star", "三只猫"]),
        ([(CAT, 4, 36, 56), (DOG, 68, 36, 56)],
         ["a cat and a dog", "一只狗和一只猫", "a dog next to a cat",
          "a cat on the left and a dog on the right", "左边是猫，右边是狗"],
         ["a cat", "a dog on the left and a cat on the right", "a cat above a dog", "a cat and a bird"]),
        ([(CAT, 36, 4, 56), (DOG, 36, 68, 56)], ["a cat above a dog", "一只狗在一只猫下面"],
         ["a dog above a cat", "a cat below a dog", "上面是一只狗，下面是一只猫"]),
        ([(APPLE, 16, 16, 96)], ["apple", "a red apple", "红色的苹果", "an apple", "一个苹果"],
         ["a green apple", "two apples", "一个苹果在下面"]),
        ([], [], ["a ghost", "a snowman", "一朵云"]),
    ],
)  # fmt: skip
def test_the_judge_knows_what_was_asked_for(judge, right, placed, said, not_said):
    picture = Looks(judge.parent)(*placed)
    assert [prompt for prompt in said if right(picture, prompt) is not True] == []
    assert [prompt for prompt in not_said if right(picture, prompt) is not False] == []


def test_the_judge_says_which_prompts_it_has_no_words_for(right):
    for prompt in ("a lighthouse in the sea", "four cats", "一只看不见的狗", ""):
        with pytest.warns(UserWarning, match=f"not in its vocabulary: {prompt}$"):
            assert right(Image.new("RGB", (128, 128)), prompt) is None
