"""The shipped workflows as files; that they run is tested in tests/host, and in the page in tests/browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from lay_out_workflows import LAYOUTS, ROOM, ROOM_OTHERS, laid_out
from PIL import Image
from workflow_files import (
    API,
    MUTED,
    PAGE_ONLY,
    WORKFLOWS,
    api,
    backward,
    box,
    extent,
    linked,
    overlaps,
    read,
)

from hydit_core.pictures.workflow import CORE, PACK

NAMES = {
    "hydit_text_to_image_embedded", "hydit_text_to_image_v1.2", "hydit_split_files", "hydit_image_to_image",
    "hydit_inpaint", "hydit_two_prompts", "hydit_custom_sampling", "hydit_controlnet_canny_embedded",
    "hydit_controlnet_image_to_image", "hydit_controlnet_layer_weights", "hydit_controlnet_v1.2",
    "hydit_two_controlnets", "hydit_lora_strengths", "hydit_lora_merge", "hydit_fast", "hydit_turbo",
    "hydit_inpaint_controlnet", "hydit_tile_upscale", "hydit_image_prompt",
    "hydit_image_prompt_v1.2", "hydit_train_lora",
}  # fmt: skip
NOTES = ("MarkdownNote", "Note")
# ComfyUI's folders that it offers downloads for, and one that it only knows with packs for IP-Adapters.
FOLDERS = (
    "checkpoints", "clip_vision", "controlnet", "diffusion_models", "ipadapter", "vae", "text_encoders",
)  # fmt: skip
SUFFIXES = (".safetensors", ".pt")


def test_each_has_a_thumbnail_and_an_api_copy():
    assert {path.stem for path in WORKFLOWS} == NAMES == {path.stem for path in API.glob("*.json")}
    for path in WORKFLOWS:
        with Image.open(path.with_suffix(".jpg")) as thumbnail:
            assert thumbnail.size == (384, 384)
            assert thumbnail.convert("L").getextrema() != (255, 255)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_api_copy_says_the_same(path):
    """Independent of the page: links from both ends, widgets in the order of the node's schema."""
    workflow, copy = read(path), api(path.stem)
    left_out = {str(n["id"]) for n in workflow["nodes"] if n["type"] in NOTES or n["mode"] == MUTED}
    graph = linked(workflow)
    assert graph.keys() - left_out == copy.keys()
    for number, node in copy.items():
        links = {name: value for name, value in node["inputs"].items() if isinstance(value, list)}
        assert graph[number] == {"class_type": node["class_type"], "inputs": links}
        (shown,) = (n for n in workflow["nodes"] if str(n["id"]) == number)
        # A widget that is linked keeps a value of its own, which is not sent.
        linked_widgets = {socket["widget"]["name"] for socket in shown["inputs"] if "widget" in socket}
        wanted = [v for k, v in node["inputs"].items() if k in linked_widgets or not isinstance(v, list)]
        values = [value for value in shown["widgets_values"] if value not in PAGE_ONLY]
        assert [b if isinstance(a, list) else a for a, b in zip(wanted, values, strict=True)] == values


def test_muted_nodes_are_of_kinds_that_others_show():
    """So that tests/host can run them by the names of the others' widgets."""
    for path in WORKFLOWS:
        nodes = read(path)["nodes"]
        shown = {node["type"] for node in nodes if node["mode"] != MUTED}
        muted = {node["type"] for node in nodes if node["mode"] == MUTED}
        assert muted <= shown and bool(muted) == (path.stem == "hydit_controlnet_v1.2")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_what_a_shared_workflow_carries(path):
    workflow = read(path)
    notes = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    texts = [note["widgets_values"][0] for note in notes]
    assert [any("一" <= c <= "鿿" for c in text.split("\n")[0]) for text in texts] == [False, True]
    for node in workflow["nodes"]:
        if node in notes:
            continue
        wanted = PACK if node["type"].startswith("HyDiT") else CORE
        assert wanted.items() <= node["properties"].items()
        for model in node["properties"].get("models", []):
            # By its name among the values the page knows that it is asked for; it fetches nothing else.
            assert model["name"] in node["widgets_values"] and model["directory"] in FOLDERS
            assert model["url"].startswith("https://huggingface.co/") and "/resolve/main/" in model["url"]
            suffixes = {Path(model[name]).suffix for name in ("name", "url")}
            assert len(suffixes) == 1 and suffixes <= set(SUFFIXES)
    names = [value for node in workflow["nodes"] for value in node.get("widgets_values", [])]
    files = {name for name in names if isinstance(name, str) and name.endswith(SUFFIXES)}
    assert files == {m["name"] for n in workflow["nodes"] for m in n["properties"].get("models", [])}
    if files:  # nobody can draw its thumbnail here
        assert all("128 x 128" in text for text in texts)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_it_reads_from_left_to_right(path):
    workflow = read(path)
    assert overlaps(workflow, title=30) == []
    assert backward(workflow) == []
    grouped = 0
    for group in workflow["groups"]:
        left, top, width, height = group["bounding"]
        assert " · " in group["title"]
        for node in workflow["nodes"]:
            x, y, right, bottom = box(node)
            inside = left <= x and right <= left + width and top <= y and bottom <= top + height
            outside = x >= left + width or right <= left or y >= top + height or bottom <= top
            assert inside or outside, (group["title"], node["type"])
            grouped += inside
    assert grouped == len(workflow["nodes"]) - 2  # the notes


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_it_opens_large_enough_to_be_read(path):
    """The page fits it into three quarters of the window, and leaves texts out below a scale of 0.58."""
    width, height = extent(read(path))
    room = ROOM.get(path.stem, ROOM_OTHERS)
    assert width <= room[0] and height <= room[1]
    assert "ds" not in read(path)["extra"]  # some versions would take it for the view to open with


def test_places_are_those_of_the_script():
    assert set(LAYOUTS) == NAMES
    for path in WORKFLOWS:
        assert laid_out(path.stem, read(path)) == read(path), "run tests/lay_out_workflows.py"


def test_results_of_the_small_model_are_shown_large():
    """Beside the file as it was decoded: the enlarged picture is only looked at."""
    for path in WORKFLOWS:
        prompt = api(path.stem)
        saved = [n["inputs"]["images"] for n in prompt.values() if n["class_type"] == "SaveImage"]
        larger = {k: n["inputs"]["image"] for k, n in prompt.items() if n["class_type"] == "ImageScaleBy"}
        previews = [n["inputs"]["images"] for n in prompt.values() if n["class_type"] == "PreviewImage"]
        small = any(str(value).startswith("[embedded]") for value in prompt["3"]["inputs"].values())
        assert list(larger.values()) == (saved if small else [])
        assert all([number, 0] in previews for number in larger)
