"""The bars of HyDiTLayerWeights in a page, and what is done with them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hydit_core.layer_weights import LayerWeights

NODE = "HyDiTLayerWeights"
LAYERS = 19
TOP = 2.0


def workflow(weights: str = "uniform(1)", layers: int = LAYERS, **more: Any) -> dict:
    """Weights -> PreviewAny."""
    out = [{"name": "LAYER_WEIGHTS", "type": "STRING", "links": [1]}]
    into = [{"name": "source", "type": "*", "link": 1}]
    same = {"properties": {}, "flags": {}, "mode": 0}
    return {
        "last_node_id": 2, "last_link_id": 1, "version": 0.4, "config": {}, "extra": {}, "groups": [],
        "links": [[1, 1, 0, 2, 0, "STRING"]],
        "nodes": [
            {"id": 1, "type": NODE, "pos": [0, 0], "size": [380, 310], "order": 0, "inputs": [],
             "outputs": out, "widgets_values": [weights, layers], **same, **more},
            {"id": 2, "type": "PreviewAny", "pos": [480, 0], "size": [300, 200], "order": 1, "inputs": into,
             "outputs": [], **same},
        ],
    }  # fmt: skip


def typed(page: Any, text: str, layers: int | None = None) -> None:
    page.set_widget(NODE, "weights", text)
    if layers is not None:
        page.set_widget(NODE, "layers", layers)
    page.settle()


def text(page: Any) -> str:
    return page.widgets(NODE)["weights"]


def written(page: Any) -> list[float]:
    return [float(part) for part in text(page).split(", ")]


def drawn(page: Any, which: int = 0) -> list[float]:
    """The bars' numbers, and that they are as high."""
    bars = page.page.locator(".hydit-bars").nth(which).get_by_role("slider")
    found = bars.evaluate_all(
        """(bars) => bars.map((bar) =>
          [Number(bar.ariaValueNow), parseFloat(bar.firstElementChild.style.height)])"""
    )
    for number, height in found:
        assert height == pytest.approx(min(max(number, 0), TOP) * 100 / TOP, abs=0.01)
    return [number for number, _ in found]


def said(page: Any) -> str:
    return page.page.locator(".hydit-weights-said").first.inner_text()


def bar(page: Any, layer: int) -> Any:
    return page.page.get_by_role("slider", name=f"Layer {layer}", exact=True).first


def point(page: Any, layer: float, weight: float, which: int = 0) -> tuple[float, float]:
    """Where on the page the middle of a bar (1 is the first) is as high as a weight."""
    box = page.page.locator(".hydit-bars-plot").nth(which).bounding_box()
    count = page.page.locator(".hydit-bars").nth(which).get_by_role("slider").count()
    return (
        box["x"] + box["width"] * (layer - 0.5) / count,
        box["y"] + box["height"] * (1 - weight / TOP),
    )


def drag(page: Any, *points: tuple[float, float], drop: bool = True, steps: int = 4) -> None:
    """With the mouse, over (layer, weight)s."""
    mouse = page.page.mouse
    mouse.move(*point(page, *points[0]))
    mouse.down()
    for at in points[1:]:
        mouse.move(*point(page, *at), steps=steps)
    if drop:
        mouse.up()


def undo(page: Any, keys: str = "Control+z") -> None:
    page.press(keys)
    page.page.mouse.move(*point(page, 1, 1))  # the page places its HTML when it draws


def received(page: Any) -> list[float]:
    """What Python has."""
    (said,) = page.queue().check().outputs["2"]["text"]
    return LayerWeights.parse(json.loads(said) if said.startswith('"') else said).resolve(
        page.widgets(NODE)["layers"]
    )


def shows_rows(page: Any) -> None:
    if page.nodes2 and page.server.version.startswith("0.3."):
        pytest.skip("Nodes 2.0 of this frontend, an experiment, shows no widgets of HTML")
