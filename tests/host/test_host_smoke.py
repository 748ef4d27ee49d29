"""How the pack enters a ComfyUI: from any folder, cheaply, completely described."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from comfy_server import ComfyServer, install_pack, server_environment
from find_host import ROOT, find_host

IDS = [
    "HyDiTCheckpointLoader", "HyDiTDiTLoader", "HyDiTTextEncoderLoader", "HyDiTTextEncode",
    "HyDiTEmptyLatent", "HyDiTKSampler", "HyDiTSampler", "HyDiTScheduler", "HyDiTForecast", "HyDiTModelSave",
]  # fmt: skip
# Folder names, and whether the pack is copied into them. The first load is the one that is timed.
FOLDERS = [
    ("hydit", False),
    ("ComfyUI-HunyuanDiT", True),
    ("a.b v1.2 (new)", False),
    ("hydit-0.1.0", True),
    ("混元 DiT", True),
    ("1st", False),
]


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> list[dict]:
    """What loading the pack did, for each of FOLDERS, in one ComfyUI of its own."""
    base = tmp_path_factory.mktemp("base").resolve()
    custom = base / "custom_nodes"
    custom.mkdir()
    for name, copy in FOLDERS:
        install_pack(custom / name, copy=copy)
    script = Path(__file__).with_name("import_probe.py")
    done = subprocess.run(
        [sys.executable, script, find_host(), base, *(custom / name for name, _ in FOLDERS)],
        capture_output=True, encoding="utf-8", timeout=300,
        env={**server_environment(), "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    told = re.search("^PROBE (.*)$", done.stdout, re.M)
    assert told, done.stderr[-3000:]
    shutil.rmtree(base)
    results = json.loads(told[1])
    for result in results:
        result["log"] = done.stderr[-3000:]
    return results


@pytest.mark.parametrize(("name", "copy"), FOLDERS)
def test_loads_from_a_folder_of_any_name(probe, name, copy):
    result = probe[FOLDERS.index((name, copy))]
    assert result["loaded"], result["log"]
    assert set(IDS) <= set(result["nodes"])
    assert result["web"] and result["web"].endswith("web")


def test_importing_is_cheap(probe, capsys):
    first = probe[0]
    with capsys.disabled():
        print(f"\nimporting the pack: {first['seconds']:.2f} s; then {probe[2]['seconds']:.2f} s")
    assert first["asked"] > 10  # the pack's own modules, at least: the recorder sees its imports
    assert first["heavy"] == {}
    assert first["seconds"] < 5


def test_importing_touches_no_network_and_no_path(probe):
    assert [result["network"] for result in probe] == [[]] * len(probe)
    assert all(result["path_kept"] for result in probe)


def test_importing_brings_no_top_level_module_of_ours(probe):
    assert not [name for name in probe[0]["modules"] if name.split(".")[0] in ("hydit_core", "hydit", "web")]


def test_outside_comfyui_the_message_says_what_to_do(tmp_path):
    code = (
        "import importlib.util as u\n"
        f"spec = u.spec_from_file_location('pack', {str(ROOT / '__init__.py')!r},"
        f" submodule_search_locations=[{str(ROOT)!r}])\n"
        "spec.loader.exec_module(u.module_from_spec(spec))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=server_environment()
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ImportError: ")
    assert "ComfyUI/custom_nodes" in last and "hydit_core" in last


def test_only_v3_nodes_are_offered(host, probe):
    assert not hasattr(host.pack, "NODE_CLASS_MAPPINGS") and not probe[0]["mappings"]
    ours = host.module("nodes").NODES
    assert sorted(node.GET_SCHEMA().node_id for node in ours) == sorted(set(IDS) | set(_ids(host)))
    for node_id in IDS:
        assert host.nodes.NODE_CLASS_MAPPINGS[node_id].__module__.startswith(host.pack.__name__)


def test_every_input_is_explained(host):
    bare = []
    for node_id in _ids(host):
        node = host.nodes.NODE_CLASS_MAPPINGS[node_id]
        schema = node.GET_SCHEMA()
        assert schema.display_name and schema.description and schema.category.startswith("HunyuanDiT/")
        assert len({*(i.id for i in schema.inputs), *(o.id for o in schema.outputs)}) == len(
            schema.inputs + schema.outputs
        )
        bare += [f"{node_id}.{i.id}" for i in schema.inputs if not i.tooltip]
    assert not bare


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_node_has_a_help_page(host, language):
    for node_id in _ids(host):
        page = ROOT / "web" / "docs" / node_id / f"{language}.md"
        assert page.is_file(), page
        text = page.read_text(encoding="utf-8")
        assert len(text) > 200 and text.lstrip().startswith("#")
        assert language == "en" or re.search("[一-鿿]", text)
        inputs = [i.id for i in host.nodes.NODE_CLASS_MAPPINGS[node_id].GET_SCHEMA().inputs]
        assert [name for name in inputs if name not in text] == [], page
        for link in re.findall(r"!\[[^]]*\]\(([^)\s]+)", text):
            # The page looks for pictures beside the nodes' folders, not in them.
            assert (ROOT / "web" / "docs" / link).is_file(), (page, link)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_node_is_translated(host, language):
    """What the page shows must be in locales; the English one must be what the schema says."""
    entries = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(entries) == set(_ids(host))
    for node_id, entry in entries.items():
        schema = host.nodes.NODE_CLASS_MAPPINGS[node_id].GET_SCHEMA()
        texts = [entry["display_name"], entry["description"]]
        # The page adds that one itself, below a seed.
        told_inputs = set(entry["inputs"]) - {"control_after_generate"}
        assert told_inputs == {i.id for i in schema.inputs}, node_id
        assert set(entry.get("outputs", {})) == {str(i) for i in range(len(schema.outputs))}, node_id
        for item in schema.inputs:
            told = entry["inputs"][item.id]
            assert told["name"], (node_id, item.id)
            texts.append(told["tooltip"])
            if language == "en":
                assert told["tooltip"] == item.tooltip, (node_id, item.id)
        if language == "zh":
            untranslated = [text for text in texts if not re.search("[一-鿿]", text)]
            assert not untranslated, (node_id, untranslated)
        else:
            assert texts[:2] == [schema.display_name, schema.description], node_id


def test_a_copied_pack_serves_its_page_files():
    """A real ComfyUI with a copy in a folder of the repository's usual name.

    Not one with a space or Chinese: ComfyUI serves no pack's page files from such a folder (its nodes work).
    """
    name = "ComfyUI-HunyuanDiT"
    server = ComfyServer(name="server-copy", pack=name, copy=True)
    try:
        info = server.object_info()
        assert set(IDS) <= set(info)
        assert {info[node_id]["python_module"] for node_id in IDS} == {f"custom_nodes.{name}"}
        scripts = [path for path in server.get("/extensions") if f"/{name}/" in path]
        assert scripts
        for path in [*scripts, f"/extensions/{name}/docs/{IDS[0]}/en.md"]:
            answer = requests.get(server.url + path, timeout=30)
            assert answer.status_code == 200 and answer.content, path
        translated = server.get("/i18n")
        assert set(IDS) <= set(translated["zh"]["nodeDefs"])
        log = server.log()
        assert "IMPORT FAILED" not in log and "Traceback" not in log
    finally:
        server.close()
    assert not os.path.exists(server.base)


def _ids(host) -> list[str]:
    return [node.GET_SCHEMA().node_id for node in host.module("nodes").NODES]
