"""The page helper itself, with stock nodes."""

from __future__ import annotations

import json

WORKFLOW = {
    "last_node_id": 3, "last_link_id": 2, "version": 0.4, "config": {}, "extra": {}, "groups": [],
    "links": [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "IMAGE"]],
    "nodes": [
        {"id": 1, "type": "EmptyImage", "pos": [100, 100], "size": [300, 140], "flags": {}, "order": 0,
         "mode": 0, "inputs": [], "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}],
         "properties": {}, "widgets_values": [16, 8, 1, 0xFF0000]},
        {"id": 2, "type": "ImageInvert", "pos": [450, 100], "size": [200, 60], "flags": {}, "order": 1,
         "mode": 0, "inputs": [{"name": "image", "type": "IMAGE", "link": 1}],
         "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [2]}], "properties": {}},
        {"id": 3, "type": "PreviewImage", "pos": [700, 100], "size": [250, 250], "flags": {}, "order": 2,
         "mode": 0, "inputs": [{"name": "images", "type": "IMAGE", "link": 2}], "outputs": [],
         "properties": {}},
    ],
}  # fmt: skip


def test_load_convert_and_run(either_page):
    either_page.load(WORKFLOW)
    prompt = either_page.prompt()
    assert prompt["1"]["inputs"] == {"width": 16, "height": 8, "batch_size": 1, "color": 0xFF0000}
    assert prompt["3"]["inputs"]["images"] == ["2", 0]
    (image,) = either_page.server.images(either_page.queue().check())
    assert image.size == (16, 8) and image.getpixel((0, 0)) == (0, 255, 255)
    vue = either_page.page.locator("[data-node-id]").count()
    assert vue == (3 if either_page.nodes2 else 0)
    either_page.fit()
    assert either_page.screenshot("helper").stat().st_size > 10_000


def test_widgets_can_be_set(page):
    page.load(WORKFLOW)
    page.set_widget("EmptyImage", "color", 0x0000FF)
    assert page.widgets("EmptyImage")["color"] == 0x0000FF
    (image,) = page.server.images(page.queue().check())
    assert image.getpixel((0, 0)) == (255, 255, 0)


def test_a_dropped_file_opens(page, tmp_path):
    path = tmp_path / "dropped.json"
    path.write_text(json.dumps(WORKFLOW))
    page.drop(path, nodes=3)
    assert page.prompt()["2"]["class_type"] == "ImageInvert"


def test_a_refused_graph_says_so(page):
    broken = json.loads(json.dumps(WORKFLOW))
    broken["nodes"][2]["inputs"][0]["link"] = None
    broken["nodes"][1]["outputs"][0]["links"] = []
    broken["links"] = broken["links"][:1]
    page.load(broken)
    result = page.queue()
    assert not result.ok and "3" in result.error.node_errors
