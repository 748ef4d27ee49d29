"""The blueprints as files; tests/host has ComfyUI list and run them, tests/browser its page."""

from __future__ import annotations

import json
import re

import pytest
from blueprint_files import BLUEPRINTS, INTO, OUT_OF, definition
from workflow_files import overlaps, read
from write_blueprints import BLUEPRINTS as DESCRIBED
from write_blueprints import MORE, text

from hydit_core.pictures.workflow import CORE, PACK
from tests.unit.test_locales import CHINESE, ROOT, Slot, read_schemas

EACH = pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem.split(" (")[0])
#: Nodes of ComfyUI's own with widgets: how many values each keeps.
WIDGETS = {"ImageScale": 4, "ImageToMask": 1, "Canny": 2, "ImageCompositeMasked": 3}


@pytest.fixture(scope="module")
def schemas() -> dict[str, dict[str, Slot]]:
    return {name: {slot.id: slot for slot in schema.inputs} for name, schema in read_schemas().items()}


def test_files_are_those_of_the_script():
    described = {f"{blueprint.name}.json": blueprint for blueprint in (make() for make in DESCRIBED)}
    assert sorted(described) == [path.name for path in BLUEPRINTS] and len(described) == 5
    for path in BLUEPRINTS:
        assert path.read_text("utf-8") == text(described[path.name]), "run tests/write_blueprints.py"


@EACH
def test_it_is_named_and_described_in_both_languages(path):
    english, chinese = path.stem.split(" · ")
    assert re.fullmatch(r"[A-Za-z ]+ \(HunyuanDiT\)", english) and CHINESE.search(chinese)
    assert not set(path.name) & set('<>:"/\\|?*')  # Windows has no such files
    inner = definition(read(path))
    assert inner["name"] == path.stem and inner["category"] == "HunyuanDiT"
    english, chinese = inner["description"].split("\n\n")
    assert not CHINESE.search(english) and CHINESE.search(chinese)
    assert {"hydit", "混元"} <= set(read(path)["extra"]["BlueprintSearchAliases"])
    for slot in inner["inputs"]:
        name, _, translated = slot["label"].partition(" · ")
        assert CHINESE.search(translated) or name in ("cfg", "LoRA", "ControlNet")


@EACH
def test_every_link_has_two_ends_of_its_type(path):
    inner = definition(read(path))
    nodes = {node["id"]: node for node in inner["nodes"]}
    assert len(nodes) == len(inner["nodes"])
    for link in inner["links"]:
        origin, target = link["origin_id"], link["target_id"]
        if origin == INTO:
            source = inner["inputs"][link["origin_slot"]]
            assert link["id"] in source["linkIds"]
        else:
            source = nodes[origin]["outputs"][link["origin_slot"]]
            assert link["id"] in source["links"]
        if target == OUT_OF:
            into = inner["outputs"][link["target_slot"]]
            assert into["linkIds"] == [link["id"]]
        else:
            into = nodes[target]["inputs"][link["target_slot"]]
            assert into["link"] == link["id"]
        assert source["type"] == into["type"] == link["type"]
    numbers = [link["id"] for link in inner["links"]]
    assert sorted(numbers) == list(range(1, inner["state"]["lastLinkId"] + 1))
    linked = [socket["link"] for node in nodes.values() for socket in node["inputs"]]
    assert {number for number in linked if number} <= set(numbers)


@EACH
def test_nodes_and_widgets_are_those_of_the_schemas(path, schemas):
    for node in definition(read(path))["nodes"]:
        kind = node["type"]
        wanted = PACK if kind.startswith("HyDiT") else CORE
        assert wanted.items() <= node["properties"].items() and kind in MORE
        widgets = [socket["widget"]["name"] for socket in node["inputs"] if "widget" in socket]
        if kind not in schemas:
            assert not kind.startswith("HyDiT")
            assert len(node["widgets_values"]) == WIDGETS.get(kind, 0)
            continue
        slots = schemas[kind]
        links = [socket["name"] for socket in node["inputs"] if "widget" not in socket]
        assert set(links) | set(widgets) <= slots.keys()
        written = sum(1 + slot.generated for name, slot in slots.items() if name not in links)
        assert len(node["widgets_values"]) == written, kind


@EACH
def test_the_node_outside_offers_what_is_asked_for_inside(path):
    workflow = read(path)
    inner, (shown,) = definition(workflow), workflow["nodes"]
    assert shown["type"] == inner["id"] and shown["id"] > max(node["id"] for node in inner["nodes"])
    outside = [(slot["name"], slot["type"], slot["label"]) for slot in shown["inputs"]]
    assert outside == [(slot["name"], slot["type"], slot["label"]) for slot in inner["inputs"]]
    assert [slot["type"] for slot in shown["outputs"]] == ["IMAGE"]
    names = [slot["name"] for slot in shown["inputs"]]
    assert len(set(names)) == len(names) and {"prompt", "negative_prompt", "ckpt_name", "seed"} <= set(names)
    pictures = {slot["name"] for slot in shown["inputs"] if "widget" not in slot}
    assert pictures == {
        "Text": set(), "LoRA": set(), "Image": {"image"}, "ControlNet": {"image"},
        "Inpaint": {"image", "mask"},
    }[path.stem.split()[0]]  # fmt: skip
    nodes = {str(node["id"]): node for node in inner["nodes"]}
    for number, name in shown["properties"]["proxyWidgets"][:-1]:
        assert name in {socket["name"] for socket in nodes[number]["inputs"] if "widget" in socket}
    number, name = shown["properties"]["proxyWidgets"][-1]
    assert nodes[number]["type"] == "HyDiTKSampler" and name == "control_after_generate"


@EACH
def test_nothing_inside_lies_over_another_node(path):
    inner = definition(read(path))
    assert overlaps(inner, title=30) == []
    left, _, width, _ = inner["inputNode"]["bounding"]
    assert left + width < min(node["pos"][0] for node in inner["nodes"])
    right = max(node["pos"][0] + node["size"][0] for node in inner["nodes"])
    assert right < inner["outputNode"]["bounding"][0]


def test_all_have_identities_of_their_own():
    found = []
    for path in BLUEPRINTS:
        inner = definition(read(path))
        found += [inner["id"], *(slot["id"] for slot in inner["inputs"] + inner["outputs"])]
    assert len(set(found)) == len(found)
    assert all(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", one) for one in found)


def test_the_small_models_files_are_there():
    """What a blueprint asks for at first comes with the pack."""
    named = set(re.findall(r"\[embedded\] ([\w.-]+)", json.dumps([read(path) for path in BLUEPRINTS])))
    shipped = {path.stem for path in (ROOT / "hydit_core" / "assets").rglob("*.safetensors")}
    assert named and named <= shipped
