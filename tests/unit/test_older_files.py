"""What users have from before: files that an older commit wrote work on, with the same numbers.

tests/data/written_2026-11-22/README.md tells what they are. The commands are run as a user runs them, so that
the tests know nothing of where the code lies.
"""

from __future__ import annotations

import json
import runpy
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_locales import read_schemas

import hydit_core

ROOT = Path(__file__).resolve().parents[2]
OLD = ROOT / "tests" / "data" / "written_2026-11-22"
RUNS = ("full", "lora", "controlnet")
SAMPLED = "data.posterior=sample"
CHECKPOINT = Path("checkpoints", "step_00000002_micro_1")
ROUNDING = 2
"""Of 255: what other processors' rounding may make of a pixel."""

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")

Command = Callable[..., str]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy in another place than the one that the files name, and the current folder."""
    folder = tmp_path / "moved"
    shutil.copytree(OLD, folder)
    monkeypatch.chdir(folder)
    threads = torch.get_num_threads()
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """``python -m hydit_core.MODULE ARGUMENTS`` in this process; gives what it printed."""

    def command(module: str, *arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        # The training's command ignores signals from its end on, which is not the end of this process.
        handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
        try:
            with pytest.raises(SystemExit) as end:
                runpy.run_module(f"hydit_core.{module}", run_name="__main__")
        finally:
            for number, handler in handlers.items():
                if handler is not None and signal.getsignal(number) != handler:
                    signal.signal(number, handler)
        printed = capsys.readouterr()
        assert (end.value.code or 0) == code, printed.err
        return printed.out + printed.err

    return command


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shards(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if name.endswith(".safetensors")}


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, tensor in one.items() if not torch.equal(tensor, other[name])] == []


# -- training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_goes_on_as_it_would_have_then(name: str, files: Path, command: Command) -> None:
    """Weights, averages, moments, half a step's gradients, order, noise, schedule: all that a loss tells.

    Where data.posterior was not given it meant "sample", except in validation.
    """
    sampled = name == "full"
    cached = shards(files / "cache")
    told = command("train", f"{name}.toml", "--resume", "auto", *(["--set", SAMPLED] if sampled else []))
    assert "step 2, micro-batch 1" in told
    assert "changed since the checkpoint: data:" not in told and "data.posterior" not in told
    expected = records(OLD / f"runs/{name}-finished.jsonl")
    found = records(files / f"runs/{name}/metrics.jsonl")
    assert [record["step"] for record in expected] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    for then, now in zip(expected, found, strict=True):
        if "loss" in then or not sampled:
            del then["seconds" if "loss" in then else "step"]
            assert {key: now[key] for key in then} == pytest.approx(then, rel=1e-4, abs=2e-6)
    assert (files / f"runs/{name}/checkpoints/step_00000006").is_dir()
    assert shards(files / "cache") == cached


def test_it_says_what_means_something_else_now(files: Path, command: Command) -> None:
    told = command("train", "full.toml", "--resume", "auto", "--stop-after-micro", "1", code=3)
    assert 'changed since the checkpoint: data.posterior: "sample" -> "mode"' in told


@pytest.mark.parametrize("name", RUNS)
def test_its_weights_are_taken_bit_by_bit(name: str, files: Path, command: Command) -> None:
    """A step that is too small to change anything."""
    still = ("--set", "optimizer.lr=1e-30", "--stop-after-micro", "1")
    command("train", f"{name}.toml", "--resume", f"runs/{name}/{CHECKPOINT}", *still, code=3)
    after = load_file(files / f"runs/{name}/checkpoints/step_00000003/weights.safetensors")
    same(load_file(OLD / f"runs/{name}" / CHECKPOINT / "weights.safetensors"), after)


def test_a_cache_without_checksums_is_complete(files: Path, command: Command) -> None:
    before = shards(files / "cache")
    assert len(before) == 3 and not any(b"crc32" in shard for shard in before.values())
    assert "complete" in command("train", "cache", "controlnet.toml")
    assert shards(files / "cache") == before


# -- weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["tencent.safetensors", "diffusers"])
def test_converted_weights_are_those_of_the_base(file: str) -> None:
    base, said = hydit_core.load_dit(OLD / "base.safetensors")
    found, info = hydit_core.load_dit(OLD / "converted" / file)
    assert found.config == base.config and info.version == said.version == "v1.2"
    same(base.state_dict(), found.state_dict())


def test_exported_weights_are_the_averages(command: Command) -> None:
    averages = load_file(OLD / "runs/full" / CHECKPOINT / "ema.safetensors")
    expected = {name[4:]: tensor for name, tensor in averages.items() if name.startswith("dit.")}
    dit, info = hydit_core.load_dit(OLD / "runs/full/model.safetensors")
    assert len(expected) > 100 and info.defaults.steps == 3
    same(expected, dit.state_dict())
    assert "HunyuanDiT-16x4" in command("weights", "inspect", str(OLD / "runs/full/model.safetensors"))


def test_an_exported_controlnet_is_its_averages() -> None:
    averages = load_file(OLD / "runs/controlnet" / CHECKPOINT / "ema.safetensors")
    net, _ = hydit_core.load_controlnet(OLD / "runs/controlnet/model.safetensors")
    trained = {name.removeprefix("controlnet."): tensor for name, tensor in averages.items()}
    assert len(trained) > 30
    same(trained, {name: tensor for name, tensor in net.state_dict().items() if name in trained})


@pytest.mark.parametrize("file", ["runs/lora/lora.safetensors", "runs/lora/lora", "lora/kohya.safetensors"])
def test_a_lora_changes_weights_as_it_did(file: str, files: Path, command: Command) -> None:
    told = command("lora", "inspect", file)
    assert "rank 2" in told and "apple" in told
    where = ("--layout", "tencent", "--block-weights", "decay(0.9)")
    command("lora", "merge", "base.safetensors", f"{file}:0.8", "now.safetensors", *where)
    base, then, now = (
        load_file(files / path)
        for path in ("converted/tencent.safetensors", "lora/merged.safetensors", "now.safetensors")
    )
    assert base.keys() == then.keys() == now.keys()
    changed = {name for name, tensor in then.items() if not torch.equal(tensor, base[name])}
    assert changed == {name for name, tensor in now.items() if not torch.equal(tensor, base[name])}
    assert len(changed) == 29
    for name, tensor in then.items():
        torch.testing.assert_close(now[name], tensor, rtol=1e-6, atol=1e-7)


# -- pictures and graphs -------------------------------------------------------------------------------------


def asked_for(facts: dict[str, Any]) -> list[str]:
    """The command line that a picture's own facts tell."""
    given = ["--prompt", facts["prompt"], "--negative", facts["negative"]]
    given += ["--size", f"{facts['width']}x{facts['height']}"]
    for name in ("steps", "cfg", "guidance_rescale", "sampler", "spacing", "seed", "strength"):
        if name in facts:
            given += [f"--{name.replace('_', '-')}", str(facts[name])]
    if "init_image" in facts:
        given += ["--init-image", f"pictures/{facts['init_image']}"]
    for lora in facts.get("loras", ()):
        given += ["--lora", f"runs/lora/{lora['lora']}:{lora['strength']}"]
        given += ["--lora-block-weights", lora["block_weights"]]
    for control in facts.get("controls", ()):
        given += ["--controlnet", f"runs/controlnet/{control['controlnet']}:{control['scale']}"]
        given += ["--control-image", f"drawn/{control['picture']}", "--control-weights", control["weights"]]
        given += ["--control-start", str(control["start"]), "--control-end", str(control["end"])]
    return given


