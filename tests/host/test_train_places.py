"""What a stranger's graph can make the training nodes read and write: ComfyUI's input, runs, and LoRAs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from graphs import Graph
from training_graphs import BASE, FAST, PICTURES, train, training_folders

from hydit_core.embedded import embedded_model


@pytest.fixture(autouse=True)
def folders(host: Any, monkeypatch: Any, tmp_path: Path) -> Any:
    """Also pictures outside, beside the input folder, and a link to them."""
    outside = host.base / "outside"
    outside.mkdir(exist_ok=True)
    picture = sorted(PICTURES.glob("*.png"))[0]
    for path in (outside / "a.png", outside / "a.txt"):
        path.write_bytes(picture.with_suffix(path.suffix).read_bytes())
    (outside / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "seconds": 1.0}\n')
    links = [host.input_dir / "linked", host.input_dir / "to_input", host.output_dir / "linked_run"]
    for link, target in zip(links, (outside, host.input_dir, outside), strict=True):
        link.symlink_to(target, target_is_directory=True)
    yield from training_folders(host, monkeypatch)
    for link in links:
        link.unlink()


def refused(host: Any, graph: Graph) -> str:
    """The message of a graph that is not even begun, or that ends with one line."""
    result = host.run(graph)
    assert result.error is not None
    if result.error.exception_message:
        assert "\n" not in result.error.exception_message
        return result.error.exception_message
    return str(result.error)


DATASETS = [
    "../outside", "..\\outside", "shapes/../../outside", "{base}/outside", "/", "", ".", "..", "./..",
    "linked", "to_input", "shapes/..", "C:\\", "\\\\server\\share", "//server/share", "shapes\x00", "~",
    "~root", "$HOME", "[embedded] nothing",
    "[embedded] ../lora", "nothing", "shapes/a.png", "file:///etc", "hub:org/name",
    ["shapes"], 5, None, "x" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("name", DATASETS, ids=lambda name: repr(name)[:30])
def test_only_folders_of_input_are_read(host, name):
    name = name.format(base=host.base) if isinstance(name, str) else name
    for kind in ("HyDiTDatasetCheck", "HyDiTTrainLoRA"):
        graph = Graph()
        if kind == "HyDiTTrainLoRA":
            train(graph, dataset_name=name)
        else:
            graph.add(kind, dataset_name=name, base_name=BASE, resolution=0)
        message = refused(host, graph)
        assert "Traceback" not in message and len(message) < 3000
    assert not (host.output_dir / "hydit_train").exists()


@pytest.mark.parametrize("file", ["linked.png", "linked.txt", "below/linked"])
def test_links_in_a_folder_do_not_lead_out(host, file):
    link = host.input_dir / "shapes" / file
    link.parent.mkdir(exist_ok=True)
    target = host.base / "outside" / ("a" + link.suffix if link.suffix else "")
    link.symlink_to(target, target_is_directory=not link.suffix)
    for graph in (Graph(), Graph()):
        if graph.prompt == {}:
            graph.add("HyDiTDatasetCheck", dataset_name="shapes", base_name=BASE, resolution=0)
        assert f"shapes/{file} is a link to a place outside" in refused(host, graph)


def test_links_within_input_are_followed_once(host):
    (host.input_dir / "shapes" / "round").symlink_to(host.input_dir / "shapes", target_is_directory=True)
    paths = host.module("nodes.host.train_paths")
    assert paths.dataset("shapes") == host.input_dir / "shapes"
    assert len(paths.digest(host.input_dir / "shapes")) == 64


def test_lists_offer_nothing_from_elsewhere(host):
    paths = host.module("nodes.host.train_paths")
    assert paths.dataset_names() == ["[embedded] hexagon", "shapes"] and paths.run_names() == []
    (host.input_dir / "shapes" / ".hidden").mkdir()
    (host.input_dir / "shapes" / ".hidden" / "a.png").write_bytes(b"")
    assert paths.dataset_names() == ["[embedded] hexagon", "shapes"]


RUNS = ["linked_run", "../outside", "{base}/outside", "", "..", "shapes", "nothing", 3, "hydit_train\x00"]


@pytest.mark.parametrize("name", RUNS, ids=repr)
def test_only_runs_of_output_are_shown(host, name):
    graph = Graph()
    name = name.format(base=host.base) if isinstance(name, str) else name
    graph.add("HyDiTTrainMonitor", run_name=name, follow=False)
    assert "run" in refused(host, graph)


NAMES = [
    "../x", "a/b", "a\\b", "/tmp/x", "", " ", ".", "..", ".hidden", "x.", "C:x", "a\x00b", "a\nb", "con",
    "NUL.txt", "x" * 81, "é" * 41, "a*b", "a?b", 'a"b', "a<b", "a|b", " x",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:20])
def test_names_are_those_of_one_file(host, name):
    graph = Graph()
    train(graph, output_name=name)
    assert "output_name" in refused(host, graph)
    assert not (host.output_dir / "hydit_train").exists()


def test_names_in_any_script_are_taken(host):
    paths = host.module("nodes.host.train_paths")
    for name in ("我的画风", "my lora v1.2", "é" * 40, "a'b & c"):
        paths.check_name(name)
        assert paths.new_run(name, 3).name == f"{name}-3"


SETTINGS = {
    "[run]\noutput_dir = '/tmp/x'": "run.output_dir",
    "[model]\ninit_from = '/etc/passwd'": "model",
    "[lora]\ninit_from = 'x.safetensors'": "lora.init_from",
    "[data]\nsources = [{path = '/etc'}]": "data.sources",
    "[[data.sources]]\npath = '/etc'": "data.sources",
    "[data.cache]\ndir = '/tmp'": "data.cache",
    "[data.control]\nkind = 'depth'\nmodel = '/etc'": "data.control",
    "[data.mask]\nkind = 'files'": "data.mask",
    "[objective]\nkind = 'full'": "objective.kind",
    "[objective]\ncontrolnet = '/etc/passwd'": "objective.controlnet",
    "[samples]\nimage_prompts = ['/etc/passwd']": "samples.image_prompts",
    "[samples]\ncontrol_images = ['/etc/passwd']": "samples.control_images",
    "[lora]\ntargets = ['re:(a+)+b']": "lora.targets",
    "[[optimizer.groups]]\nmatch = 're:(a+)+b'": "optimizer.groups",
    "[checkpoint.metadata]\nx = 'y'": "checkpoint.metadata",
    "[run]\ndevice = 'cuda:7'": "run.device",
    "[run]\ncompile = true": "run.compile",
    "[data]\nworkers = 900": "data.workers",
    "run = 5": "run is a table",
    "[nothing]\nx = 1": "nothing",
    "rank = 8": "rank",
    "[lora": "settings",
    "[run]\nseed = 2026-11-27": "dates",
    "[optimizer]\nlr = nan": "",
    "[lora]\n" + "x = [" * 300: "",
    "#" * 30_000: "characters",
}


@pytest.mark.parametrize("text", SETTINGS, ids=lambda text: repr(text)[:40])
def test_settings_say_no_place_and_start_nothing(host, text):
    graph = Graph()
    train(graph, settings=text)
    assert SETTINGS[text] in refused(host, graph)
    assert not (host.output_dir / "hydit_train").exists()


def test_a_value_that_is_a_path_elsewhere_is_not_used(host, tmp_path):
    """Whatever the list of keys says: the configuration that is read back may only name what was given."""
    run = host.module("nodes.host.train_run")
    wishes = host.module("hydit_core.train.quick.wish")
    for table, key in (("lora", "init_from"), ("objective", "controlnet")):
        wish = wishes.Wish(host.input_dir / "shapes", "x", embedded_model(), "style", steps=2)
        with pytest.raises(Exception, match=r"passwd|controlnet"):
            run.train(wish, {table: {key: "/etc/passwd"}}, "other", "key")


def test_what_lies_in_a_runs_folder_is_not_believed(host):
    """A configuration that somebody put there, or a file name in what the run remembers."""
    graph = Graph()
    trained = train(graph, steps=1)
    host.run(graph).check()
    folder = host.output_dir / "hydit_train" / "shapes"
    note = json.loads((folder / "graph.json").read_text())
    (folder / "graph.json").write_text(json.dumps({**note, "lora": "../../outside/a.png"}))
    assert host.run(graph).check().outputs[trained.id]["hydit_train"][0].split("\n")[1] == (
        "LoRA: shapes.safetensors"
    )
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace(str(host.input_dir / "shapes"), "/etc"))
    (folder / "graph.json").write_text(json.dumps({"key": note["key"]}))
    (folder / "lora.safetensors").unlink()
    assert "names /etc, which a graph does not give" in refused(host, graph)


def test_a_run_folder_that_is_a_link_is_not_written_to(host):
    (host.output_dir / "hydit_train").mkdir()
    (host.output_dir / "hydit_train" / "shapes").symlink_to(host.base / "outside", target_is_directory=True)
    before = sorted(os.listdir(host.base / "outside"))
    graph = Graph()
    train(graph)
    assert "is a link to a place outside" in refused(host, graph)
    assert sorted(os.listdir(host.base / "outside")) == before


def test_somebody_elses_folder_of_that_name_stays(host):
    paths = host.output_dir / "hydit_train" / "shapes"
    paths.mkdir(parents=True)
    (paths / "notes.txt").write_text("mine")
    graph = Graph()
    train(graph, settings=FAST.format(steps=1))
    host.run(graph).check()
    assert os.listdir(paths) == ["notes.txt"]
    assert (host.output_dir / "hydit_train" / "shapes-2" / "lora.safetensors").is_file()
