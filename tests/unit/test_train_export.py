"""The model file of a run: a part of being done, and made again from any checkpoint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_train_lora import write_lora_run
from train_setup import run_training, write_run

from hydit_core.train import lock
from hydit_core.train.__main__ import main

STEPS = ["run.steps=4", "checkpoint.every=2", "checkpoint.keep_last=2", "checkpoint.export_dtype=fp32"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("export"))


@pytest.fixture
def run(config: Path, tmp_path: Path) -> Path:
    """A full training of the DiT alone, with averages, of four steps."""
    folder = tmp_path / "run"
    sets = ["schedule.kind=constant", "schedule.warmup_steps=0", "run.grad_accumulation=1"]
    sets += ["checkpoint.export_all_in_one=false", "objective.train_text_encoders=false"]
    assert run_training(config, *STEPS, *sets, f"run.output_dir={folder}")
    return folder


def content(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    metadata.pop("modelspec.date", None)
    return load_file(path), metadata


def assert_same(path: Path, expected: tuple[dict[str, torch.Tensor], dict[str, str]]) -> None:
    tensors, metadata = content(path)
    assert metadata == expected[1] and tensors.keys() == expected[0].keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in expected[0].items())


def test_exports_of_every_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = run / "model.safetensors"
    expected = content(model)
    model.unlink()
    assert main(["export", str(run)]) == 0
    assert capsys.readouterr().out == f"{model}: averaged weights of step 4\n"
    assert_same(model, expected)
    assert main(["export", str(run)]) == 0  # replaces its own

    assert main(["export", str(run), "--step", "2"]) == 0
    tensors, metadata = content(run / "model-00000002.safetensors")
    average = load_file(run / "checkpoints/step_00000002/ema.safetensors")
    assert all(torch.equal(tensor, tensors[name.removeprefix("dit.")]) for name, tensor in average.items())
    assert metadata["hydit.training"].startswith("step 2 of 4,")

    assert main(["export", str(run), "--no-ema"]) == 0
    tensors, _ = content(run / "model-no-ema.safetensors")
    trained = load_file(run / "checkpoints/step_00000004/weights.safetensors")
    assert all(torch.equal(tensor, tensors[name.removeprefix("dit.")]) for name, tensor in trained.items())
    assert_same(model, expected)

    out = run.parent / "other.safetensors"
    assert main(["export", str(run / "checkpoints/step_00000004"), "--ema", "-o", str(out)]) == 0
    assert_same(out, expected)


def test_what_export_refuses(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: object) -> str:
        assert main(["export", *map(str, arguments)]) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ") and told.count("\n") == 1
        return told

    assert "no such folder" in error(tmp_path / "none")
    assert "no checkpoint there" in error(tmp_path)
    assert "no checkpoint of step 3; there: step_00000002, step_00000004" in error(run, "--step", "3")
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(b"mine")
    assert "--overwrite" in error(run, "-o", mine) and mine.read_bytes() == b"mine"
    weights = run / "checkpoints/step_00000004/weights.safetensors"
    assert "input" in error(run, "--overwrite", "-o", weights)
    (run / "model-00000002.safetensors").write_bytes(b"mine")
    assert "--overwrite" in error(run, "--step", "2")
    with lock.hold(run):
        assert "another training writes there" in error(run)
    state = run / "checkpoints/step_00000004/state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "config": {"a": 1}}))
    assert "damaged" in error(run, "--step", "4")
    manifest = state.with_name("manifest.json")
    entries = json.loads(manifest.read_text())
    entries["state.json"] = {
        "size": state.stat().st_size,
        "sha256": hashlib.sha256(state.read_bytes()).hexdigest(),
    }
    manifest.write_text(json.dumps(entries))
    told = error(run, "--step", "4")
    assert "its configuration is not one of this version" in told and "resume the run with" in told


def test_a_run_killed_before_its_export_is_finished_by_resuming(config: Path, run: Path) -> None:
    sets = ["schedule.kind=constant", "schedule.warmup_steps=0", "run.grad_accumulation=1"]
    sets += ["checkpoint.export_all_in_one=false", "objective.train_text_encoders=false"]
    model = run / "model.safetensors"
    expected = content(model)
    checkpoint = run / "checkpoints/step_00000004"
    before = checkpoint.stat().st_mtime_ns
    for left in (None, content):  # nothing, or that of an earlier step
        model.unlink()
        if left is not None:
            assert main(["export", str(run), "--step", "2", "-o", str(model)]) == 0
        assert run_training(config, *STEPS, *sets, f"run.output_dir={run}", resume="auto")
        assert_same(model, expected)
    assert checkpoint.stat().st_mtime_ns == before  # what is there is not written again


def test_exports_of_a_lora_have_both_forms(tmp_path: Path, tiny_model_file: Path) -> None:
    config = write_lora_run(tmp_path, tiny_model_file)
    run = tmp_path / "run"
    keeping = ["checkpoint.keep_every=2", "lora.base_precision=fp8", "ema.enabled=true"]
    assert run_training(config, *STEPS, *keeping, f"run.output_dir={run}")
    names = {path.name for path in run.iterdir()}
    assert {"lora.safetensors", "lora", "lora-00000002.safetensors", "lora-00000004"} <= names

    def both(stem: str) -> list[Any]:
        return [content(run / f"{stem}.safetensors"), content(run / stem / "adapter_model.safetensors")]

    assert_same(run / "lora.safetensors", both("lora-00000004")[0])
    expected = both("lora-00000002")
    assert main(["export", str(run), "--step", "2", "--overwrite"]) == 0
    assert_same(run / "lora-00000002.safetensors", expected[0])
    assert_same(run / "lora-00000002/adapter_model.safetensors", expected[1])