# The model of drawn/embedded.png does not come with hydit any more: test_like.py.
@pytest.mark.parametrize("name", ["base", "adapted"])
def test_a_picture_is_drawn_again(name: str, files: Path, command: Command) -> None:
    old = Image.open(files / f"drawn/{name}.png")
    facts = json.loads(old.info["hydit"])
    given = ["--model", "base.safetensors", *asked_for(facts)]
    command("generate", *given, "--device", "cpu", "--out", "again.png")
    new = Image.open(files / "again.png")
    assert np.abs(np.asarray(new, int) - np.asarray(old, int)).max() <= ROUNDING
    assert np.asarray(old).std() > 5
    remembered = json.loads(new.info["hydit"])
    if "controls" in facts:  # made from a picture then, given ready-made now
        for part in (facts, remembered):
            for key in ("image", "preprocess", "picture"):
                del part["controls"][0][key]
    assert facts.items() <= remembered.items()


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    return read_schemas()


def graphs() -> list[dict[str, Any]]:
    """All graphs as the server gets them."""
    stored = [json.loads(path.read_text(encoding="utf-8")) for path in (OLD / "workflows/api").glob("*.json")]
    for path in (OLD / "drawn").glob("[abe]*.png"):
        stored.append(json.loads(Image.open(path).info["prompt"]))
    return stored


def test_old_graphs_name_what_the_nodes_still_have(schemas: dict[str, Any]) -> None:
    seen = set()
    for graph in graphs():
        for node in graph.values():
            if not node["class_type"].startswith("HyDiT"):
                continue
            schema = schemas[node["class_type"]]
            seen.add(schema.node_id)
            slots = {slot.id: slot for slot in schema.inputs}
            for name, value in node["inputs"].items():
                assert name in slots, schema.node_id
                options = slots[name].options
                if isinstance(value, str) and options and not name.endswith("_name"):
                    assert value in options, (schema.node_id, name)
                if isinstance(value, list) and graph[value[0]]["class_type"] in schemas:
                    assert value[1] < len(schemas[graph[value[0]]["class_type"]].outputs)
    assert len(seen) == 14


def test_old_workflows_fill_the_same_widgets_and_sockets(schemas: dict[str, Any]) -> None:
    """The page gives values to widgets by their order, and links to outputs by their number."""
    seen = set()
    for path in (OLD / "workflows").glob("*.json"):
        sent = json.loads((OLD / "workflows/api" / path.name).read_text(encoding="utf-8"))
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            if not node["type"].startswith("HyDiT"):
                continue
            schema = schemas[node["type"]]
            seen.add(node["type"])
            outputs = [output["name"] for output in node["outputs"]]
            assert outputs == [slot.id for slot in schema.outputs][: len(outputs)]
            sockets = {socket["name"] for socket in node["inputs"] if "widget" not in socket}
            slots = [slot.id for slot in schema.inputs]
            assert sockets <= set(slots)
            widgets = [name for name in sent[str(node["id"])]["inputs"] if name not in sockets]
            assert [name for name in slots if name not in sockets][: len(widgets)] == widgets, node["type"]
    assert len(seen) == 14
