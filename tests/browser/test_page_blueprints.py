"""The blueprints in ComfyUI's own page: what it shows of them, and what it makes of them to run."""

from __future__ import annotations

from typing import Any

import pytest
from blueprint_files import BLUEPRINTS, definition, flat
from workflow_files import read, without_titles


def renumbered(prompt: dict[str, Any]) -> dict[str, Any]:
    """A prompt by the numbers inside the subgraph: the page puts the number of the node around before."""

    def inside(value: Any) -> Any:
        return [value[0].split(":")[-1], value[1]] if isinstance(value, list) else value

    return {
        number.split(":")[-1]: {
            "class_type": node["class_type"],
            "inputs": {name: inside(value) for name, value in node["inputs"].items()},
        }
        for number, node in without_titles(prompt).items()
    }


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem.split(" (")[0])
def test_it_is_a_node_with_what_is_asked_for(either_page, path):
    page, blueprint = either_page, read(path)
    if page.server.version.startswith("0.3."):
        pytest.skip("this ComfyUI has no blueprints of packs")
    page.load(blueprint)
    page.fit()
    asked = [(slot["name"], slot["label"]) for slot in definition(blueprint)["inputs"] if not is_link(slot)]
    shown = page.evaluate("() => app.graph.nodes[0].widgets.map((w) => [w.name, w.label])")
    assert [tuple(pair) for pair in shown if pair[0] != "control_after_generate"] == asked
    page.screenshot(f"blueprint-{path.stem.split(' (')[0]}")
    info = page.server.object_info()
    assert renumbered(page.prompt()) == flat(blueprint, info)[0]

    # What is changed on it arrives at every node inside that asks for it.
    changed = {"prompt": "a green car", "seed": 7, "width": 160, "height": 96, "steps": 3}
    for name, value in changed.items():
        page.evaluate(
            """([name, value]) => {
              const node = app.graph.nodes[0], widget = node.widgets.find((w) => w.name === name);
              widget.value = value;
              widget.callback?.(value, app.canvas, node);
            }""",
            [name, value],
        )
    assert renumbered(page.prompt()) == flat(blueprint, info, **changed)[0]


def is_link(slot: dict[str, Any]) -> bool:
    return slot["type"] in ("IMAGE", "MASK")
