"""Thumbnails of workflows: what stands for published files, and how pictures are put together."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image
from thumbnails import EXAMPLES, NEGATIVE, SIZE, WITHOUT_INSETS, WORDS, compose, given, is_published, stand_in
from workflow_files import ROOT, WORKFLOWS, api

from hydit_core.embedded import embedded_model
from hydit_core.text.loading import load_tokenizers
from hydit_core.weights.bundle import bundle

NAMES = [path.stem for path in WORKFLOWS]
PUBLISHED = [name for name in NAMES if is_published(api(name))]


def colored(color: str, size: tuple[int, int] = (128, 128)) -> Image.Image:
    return Image.new("RGB", size, color)


def small(text: str = "a cat", **others: dict) -> dict:
    """A workflow that saves one picture, 4, with nodes that are shown before it."""
    return {
        "1": {"class_type": "HyDiTTextEncode", "inputs": {"text": text}},
        "7": {"class_type": "HyDiTKSampler", "inputs": {}},
        **others,
        "8": {"class_type": "SaveImage", "inputs": {"images": ["7", 0]}},
    }


def test_published_ones_are_those_that_docs_mark():
    docs = (ROOT / "docs" / "nodes.md").read_text(encoding="utf-8")
    marked = re.findall(r"^\|.*\*(hydit_\S+)\*.*[¹²] \|$", docs, re.MULTILINE)
    assert sorted(PUBLISHED) == sorted(marked) != []


@pytest.mark.parametrize("name", NAMES)
def test_only_embedded_files_are_left(name):
    prompt = stand_in(api(name))
    values = [value for node in prompt.values() for value in node["inputs"].values()]
    assert not [v for v in values if isinstance(v, str) and v.endswith((".safetensors", ".pt"))]
    sizes = {n["inputs"]["width"] for n in prompt.values() if n["class_type"] == "HyDiTEmptyLatent"}
    assert sizes == {128}
    loads = any(node["class_type"] == "LoadImage" for node in prompt.values())
    assert loads == (name in EXAMPLES)
    # Every link leads to an output that the node has: MODEL, CLIP, VAE of what loads a checkpoint.
    for value in values:
        if isinstance(value, list) and prompt[value[0]]["class_type"] == "HyDiTCheckpointLoader":
            assert 0 <= value[1] <= 2
    if name not in PUBLISHED:
        assert prompt == api(name)


def test_parts_from_separate_files_become_outputs_of_one():
    prompt = stand_in(api("hydit_split_files"))
    sampler = next(node["inputs"] for node in prompt.values() if node["class_type"] == "HyDiTKSampler")
    encode = prompt[sampler["positive"][0]]["inputs"]
    decode = next(node["inputs"] for node in prompt.values() if node["class_type"] == "VAEDecode")
    assert (sampler["model"][1], encode["clip"][1], decode["vae"][1]) == (0, 1, 2)


def test_the_embedded_model_knows_every_word_that_thumbnails_ask_for():
    tokenizers = load_tokenizers(bundle(embedded_model(), only=("bert", "t5")), text_len=24, t5_len=32)
    prompts = {text for text, _ in EXAMPLES.values()} | set(WORDS.values())
    for name in NAMES:
        nodes = [node["inputs"] for node in stand_in(api(name)).values() if "text" in node["inputs"]]
        prompts |= {inputs[key] for inputs in nodes for key in ("text", "text_mt5")} - {""}
    assert NEGATIVE not in prompts
    unknown = {
        prompt for prompt in prompts if prompt and any(one.unknown for one in tokenizers(prompt).reports[0])
    }
    assert unknown <= {"a blue hexagon"}  # which is what is trained


def test_one_picture_fills_it():
    pixels = np.asarray(compose("any", small(), {"8": [colored("red")]}))
    assert pixels.shape == (SIZE, SIZE, 3)
    assert (pixels == (255, 0, 0)).all()


def test_four_in_a_strip_become_rows():
    strip = Image.new("RGB", (512, 128))
    for number, color in enumerate(("red", "lime", "blue", "yellow")):
        strip.paste(colored(color), (number * 128, 0))
    thumbnail = compose("any", small(), {"8": [strip]})
    points = [(90, 90), (290, 90), (90, 290), (290, 290)]
    assert [thumbnail.getpixel(point) for point in points] == [
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
    ]  # fmt: skip


def test_two_stand_side_by_side():
    prompt = small() | {"9": {"class_type": "SaveImage", "inputs": {"images": ["7", 0]}}}
    thumbnail = compose("any", prompt, {"8": [colored("red")], "9": [colored("blue")]})
    points = [(90, 192), (290, 192), (90, 40), (290, 340)]
    white = (255, 255, 255)
    assert [thumbnail.getpixel(point) for point in points] == [(255, 0, 0), (0, 0, 255), white, white]


STEERED = small(
    **{
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}},
        "3": {"class_type": "VAEDecode", "inputs": {}},
        "4": {"class_type": "ImageScale", "inputs": {"image": ["3", 0]}},
        "5": {"class_type": "HyDiTControlNetApply", "inputs": {"image": ["4", 0]}},
        "6": {"class_type": "PreviewImage", "inputs": {"images": ["9", 0]}},
        "7": {"class_type": "HyDiTKSampler", "inputs": {"positive": ["5", 0]}},
        "9": {"class_type": "VAEDecode", "inputs": {}},
    }
)


def test_what_steers_stands_in_the_whitest_corner():
    """Not what is shown beside it to compare with: the saved picture does not depend on that."""
    saved = colored("white")
    saved.paste("black", (0, 0, 128, 100))
    saved.paste("black", (0, 100, 90, 128))
    pictures = {"2": [colored("lime")], "6": [colored("red")], "8": [saved]}
    assert given(STEERED, pictures) == pictures["2"]
    thumbnail = compose("any", STEERED, pictures)
    assert thumbnail.getpixel((SIZE - 50, SIZE - 50)) == (0, 255, 0)
    assert thumbnail.getpixel((50, 50)) == (0, 0, 0)
    assert compose(WITHOUT_INSETS[0], STEERED, pictures).getpixel((SIZE - 50, SIZE - 50)) == (255, 255, 255)


def test_a_picture_of_the_users_own_is_shown_as_it_was_given():
    prompt = stand_in(api("hydit_image_prompt_v1.2"))
    (number,) = (n for n, node in prompt.items() if node["class_type"] == "LoadImage")
    example = colored("lime")
    assert given(prompt, {number: [example]}) == [example]
