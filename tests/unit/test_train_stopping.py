"""However a run ends in the middle, what was done is saved, the cause is told, and the run can go on."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from line_run import line_trainer, names
from safetensors.torch import load_file
from train_setup import command_line, records, run_training, write_run

from hydit_core.data.cache import latents as cache
from hydit_core.errors import DataError
from hydit_core.train import stopping
from hydit_core.train.checkpoint import Checkpoint, Progress
from hydit_core.train.config import load_config
from hydit_core.train.launch import build_caches
from hydit_core.train.looks import Looks
from hydit_core.train.loop import Trainer
from hydit_core.train.stopping import TrainingStopped

posix = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


def raising(error: Exception, at: int) -> Callable[[int], None]:
    def check(number: int) -> None:
        if number == at:
            raise error

    return check


def assert_continued_run_is_whole(folder: Path, tmp_path: Path, **same: int) -> None:
    """From what is saved, the rest gives the bits of a run that nothing disturbed."""
    assert line_trainer(folder, resume=folder, **same).run()
    assert line_trainer(tmp_path / "whole", **same).run()
    last = f"checkpoints/step_{same.get('steps', 6):08d}"
    for part in ("weights", "optimizer"):
        found, expected = (load_file(f / last / f"{part}.safetensors") for f in (folder, tmp_path / "whole"))
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert records(folder) == records(tmp_path / "whole")


def test_a_picture_that_cannot_be_read_any_more(tmp_path: Path) -> None:
    """Inside an accumulation: not a micro-batch is lost."""
    run = tmp_path / "run"
    gone = raising(DataError("cannot read picture 7.png: no such file"), at=5)
    with pytest.raises(TrainingStopped) as caught:
        line_trainer(run, micro=2, loading=gone).run()
    assert str(caught.value) == (
        "cannot read picture 7.png: no such file. Stopped at step 2, micro-batch 1; everything is saved. "
        f"Continue with --resume {run}"
    )
    assert names(run) == ["step_00000002_micro_1"] and (run / "model.safetensors").exists()
    assert_continued_run_is_whole(run, tmp_path, micro=2)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("a fault of torch"), "RuntimeError: a fault of torch (details in "),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), "lower run.batch_size"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            "/x/y: No space left on device; make room",
        ),
        (ZeroDivisionError("a fault\nof ours"), "ZeroDivisionError: of ours (details in "),
    ],
)
def test_what_nobody_foresaw_begins_the_step_again(tmp_path: Path, error: Exception, told: str) -> None:
    """In a forward pass half of the gradients may be there: weights are as after the step before."""
    run = tmp_path / "run"
    with pytest.raises(TrainingStopped) as caught:
        line_trainer(run, micro=2, during=raising(error, at=5)).run()
    text = str(caught.value)
    assert told in text and "Stopped at step 2; everything is saved" in text and "\n" not in text
    assert names(run) == ["step_00000002"]
    assert "Traceback" in (run / "error.txt").read_text()
    assert_continued_run_is_whole(run, tmp_path, micro=2)


@pytest.mark.parametrize("cut", ["record", "validation", "pictures"])
def test_what_comes_after_a_step_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    """What fails between an update and the next step is done when the run goes on, once."""
    validations = {1: 0.5, 2: 0.4, 3: 0.2, 4: 0.3, 5: 0.3, 6: 0.3}
    steps: list[int] = []

    def prepared(trainer: Trainer, failing: bool) -> Trainer:
        def fail(part: str) -> None:
            if failing and part == cut and trainer.progress.step == 3:
                raise RuntimeError("no memory for it")

        def validate() -> dict[str, float]:
            fail("validation")
            return {"val_loss": validations.get(trainer.progress.step, 0.9)}

        def pictures(looks: Looks, step: int) -> None:
            fail("pictures")
            steps.append(step)

        flush = trainer.usage.flush
        monkeypatch.setattr(trainer.usage, "flush", lambda: (fail("record"), flush())[1])
        monkeypatch.setattr(trainer, "_validate", validate)
        monkeypatch.setattr(Looks, "_samples", pictures)
        return trainer

    sections: dict[str, Any] = {
        "validation": {"every": 1},
        "samples": {"every": 3, "prompts": ["a cat"]},
        "checkpoint": {"keep_best": True},
        "metrics": {"every": 3},
    }
    run, whole = tmp_path / "run", tmp_path / "whole"
    with pytest.raises(TrainingStopped, match=r"Stopped at step 3; everything is saved"):
        prepared(line_trainer(run, **sections), failing=True).run()
    assert json.loads((run / "checkpoints/step_00000003/state.json").read_text())["progress"]["due"] is True
    steps.clear()
    assert prepared(line_trainer(run, resume=run, **sections), failing=False).run()
    assert steps == [3, 6]
    assert not json.loads((run / "checkpoints/step_00000003/state.json").read_text())["progress"]["due"]
    assert prepared(line_trainer(whole, **sections), failing=False).run()
    assert records(run) == records(whole)
    assert (run / "best.safetensors").read_text() == (whole / "best.safetensors").read_text()
    assert "step 3" in (run / "best.safetensors").read_text() and "step_00000003" in names(run)


def test_half_an_update_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = line_trainer(tmp_path, checkpoint={"every": 2})
    original = trainer.optimizer.step

    def step(factor: float) -> None:
        original(factor)
        if trainer.progress.step == 3:
            raise RuntimeError("in the middle")

    monkeypatch.setattr(trainer.optimizer, "step", step)
    with pytest.raises(
        TrainingStopped, match=r"inside the update after step 3, so the last checkpoint counts"
    ):
        trainer.run()
    assert names(tmp_path) == ["step_00000002"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_in_the_records(tmp_path: Path) -> None:
    trainer = line_trainer(tmp_path, metrics={"every": 4})
    original = trainer._log

    def log(step: int) -> None:
        if step == 4:
            trainer.metrics._file = open("/dev/full", "a")  # noqa: SIM115
        original(step)

    trainer._log = log  # type: ignore[method-assign]
    with pytest.raises(
        TrainingStopped, match=r"metrics\.jsonl: cannot be written: No space left.* at step 4"
    ):
        trainer.run()
    assert names(tmp_path) == ["step_00000004"]
    assert line_trainer(tmp_path, resume=tmp_path).run()


@pytest.mark.parametrize("background", ["never", "always"])
def test_a_full_disk_in_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: str
) -> None:
    """Nothing half-written stays, and the checkpoint before is what counts."""
    from hydit_core.train import checkpoint

    original = checkpoint.save_safetensors
    goes_on = threading.Event()

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        original(path, tensors)
        if "step_00000004" in str(path):
            assert background == "never" or goes_on.wait(20)
            raise OSError(errno.ENOSPC, "No space left on device")

    def during(number: int) -> None:
        if number == 4:  # in the step after it
            goes_on.set()
            trainer.writer._work.join()

    monkeypatch.setattr(checkpoint, "save_safetensors", full)
    how = {"every": 2, "background": background}
    trainer = line_trainer(tmp_path, during=during, checkpoint=how)
    step = 5 if background == "always" else 4
    words = rf"(?s)No space left.*at step {step}, which is not saved.*before it"
    with pytest.raises(TrainingStopped, match=words):
        trainer.run()
    assert names(tmp_path) == ["step_00000002"]
    monkeypatch.undo()
    assert line_trainer(tmp_path, resume=tmp_path).run()


@pytest.mark.parametrize("background", ["never", "always"])
def test_an_export_that_fails_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: str
) -> None:
    trainer = line_trainer(tmp_path, checkpoint={"every": 3, "background": background})

    def export(path: Path, **how: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(trainer.objective, "export", export)
    with pytest.raises(TrainingStopped, match=r"model\.safetensors: No space left.*the export is not saved"):
        trainer.run()
    found = names(tmp_path)  # in the background, it is told some steps later
    assert found[0] == "step_00000003" and (background == "always" or len(found) == 1)


# -- signals -----------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_twice_at_once_is_one(tmp_path: Path, name: str) -> None:
    def during(number: int) -> None:
        if number == 3:
            for _ in range(2):
                os.kill(os.getpid(), getattr(signal, name))

    before = signal.getsignal(getattr(signal, name))
    assert not line_trainer(tmp_path, during=during).run()
    assert names(tmp_path) == ["step_00000004"]
    assert signal.getsignal(getattr(signal, name)) is before


@posix
def test_signals_while_it_saves_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = line_trainer(tmp_path)
    original = trainer.saver.save

    def save(content: Checkpoint, progress: Progress) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(os.getpid(), number)
        original(content, progress)

    monkeypatch.setattr(trainer.saver, "save", save)
    assert not trainer.run(stop_after_micro=2)
    assert names(tmp_path) == ["step_00000002"]


@posix
def test_a_second_ctrl_c_a_second_later_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    signals = stopping.StopSignals()
    with signals.handled():
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 0.9
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 0.2
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signals.name == "SIGINT"


@posix
def test_nohup_keeps_its_meaning(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert line_trainer(tmp_path, during=lambda number: os.kill(os.getpid(), signal.SIGHUP)).run()
    finally:
        signal.signal(signal.SIGHUP, before)


@posix
def test_a_signal_before_training_puts_away_what_is_half_done() -> None:
    put_away = []
    with pytest.raises(SystemExit) as caught, stopping.ending_at_once():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        finally:
            put_away.append(1)
    assert caught.value.code == 128 + signal.SIGTERM and put_away
    with stopping.ending_at_once() as over:  # when training is over, its own exit code counts
        over.set()
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_terminal_that_is_gone_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        encoding = "utf-8"

        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

        def flush(self) -> None:
            raise OSError(errno.EIO, "Input/output error")

        def isatty(self) -> bool:
            return True

    trainer = line_trainer(tmp_path)
    original = Trainer._log

    def log(self: Trainer, step: int) -> None:
        if step == 2:
            monkeypatch.setattr(sys, "stderr", Gone())
            self.metrics._bar.fp = Gone()
            self.metrics._bar.mininterval = 0
        original(self, step)

    monkeypatch.setattr(Trainer, "_log", log)
    assert not trainer.run(stop_after_micro=4)
    assert names(tmp_path) == ["step_00000004"]


# -- the command -------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("seconds", [0, 1], ids=["while it waits for a batch", "in the middle of a step"])
def test_a_data_worker_that_dies(seconds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the program is then, and though torch's handler has been in place since an earlier loader;
    and the others end, for nobody would end them later."""
    original = Trainer._update

    def update(self: Trainer) -> None:
        original(self)
        if self.progress.step == 1:
            children = multiprocessing.active_children()
            assert len(children) == 2
            os.kill(children[0].pid or 0, signal.SIGKILL)
            time.sleep(seconds)  # which torch's handler would interrupt

    next(iter(torch.utils.data.DataLoader([0], num_workers=1)))
    monkeypatch.setattr(Trainer, "_update", update)
    sets = ["run.steps=50", "schedule.warmup_steps=0", "data.workers=2", "data.posterior=mode"]
    with pytest.raises(TrainingStopped, match=r"prepares pictures ended.*data\.workers.*everything is saved"):
        run_training(write_run(tmp_path), *sets, f"run.output_dir={tmp_path / 'run'}")
    deadline = time.monotonic() + 60
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert multiprocessing.active_children() == []
    assert len(names(tmp_path / "run")) == 1


