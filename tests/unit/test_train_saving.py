"""Which checkpoints and exports stay, in a run that goes well and in one that diverges."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from line_run import line_trainer, names
from safetensors.torch import load_file
from train_setup import records

from hydit_core.train import checkpoint
from hydit_core.train.health import Health
from hydit_core.train.saving import held_run
from hydit_core.train.stopping import TrainingStopped


def step_names(*steps: int) -> list[str]:
    return [f"step_{step:08d}" for step in steps]


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_of_a_run_that_goes_well_the_last_remain(tmp_path: Path, keep_last: int) -> None:
    trainer = line_trainer(tmp_path, steps=9, checkpoint={"every": 2, "keep_last": keep_last})
    assert trainer.run()
    assert names(tmp_path) == step_names(4, 6, 8, 9)[-keep_last:]


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is what was there when it was due; the next one waits for it."""
    go = threading.Event()
    original = checkpoint.save_safetensors

    def slow(path: Path, tensors: Any) -> None:
        if background == "always" and "step_00000003" in str(path):
            assert go.wait(60)
        original(path, tensors)

    def during(number: int) -> None:
        if number == 4:
            done = [path.name for path in checkpoint.listing(folder / "checkpoints")]
            assert done == ([] if background == "always" else step_names(3))
            go.set()

    monkeypatch.setattr(checkpoint, "save_safetensors", slow)
    for background in ("never", "always"):
        go.clear()
        folder = tmp_path / background
        how = {"every": 3, "background": background, "keep_last": 3}
        assert line_trainer(folder, steps=9, during=during, checkpoint=how).run()
        assert names(folder) == step_names(3, 6, 9)
    for number in (3, 6, 9):
        mine, theirs = (
            [
                load_file(path)
                for path in sorted((tmp_path / one).glob(f"checkpoints/*{number}/*.safetensors"))
            ]
            for one in ("never", "always")
        )
        for one, other in zip(mine, theirs, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)
    ways = ("never", "always")
    states = (json.loads((tmp_path / f"{b}/checkpoints/step_00000009/state.json").read_text()) for b in ways)
    assert len({str(state["progress"]["good"]) for state in states}) == 1
    assert records(tmp_path / "never") == records(tmp_path / "always")


def test_a_stop_right_after_a_save_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = checkpoint.save_safetensors

    def slow(path: Path, tensors: Any) -> None:
        time.sleep(0.3)
        original(path, tensors)

    monkeypatch.setattr(checkpoint, "save_safetensors", slow)
    trainer = line_trainer(tmp_path, steps=9, checkpoint={"every": 3, "background": "always"})
    assert not trainer.run(stop_after_micro=3)
    assert names(tmp_path) == step_names(3)


def test_keep_every_keeps_checkpoints_and_exports(tmp_path: Path) -> None:
    """Steps that ``checkpoint.every`` would not save, too."""
    keeping = {"every": 4, "keep_last": 1, "keep_every": 3}
    assert line_trainer(tmp_path, steps=10, checkpoint=keeping).run()
    assert names(tmp_path) == step_names(3, 6, 9, 10)
    exports = {path.name: path.read_text() for path in sorted(tmp_path.glob("*.safetensors"))}
    assert list(exports) == [*(f"model-{step:08d}.safetensors" for step in (3, 6, 9)), "model.safetensors"]
    assert exports["model-00000006.safetensors"].startswith("step 6 of 10,")
    assert exports["model.safetensors"].startswith("step 10 of 10,")


def test_keep_best_keeps_the_lowest_validation_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {0: 0.1, 2: 5.0, 4: 3.0, 6: math.nan, 8: 3.5, 10: 3.2}
    trainer = line_trainer(
        tmp_path,
        steps=10,
        checkpoint={"every": 5, "keep_last": 1, "keep_best": True},
        validation={"every": 2},
    )
    monkeypatch.setattr(trainer, "_validate", lambda: {"val_loss": losses[trainer.progress.step]})
    assert trainer.run()
    assert names(tmp_path) == step_names(4, 10)
    assert (tmp_path / "best.safetensors").read_text().startswith("step 4 of 10,")
    assert held_run(tmp_path, ("model.safetensors",)) == "step_00000010"

    # A resumed run knows what was best.
    longer = line_trainer(
        tmp_path,
        steps=12,
        resume=tmp_path,
        checkpoint={"every": 5, "keep_last": 1, "keep_best": True},
        validation={"every": 2},
    )
    monkeypatch.setattr(longer, "_validate", lambda: {"val_loss": 3.1})
    assert longer.run()
    assert names(tmp_path) == step_names(4, 12)
    assert (tmp_path / "best.safetensors").read_text().startswith("step 4 of 10,")


