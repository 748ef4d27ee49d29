"""The blueprints, and what the page makes of them when they are run."""

from __future__ import annotations

from typing import Any

from workflow_files import ROOT

BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
#: What links from and to the edges of a subgraph have for a node.
INTO, OUT_OF = -10, -20
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def definition(blueprint: dict[str, Any]) -> dict[str, Any]:
    (found,) = blueprint["definitions"]["subgraphs"]
    return found


def flat(blueprint: dict[str, Any], info: dict[str, Any], **given: Any) -> tuple[dict[str, Any], list[Any]]:
    """A blueprint as a prompt, and the link to its picture.

    `info` is ComfyUI's /object_info, by which widgets have their names; `given` are inputs of the blueprint:
    links or values.
    """
    inner = definition(blueprint)
    links = {link["id"]: link for link in inner["links"]}
    prompt = {}
    for node in inner["nodes"]:
        inputs = _values(node, info[node["type"]]["input"])
        for socket in node["inputs"]:
            link = links.get(socket["link"])
            if link is None:
                continue
            name = inner["inputs"][link["origin_slot"]]["name"] if link["origin_id"] == INTO else ""
            if not name:
                inputs[socket["name"]] = [str(link["origin_id"]), link["origin_slot"]]
            elif name in given:
                inputs[socket["name"]] = given[name]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    (out_of,) = (link for link in inner["links"] if link["target_id"] == OUT_OF)
    return prompt, [str(out_of["origin_id"]), out_of["origin_slot"]]


def _values(node: dict[str, Any], types: dict[str, Any]) -> dict[str, Any]:
    """A node's widgets by name."""
    values = iter(node.get("widgets_values", []))
    found = {}
    for name, (kind, *options) in (types.get("required", {}) | types.get("optional", {})).items():
        if not (isinstance(kind, list) or kind in WIDGETS) or (options and options[0].get("forceInput")):
            continue
        found[name] = next(values)
        if options and options[0].get("control_after_generate"):
            next(values)
    assert not list(values)
    return found
