"""The shipped workflows and `generate`'s pictures, opened, converted and run by ComfyUI's own page."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image, ImageDraw
from workflow_files import (
    MODEL_FOLDERS,
    WORKFLOWS,
    api,
    check_pictures,
    overlapping,
    read,
    shrink,
    without_titles,
    write_models,
)

from hydit_core.embedded import embedded_controlnets
from hydit_core.generate.__main__ import main

NAMES = [path.stem for path in WORKFLOWS]


@pytest.fixture(scope="module")
def models(server: Any) -> Any:
    write_models(server.models_dir)
    yield server.models_dir
    for kind in MODEL_FOLDERS:  # ComfyUI remembers the folders and checks no graph without one
        shutil.rmtree(server.models_dir / kind)
        (server.models_dir / kind).mkdir(parents=True)


def pictures(page: Any, result: Any) -> list[Image.Image]:
    """What SaveImage and PreviewImage wrote, by node number."""
    named = [
        image
        for number in sorted(result.outputs, key=int)
        if "hydit_train" not in result.outputs[number]  # what a node shows of a data set
        for image in result.outputs[number].get("images", [])
    ]
    return [Image.open(io.BytesIO(page.server.view(image))).convert("RGB") for image in named]


def test_the_template_browser_has_them(server):
    """By our own address for them: left to itself, ComfyUI would serve `examples/` there."""
    assert sorted(server.get("/workflow_templates")["hydit"]) == NAMES
    for name in NAMES:
        for suffix, kind in ((".json", "application/json"), (".jpg", "image/jpeg")):
            answer = requests.get(f"{server.url}/api/workflow_templates/hydit/{name}{suffix}", timeout=60)
            assert answer.ok and answer.headers["Content-Type"].startswith(kind)


@pytest.mark.parametrize("name", ["hydit_text_to_image_v1.2", "hydit_split_files"])
def test_missing_files_are_offered_for_download(page, name):
    """Before the tests below put them there."""
    path = next(path for path in WORKFLOWS if path.stem == name)
    page.load(path)
    page.page.wait_for_timeout(1500)
    details = page.page.get_by_text("View details", exact=True)
    if details.count():  # newer pages say first that something is missing
        details.first.click()
        page.page.wait_for_timeout(500)
    lines = page.evaluate("() => document.body.innerText").split("\n")
    page.screenshot(f"missing-{name}")
    models = [model for node in read(path)["nodes"] for model in node["properties"].get("models", [])]
    assert models and {model["name"] for model in models} <= {line.split(" / ")[-1] for line in lines}
    assert sum(line.startswith("Download") for line in lines) >= len(models)


def test_the_template_browser_opens_them_large_enough_to_be_read(either_page, models):
    """By the page's own fit, in a window of 1600 x 1000: below 0.58 the classic page draws no texts."""
    page = either_page
    if page.nodes2 and not page.offers_nodes2():
        pytest.skip("this page hides its Nodes 2.0")
    page.evaluate("async () => { await app.refreshComboInNodes() }")
    scales = {}
    for path in WORKFLOWS:
        scales[path.stem] = page.open_template(path.stem, len(read(path)["nodes"]))
        page.screenshot(f"opened-{path.stem}")
        assert overlapping(page.boxes()) == []
    assert scales.pop("hydit_text_to_image_embedded") >= 0.7
    assert min(scales.values()) >= 0.6, scales


@pytest.mark.parametrize("name", NAMES)
def test_every_workflow_opens_converts_and_runs(either_page, models, name):
    page = either_page
    page.evaluate("async () => { await app.refreshComboInNodes() }")
    page.load(next(path for path in WORKFLOWS if path.stem == name))
    page.close_dialogs()
    assert without_titles(page.prompt()) == api(name)
    small = shrink(api(name))  # the files that stand for the published ones are
    for number, node in api(name).items():
        for widget, value in node["inputs"].items():
            if small[number]["inputs"][widget] != value:
                page.set_widget(number, widget, small[number]["inputs"][widget])
    result = page.queue().check()
    check_pictures(name, pictures(page, result))
    page.page.wait_for_timeout(1000)
    page.fit()
    page.screenshot(f"workflow-{name}")
    if not page.nodes2 or page.offers_nodes2():
        # As the page has it: what it found too small has grown.
        assert overlapping(page.boxes()) == []
    assert page.errors == []


def drawn_again(page: Any, path: Path, nodes: int) -> None:
    """Drop the picture, check that the page makes its own `prompt` chunk of it, run it, compare."""
    with Image.open(path) as dropped:
        dropped.load()
    page.drop(path, nodes=nodes)
    page.close_dialogs()
    assert page.evaluate("() => app.canvas.ds.scale") >= 0.6  # the page's own fit: texts are drawn
    assert without_titles(page.prompt()) == json.loads(dropped.text["prompt"])
    (again,) = pictures(page, page.queue().check())
    assert again.size == dropped.size
    assert np.abs(np.asarray(again, int) - np.asarray(dropped, int)).max() <= 2
    if not page.nodes2 or page.offers_nodes2():
        assert overlapping(page.boxes()) == []
    page.screenshot(f"dropped-{path.stem}")


def test_a_picture_from_generate_is_dropped_and_drawn_again(either_page, tmp_path):
    """With a prompt that the page would choose from and cut, were it not protected."""
    path = tmp_path / "words.png"
    prompt = "绿色的汽车 {a|b} // \\{ c"
    options = ["--seed", "5", "--negative", "{x} /* y */", "--device", "cpu", "--out", str(path)]
    assert main(["--prompt", prompt, *options]) == 0
    drawn_again(either_page, path, nodes=7)
    texts = [n["inputs"]["text"] for n in either_page.prompt().values() if "text" in n["inputs"]]
    assert texts == [prompt, "{x} /* y */"]


def test_a_picture_from_a_picture_is_dropped_and_drawn_again(either_page, tmp_path):
    start = Image.radial_gradient("L").resize((200, 131)).convert("RGB")
    start.save(tmp_path / "start.png")
    shutil.copy(tmp_path / "start.png", either_page.server.input_dir)
    either_page.evaluate("async () => { await app.refreshComboInNodes() }")
    path = tmp_path / "changed.png"
    options = ["--init-image", str(tmp_path / "start.png"), "--strength", "0.5", "--size", "128x96"]
    assert main(["--prompt", "a red heart", *options, "--device", "cpu", "--out", str(path)]) == 0
    drawn_again(either_page, path, nodes=10)


def test_a_controlled_picture_is_dropped_and_drawn_again(either_page, tmp_path):
    (net,) = embedded_controlnets()
    circle = Image.new("RGB", (128, 128))
    ImageDraw.Draw(circle).ellipse((20, 20, 100, 100), outline="white")
    circle.save(tmp_path / "circle.png")
    path = tmp_path / "steered.png"
    options = ["--controlnet", f"{net}:1.5", "--control-image", str(tmp_path / "circle.png"), "--seed", "1"]
    more = ["--control-weights", "0.5, 1", "--control-end", "0.8", "--device", "cpu", "--out", str(path)]
    assert main(["--prompt", "a red apple", *options, *more]) == 0
    (written,) = tmp_path.glob("circle-control-*.png")
    shutil.copy(written, either_page.server.input_dir)
    either_page.evaluate("async () => { await app.refreshComboInNodes() }")
    drawn_again(either_page, path, nodes=10)