def test_patience_ends_a_run_that_learns_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a quarter of an epoch, looks at every other: four epochs after the best, if it is due then."""
    losses = dict.fromkeys(range(0, 200, 2), 1.0) | {4: 0.5, 10: 0.4}
    per_epoch = 4

    def run(folder: Path, resume: Path | None = None, **validation: float) -> tuple[int, bool]:
        trainer = line_trainer(
            folder,
            steps=100,
            resume=resume,
            checkpoint={"every": 50, "keep_last": 1, "keep_best": True},
            validation={"every": 2, **validation},
        )
        samples = per_epoch * trainer.global_batch * trainer.config.run.grad_accumulation
        monkeypatch.setattr(trainer.data, "samples", range(samples), raising=False)
        monkeypatch.setattr(trainer, "_validate", lambda: {"val_loss": losses[trainer.progress.step]})
        finished = trainer.run()
        return trainer.progress.step, finished

    assert run(tmp_path / "a", patience=4.0) == (10 + 4 * per_epoch, True)
    assert (tmp_path / "a/best.safetensors").read_text().startswith("step 10 of 100,")
    # It has ended, and says so again; with more patience it goes on.
    assert run(tmp_path / "a", resume=tmp_path / "a", patience=4.0) == (26, True)
    assert run(tmp_path / "a", resume=tmp_path / "a", patience=4.6) == (30, True)  # 28.4, and the next look
    assert run(tmp_path / "b", patience=1.0) == (4 + 1 * per_epoch, True)
    assert run(tmp_path / "c", patience=1.0, min_epochs=3.0) == (14, True)  # 12 is too early after 10
    assert run(tmp_path / "d", patience=0.0) == (100, True)
    # 0.4 is lower than 0.5 by a fifth: the best, but with a quarter asked for it does not prolong the run.
    assert run(tmp_path / "e", patience=4.0, min_improvement=0.15) == (26, True)
    assert run(tmp_path / "f", patience=4.0, min_improvement=0.25) == (20, True)
    assert (tmp_path / "f/best.safetensors").read_text().startswith("step 10 of 100,")
    assert run(tmp_path / "f", resume=tmp_path / "f", patience=4.6, min_improvement=0.25) == (24, True)


def test_keep_best_needs_a_validation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keep_best goes by the validation loss: set validation\.every"):
        line_trainer(tmp_path, checkpoint={"keep_best": True})
    with pytest.raises(ValueError, match=r"patience keeps the best of the run: set checkpoint\.keep_best"):
        line_trainer(tmp_path, validation={"every": 2, "patience": 1.0})
    known = {
        "validation": 0,
        "sources": [{"path": tmp_path}, {"path": tmp_path, "prior": True, "validation": True}],
    }
    with pytest.raises(ValueError, match="only prior ones are held out"):
        line_trainer(tmp_path, data=known, checkpoint={"keep_best": True}, validation={"every": 2})


def test_a_folder_with_exports_alone_holds_a_run(tmp_path: Path) -> None:
    for name in ("best.safetensors", "lora-00001000.safetensors", "model.safetensors"):
        assert held_run(tmp_path, ("model.safetensors", "lora.safetensors")) is None
        (tmp_path / name).touch()
        assert held_run(tmp_path, ("model.safetensors", "lora.safetensors")) == name
        (tmp_path / name).unlink()


# -- a run that diverges -----------------------------------------------------------------------------


@pytest.mark.parametrize("keep_last", [1, 2])
def test_skipped_steps_push_out_nothing_and_the_advice_works(
    tmp_path: Path, keep_last: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps 7 to 16 are not finite: the last good checkpoint stays, is named, and goes on."""
    keeping = {"every": 1, "keep_last": keep_last}
    with pytest.raises(TrainingStopped) as caught:
        line_trainer(
            tmp_path,
            steps=20,
            checkpoint=keeping,
            factors=lambda number: math.inf if number >= 6 else 1.0,
        ).run()
    text = str(caught.value)
    good = tmp_path / "checkpoints" / step_names(5)[0]  # from 6 on no step was made that went well
    assert "10 in a row" in text and "run.max_bad_steps = 10" in text and "Lower optimizer.lr" in text
    assert text.endswith(f"go on from the last good checkpoint: --resume {good}")
    assert (tmp_path / "model.safetensors").read_text().startswith("step 6 of 20")

    again = line_trainer(tmp_path, steps=20, resume=good, lr=1e-3, checkpoint=keeping)
    assert again.progress.step == 5 and again.run()
    assert records(tmp_path)[-1]["step"] == 20


