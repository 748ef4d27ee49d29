"""Ten steps, an interruption, another process, ten steps: the same bits as twenty steps."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_setup import command_line, environment, records, run_training, write_run

from hydit_core.errors import ConfigError, HyditError
from hydit_core.train.checkpoint import (
    Checkpoint,
    Progress,
    listing,
    load,
    load_latest,
    save,
    set_aside_newer,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("resume"))


def assert_same_end(one: Path, other: Path) -> None:
    step = "checkpoints/step_00000020"
    for part in ("weights", "ema", "optimizer"):
        expected, found = (load_file(run / step / f"{part}.safetensors") for run in (one, other))
        assert expected.keys() == found.keys()
        different = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
        assert different == [], part
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert records(one) == records(other)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ten_and_ten_steps_are_twenty(config: Path, tmp_path: Path, precision: str) -> None:
    """Interrupted inside an epoch (1.5 steps long), inside an accumulation (micro-batch 1 of 2), inside the
    warm-up (13 steps); resumed three times, in a new process with two data workers and in this one."""
    common = [f"run.precision={precision}", "metrics.every=3"]
    assert run_training(config, *common, f"run.output_dir={tmp_path / 'whole'}")

    output = f"run.output_dir={tmp_path / 'parts'}"
    assert not run_training(config, *common, output, stop_after_micro=13)
    assert [p.name for p in listing(tmp_path / "parts/checkpoints")] == ["step_00000006_micro_1"]
    assert not run_training(config, *common, output, resume="auto", stop_after_micro=8)
    assert json.loads((tmp_path / "parts/checkpoints/step_00000010_micro_1/state.json").read_text())
    sets = [word for value in (*common, output, "data.workers=2") for word in ("--set", value)]
    stopped = command_line(config, *sets, "--resume", "auto", "--stop-after-micro", "9")
    assert stopped.returncode == 3, stopped.stderr
    assert "continuing from" in stopped.stderr and "step 10, micro-batch 1" in stopped.stderr
    assert f"Continue with --resume {tmp_path / 'parts'}" in stopped.stderr
    assert run_training(config, *common, output, resume=str(tmp_path / "parts"))
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_signals_stop_cleanly(config: Path, tmp_path: Path) -> None:
    """SIGTERM to the whole process group, data workers included, as a job scheduler sends it."""
    command = [sys.executable, "-m", "hydit_core.train", str(config)]
    for value in (f"run.output_dir={tmp_path / 'run'}", "run.steps=100000", "data.workers=1"):
        command += ["--set", value]
    process = subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 3, text
    assert "stopped (SIGTERM)" in text and "--resume" in text
    found = load_latest(tmp_path / "run/checkpoints", print)
    assert found is not None and found.progress.step >= 1


def test_a_finished_run_can_be_prolonged(config: Path, tmp_path: Path) -> None:
    output = [f"run.output_dir={tmp_path}", "schedule.kind=constant", "schedule.warmup_steps=0"]
    assert run_training(config, *output, "run.steps=2")
    assert run_training(config, *output, "run.steps=3", resume="auto")
    assert [r["step"] for r in records(tmp_path) if "loss" in r] == [1, 2, 3]


def test_a_run_is_never_started_over_by_accident(config: Path, tmp_path: Path) -> None:
    output = f"run.output_dir={tmp_path}"
    run_training(config, output, stop_after_micro=1)
    with pytest.raises(ConfigError, match=r"already holds a run.*--resume auto"):
        run_training(config, output)
    with pytest.raises(ConfigError, match="already holds a run"):
        run_training(config, output, resume=str(tmp_path.parent / "elsewhere"))
    with pytest.raises(ConfigError, match="no checkpoint there"):
        run_training(config, f"run.output_dir={tmp_path / 'new'}", resume=str(tmp_path / "elsewhere"))
    told = r"checkpoints.step_.*: .*optimizer\.name = 'adamw'.*'muon'.*model\.init_from"
    if hasattr(torch.optim, "Muon"):
        with pytest.raises(ConfigError, match=told):
            run_training(config, output, "optimizer.name=muon", resume="auto")
    with pytest.raises(ConfigError, match=r"(?s)do not fit this configuration.*model\.init_from"):
        run_training(config, output, "model.from_scratch.depth=6", resume="auto")


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_model_that_lies_there_is_not_written_over(
    config: Path, tmp_path: Path, resume: str | None
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"already holds a run \(model\.safetensors\)"):
        run_training(config, f"run.output_dir={tmp_path}", resume=resume)
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"


def test_going_back_leaves_the_other_course_aside(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = ["schedule.kind=constant", "schedule.warmup_steps=0", f"run.output_dir={tmp_path}"]
    folder = tmp_path / "checkpoints"
    run_training(config, *flat, "run.steps=3", "checkpoint.every=1")
    back = folder / "step_00000002"
    assert not run_training(config, *flat, "run.steps=5", resume=str(back), stop_after_micro=1)
    assert f"set aside: {folder / 'set-aside-step_00000003'}" in capsys.readouterr().err
    assert not run_training(config, *flat, "run.steps=5", resume="auto", stop_after_micro=1)
    assert "step 2, micro-batch 1" in capsys.readouterr().err
    assert [r["step"] for r in records(tmp_path) if "loss" in r] == [1, 2, 3]
    # Another run that goes on from here leaves this one as it is.
    before = listing(folder)
    other = [*flat[:2], f"run.output_dir={tmp_path / 'other'}", "run.steps=4"]
    run_training(config, *other, resume=str(before[-1]), stop_after_micro=1)
    assert len(before) == 2 and listing(folder) == before


def test_a_run_that_begins_again_begins_its_records_again(config: Path, tmp_path: Path) -> None:
    output = [f"run.output_dir={tmp_path}", "run.steps=1", "schedule.warmup_steps=0"]
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "val_loss": 9.0}\n')  # killed before it saved
    run_training(config, *output, resume="auto")
    assert [r["step"] for r in records(tmp_path)] == [1]


def test_another_batch_size_begins_the_interrupted_step_again(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [f"run.output_dir={tmp_path}", "run.steps=2", "schedule.warmup_steps=0"]
    run_training(config, *common, stop_after_micro=3)
    assert listing(tmp_path / "checkpoints")[0].name == "step_00000001_micro_1"
    assert run_training(config, *common, "run.batch_size=3", resume="auto")
    told = capsys.readouterr().err
    assert "changed since the checkpoint: run.batch_size: 2 -> 3" in told and "in another order" in told
    assert [r["step"] for r in records(tmp_path) if "loss" in r] == [1, 2]


def test_a_disk_that_refuses_the_checkpoint_is_named(tmp_path: Path) -> None:
    write(tmp_path / "run", 1)
    (tmp_path / "file").touch()
    with pytest.raises(HyditError, match=r"step_00000002: the checkpoint could not be written"):
        write(tmp_path / "file" / "run", 2)


# -- checkpoints alone -------------------------------------------------------------------------------


def write(folder: Path, step: int, keep_last: int = 9) -> Path:
    tensors = {"weights": {"w": torch.full((3,), float(step))}, "gradients": {}}
    return save(folder, Checkpoint(Progress(step=step), {"a": 1}, tensors), keep_last=keep_last)


def test_checkpoint_round_trip_and_keep_last(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        write(tmp_path, step, keep_last=2)
    assert [p.name for p in listing(tmp_path)] == ["step_00000010", "step_00000003"]
    found = load_latest(tmp_path, print)
    assert found is not None
    assert found.progress == Progress(step=10) and found.config == {"a": 1}
    assert found.tensors["weights"]["w"].tolist() == [10.0] * 3
    assert load_latest(tmp_path / "none", print) is None


def test_what_was_just_written_is_kept(tmp_path: Path) -> None:
    for step in (1, 9, 2):
        path = write(tmp_path, step, keep_last=1)
        assert listing(tmp_path) == [path]


def test_what_a_crash_left_is_removed(tmp_path: Path) -> None:
    """Of this release, and under the names of those before."""
    for name in (f".step_00000001.{os.getppid()}-0123456789abcdef.tmp", ".writing-step_00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_text("half")
    (tmp_path / ".mine").mkdir()
    path = write(tmp_path, 2)
    assert sorted(tmp_path.iterdir()) == [tmp_path / ".mine", path]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (path / "more").touch()
    assert write(tmp_path, 1) == path and not (path / "more").exists()
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_set_aside_again_gets_a_number(tmp_path: Path) -> None:
    for name in ("", "-2", "-3"):
        back, newer = write(tmp_path, 1), write(tmp_path, 2)
        assert set_aside_newer(back) == [tmp_path / f"set-aside-{newer.name}{name}"]
        assert listing(tmp_path) == [back]


@pytest.mark.skipif(os.name == "nt", reason="folders cannot be flushed there")
def test_a_checkpoint_and_its_folder_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut a renamed folder may be empty whose content was not on the disk before."""
    flushed: list[tuple[int, int]] = []

    def note(handle: int) -> None:
        flushed.append((os.fstat(handle).st_dev, os.fstat(handle).st_ino))

    monkeypatch.setattr(os, "fsync", note)
    path = write(tmp_path, 1)
    places = [(found.stat().st_dev, found.stat().st_ino) for found in (*path.iterdir(), path, tmp_path)]
    assert set(places) <= set(flushed)


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "manifest", "unfinished"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, harm: str) -> None:
    write(tmp_path, 1)
    last = write(tmp_path, 2)
    file = last / "weights.safetensors"
    if harm == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif harm == "flip":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif harm == "remove":
        file.unlink()
    elif harm == "manifest":
        (last / "manifest.json").write_text("{")
    else:  # a crash while it was being written
        last.rename(tmp_path / ".writing-step_00000002")
    warnings: list[str] = []
    found = load_latest(tmp_path, warnings.append)
    assert found is not None and found.progress.step == 1
    assert len(warnings) == (harm != "unfinished")
    if warnings:
        assert str(last) in warnings[0] and "trying the checkpoint before it" in warnings[0]