def test_the_command_ends_with_3_and_one_line(tmp_path: Path) -> None:
    """A picture is damaged while it runs; mended, the run goes on."""
    config = write_run(tmp_path)
    path = tmp_path / "pictures/4.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    sets = [f"run.output_dir={tmp_path / 'run'}", "run.steps=4", "schedule.warmup_steps=0", "data.workers=1"]
    sets += ["data.validation=0", "data.posterior=mode"]
    stopped = command_line(config, *(word for value in sets for word in ("--set", value)))
    told = stopped.stderr
    assert stopped.returncode == 3, told
    assert "Traceback" not in told
    last = told.strip().splitlines()[-1]
    assert (
        last.startswith("error: cannot read picture ") and "4.png" in last and "everything is saved" in last
    )
    path.write_bytes(whole)
    assert run_training(config, *sets, resume="auto")


@posix
def test_sigterm_while_pictures_are_encoded_keeps_what_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = cache._encode
    calls = []

    def encode(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(cache, "_encode", encode)
    sets = ["data.cache.latents=true", f"data.cache.dir={tmp_path / 'cache'}"]
    with pytest.raises(SystemExit):
        build_caches(load_config(write_run(tmp_path), sets))
    shards = list((tmp_path / "cache").rglob("shard-*.safetensors"))
    assert len(shards) == 1 and len(load_file(shards[0])) == 4