def test_weights_that_explode_but_stay_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As with a learning rate that is far too high. Saved is all, counted as good and exported is nothing."""
    trainer = line_trainer(
        tmp_path,
        steps=60,
        checkpoint={"every": 5, "keep_last": 2},
        factors=lambda number: 1.0 if number < 41 else 1e3,
    )
    # keep the weights out of it: the loss shall be what the targets make it
    assert not trainer.run(stop_after_micro=58)
    assert names(tmp_path) == step_names(35, 40, 55, 58)
    assert (tmp_path / "model.safetensors").read_text().startswith("step 40 of 60")
    state = json.loads((tmp_path / "checkpoints/step_00000055/state.json").read_text())["progress"]
    assert "usually" in state["health"]["trouble"] and state["good"][-1] == "step_00000040"
    told = capsys.readouterr().err
    assert "training has probably diverged; the last good checkpoint is" in told
    # What is known of the past goes on in the resumed run: the trouble is not taken for usual.
    resumed = line_trainer(tmp_path, steps=60, resume=tmp_path, factors=lambda number: 1e3)
    assert resumed.run()
    assert resumed.health.trouble
    assert (tmp_path / "model.safetensors").read_text().startswith("step 60 of 60")  # the end is exported


def test_a_run_without_a_good_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped, match=r"no good checkpoint to go on from: begin anew in another"):
        line_trainer(tmp_path, steps=20, factors=lambda number: math.inf, run={"max_bad_steps": 3}).run()


def observed(values: list[tuple[float, float]]) -> list[bool]:
    health = Health()
    found = []
    for pair in values:
        health.observe(*pair)
        found.append(bool(health.trouble))
    return found


def test_the_noise_of_a_healthy_run_is_no_trouble() -> None:
    """Losses and norms that differ by factors from step to step, and fall slowly."""
    draw = random.Random(0)
    values = [
        (math.exp(draw.gauss(0, 0.7) - step / 500), math.exp(draw.gauss(0, 0.7) - step / 700))
        for step in range(2000)
    ]
    assert sum(observed(values)) <= 4


@pytest.mark.parametrize("which", [0, 1])
def test_an_explosion_is_seen_and_never_becomes_usual(which: int) -> None:
    draw = random.Random(1)
    quiet = [(math.exp(draw.gauss(0, 0.5)), math.exp(draw.gauss(0, 0.5))) for _ in range(300)]
    loud = [tuple(v * (20 if i == which else 1) for i, v in enumerate(pair)) for pair in quiet]
    found = observed([*quiet, *loud, *quiet])  # type: ignore[list-item]
    assert not any(found[:300])
    assert all(found[310:600])
    assert not any(found[610:])


def test_what_is_not_finite_is_trouble_until_the_next_good_step() -> None:
    assert observed([(1.0, 1.0), (math.nan, 1.0), (1.0, math.inf), (1.0, 1.0)]) == [False, True, True, False]


def test_a_first_step_that_destroys_the_weights_is_seen_at_the_second(tmp_path: Path) -> None:
    """The checkpoint after it is written while everything looks well, and is no good one all the same."""
    trainer = line_trainer(tmp_path, steps=40, checkpoint={"every": 1})

    def step(factor: float) -> None:
        with torch.no_grad():
            trainer.trained["dit.blocks.0.weight"].fill_(1e30)

    trainer.optimizer.step = step  # type: ignore[method-assign]
    with pytest.raises(TrainingStopped, match="no good checkpoint"):
        trainer.run()


def test_a_window_with_a_skipped_step_can_be_saved_and_read(tmp_path: Path) -> None:
    """JSON has no NaN and no infinity: the records come out as if nothing had been interrupted."""

    def trouble(number: int) -> float:
        return {1: math.inf, 2: math.nan}.get(number, 1.0)

    how: dict[str, Any] = {"metrics": {"every": 5}, "factors": trouble}
    assert not line_trainer(tmp_path / "parts", **how).run(stop_after_micro=4)
    assert line_trainer(tmp_path / "parts", resume=tmp_path / "parts", **how).run()
    assert line_trainer(tmp_path / "whole", **how).run()
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    found, expected = (
        load_file(tmp_path / name / "checkpoints/step_00000006/weights.safetensors")
        for name in ("parts", "whole")
    )
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_damaged_lines_of_the_records_are_passed_over(tmp_path: Path) -> None:
    assert not line_trainer(tmp_path).run(stop_after_micro=3)
    path = tmp_path / "metrics.jsonl"
    kept = records(tmp_path)
    rubbish = b'5\n[]\nnull\n{"a": 1}\n{"step": "x"}\n\xff\xfe\n{"step": 2, "lo' + b"[" * 500
    path.write_bytes(rubbish + b"\n" + path.read_bytes())
    assert line_trainer(tmp_path, resume=tmp_path).run()
    assert records(tmp_path)[:3] == kept and len(records(tmp_path)) == 6
    assert not list(tmp_path.glob("*.writing"))