def test_all_checkpoints_damaged_is_an_error(tmp_path: Path) -> None:
    (write(tmp_path, 1) / "state.json").unlink()
    with pytest.raises(HyditError, match="all 1 checkpoints are damaged"):
        load_latest(tmp_path, lambda text: None)


def rewrite(path: Path, name: str, content: object) -> None:
    """Replace a JSON file of a checkpoint, with a manifest that agrees."""
    (path / name).write_text(json.dumps(content))
    if name != "manifest.json":
        manifest = json.loads((path / "manifest.json").read_text())
        data = (path / name).read_bytes()
        manifest[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([], "holds a list; expected an object"),
        ({}, "does not name state.json, weights.safetensors"),
        ("state only", "does not name weights.safetensors"),
        ({"../state.json": {"size": 1, "sha256": ""}}, "does not name"),
        ("outside", r"names '\.\./x', which is no file in this folder"),
        ({"state.json": 3, "weights.safetensors": None}, "not a complete checkpoint"),
    ],
)
def test_a_manifest_that_names_nothing_is_no_checkpoint(tmp_path: Path, content: object, told: str) -> None:
    path = write(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    if content == "state only":
        content = {"state.json": manifest["state.json"]}
    elif content == "outside":
        (tmp_path / "x").touch()
        content = {**manifest, "../x": {"size": 0, "sha256": hashlib.sha256().hexdigest()}}
    rewrite(path, "manifest.json", content)
    with pytest.raises(HyditError, match=told):
        load(path)
    with pytest.raises(HyditError, match="all 1 checkpoints are damaged"):
        load_latest(tmp_path, lambda text: pytest.fail("there is none before it"))


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "2"},
        {"step": -1},
        {"step": True},
        {"micro": 1.5},
        {"window": []},
        {"good": {}},
        {"another": 1},
        {"unreadable": "x"},
    ],
)
def test_a_state_of_another_kind_is_no_checkpoint(tmp_path: Path, changes: dict[str, object]) -> None:
    path = write(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    state["progress"] |= changes
    rewrite(path, "state.json", state)
    with pytest.raises(HyditError, match="not a complete checkpoint"):
        load(path)


def test_what_the_manifest_does_not_name_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (path / "optimizer.safetensors").write_bytes(b"rubbish")
    assert load(path).tensors.keys() == {"weights"}


@pytest.mark.parametrize("content", [{"a": 1}, {"optimizer": []}, {"optimizer": {"name": "adamw"}}])
def test_a_checkpoint_without_a_configuration_is_refused(
    config: Path, tmp_path: Path, content: object
) -> None:
    output = [f"run.output_dir={tmp_path}", "schedule.warmup_steps=0"]
    run_training(config, *output, stop_after_micro=1)
    path = listing(tmp_path / "checkpoints")[0]
    state = json.loads((path / "state.json").read_text())
    rewrite(
        path,
        "state.json",
        {**state, "config": content, "progress": {**state["progress"], "health": {"x": 1}}},
    )
    with pytest.raises(ConfigError, match=r"state\.json holds no training configuration"):
        run_training(config, *output, resume="auto")


def test_pictures_that_were_written_anew_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_run(tmp_path)
    output = [f"run.output_dir={tmp_path / 'run'}", "run.steps=3", "schedule.warmup_steps=0"]
    run_training(config, *output, stop_after_micro=1)
    assert not run_training(config, *output, resume="auto", stop_after_micro=1)
    assert "written anew" not in capsys.readouterr().err
    path = tmp_path / "pictures/3.png"
    path.write_bytes((tmp_path / "pictures/4.png").read_bytes())
    assert not run_training(config, *output, resume="auto", stop_after_micro=1)
    told = capsys.readouterr().err
    assert "changed since the checkpoint: data: 1 picture file was written anew: pictures/3.png" in told
    assert "in another order" not in told
    for number in range(7):
        path = tmp_path / f"pictures/{number}.png"
        path.write_bytes(path.read_bytes() + b"\0")  # behind its end: the same picture
    assert run_training(config, *output, resume="auto")
    told = capsys.readouterr().err
    assert "data: 7 picture files were written anew: pictures/0.png" in told and "4.png and 2 more" in told


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hydit_core.train.checkpoint.FORMAT", 3)
    path = write(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(HyditError, match="checkpoint format 3"):
        load(path)
