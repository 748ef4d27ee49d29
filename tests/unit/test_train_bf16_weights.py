"""Training of weights that are kept in bf16, with updates that are rounded at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from train_setup import records, run_training, write_run

from hydit_core.data.order import hash_int
from hydit_core.errors import ConfigError
from hydit_core.train import loop
from hydit_core.train.config import load_config
from hydit_core.train.memory import MemoryEstimate, of_run
from hydit_core.train.optim import Group, in_blocks
from hydit_core.train.optimizers import Optimizers
from hydit_core.train.parallel.fit import plan
from hydit_core.train.parts import build
from hydit_core.train.sections import OptimizerSection

pytest.importorskip("torchao")
CHOSEN = [
    "optimizer.name=adamw_8bit",
    "run.weights=bf16",
    "run.precision=bf16",
    "objective.train_text_encoders=false",
]


@pytest.fixture(autouse=True)
def uncompiled() -> Any:
    """torchao compiles its step, which takes a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def trained(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").glob("step_*"))
    return load_file(newest / "weights.safetensors")


def needed(config: Path, *changed: str) -> MemoryEstimate:
    settings = load_config(config, [*CHOSEN, *changed])
    parts = build(settings)
    return of_run(settings, parts.dit, parts.text, (64, 64))


def test_updates_below_the_spacing_of_bf16_are_not_lost() -> None:
    """Numbers below 1 are 2^-8 apart in bf16: rounded to the nearest, each of 60 steps of 10^-4 is lost."""
    weight = nn.Parameter(torch.full((64, 80), 0.9, dtype=torch.bfloat16))
    start = weight.detach().float()
    config = OptimizerSection(name="adamw_8bit", lr=1e-4, weight_decay=0.0)
    optimizers = Optimizers([Group(("w",), 1.0, 0.0)], {"w": weight}, config)
    torch.manual_seed(0)
    for _ in range(60):
        weight.grad = torch.ones_like(weight)
        optimizers.step(1.0)
    assert weight.dtype == torch.bfloat16
    assert float((start - weight.detach().float()).mean()) == pytest.approx(60 * 1e-4, rel=0.05)


def test_a_run_goes_on_bit_equal_and_learns_like_one_in_fp32(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    more = [*CHOSEN, "run.steps=4", "schedule.warmup_steps=2", "checkpoint.export_dtype=fp32"]
    whole, parts, other = (tmp_path / name for name in ("whole", "parts", "other"))
    assert run_training(config, *more, f"run.output_dir={whole}")
    assert not run_training(config, *more, f"run.output_dir={parts}", stop_after_micro=5)
    assert run_training(config, *more, f"run.output_dir={parts}", resume="auto")
    one, again = trained(whole), trained(parts)
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    assert {in_blocks(name, value) for name, value in one.items()} == {True, False}
    for name, value in one.items():
        assert value.dtype == (torch.bfloat16 if in_blocks(name, value) else torch.float32), name

    assert run_training(config, *more, "run.weights=fp32", f"run.output_dir={other}")
    losses = [[r["loss"] for r in records(folder) if "loss" in r] for folder in (whole, other)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    exported = [load_file(folder / "model.safetensors") for folder in (whole, other)]
    assert {name: value.dtype for name, value in exported[0].items()} == {
        name: value.dtype for name, value in exported[1].items()
    }


def test_all_processes_round_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise their copies of the model would part. Another one draws other numbers in its forwards."""
    config = write_run(tmp_path)
    more = [*CHOSEN, "run.steps=2", "schedule.warmup_steps=0"]
    assert run_training(config, *more, f"run.output_dir={tmp_path / 'first'}")

    def of_another(*values: Any) -> int:
        return hash_int(*values, "rank 1") if values[-1] == "global" else hash_int(*values)

    monkeypatch.setattr(loop, "hash_int", of_another)
    assert run_training(config, *more, f"run.output_dir={tmp_path / 'second'}")
    one, other = trained(tmp_path / "first"), trained(tmp_path / "second")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_estimate_counts_what_is_kept(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    assert run_training(config, *CHOSEN, "run.steps=1", "schedule.warmup_steps=0")
    kept = trained(tmp_path / "run")
    need, in_fp32 = needed(config), needed(config, "run.weights=fp32")
    assert need.weights == need.gradients == sum(t.numel() * t.element_size() for t in kept.values())
    assert need.average == 4 * sum(t.numel() for t in kept.values())
    matrices = sum(t.numel() for t in kept.values() if t.dtype == torch.bfloat16)
    assert in_fp32.weights - need.weights == 2 * matrices
    assert in_fp32.activations - need.activations == 2 * matrices  # autocast's copies


def test_it_is_not_split(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    need = needed(config)
    chosen = plan(load_config(config, CHOSEN), 2, 1, lambda ranks: need)
    assert chosen.kind == "ddp" and "run.weights = 'bf16' needs whole tensors" in chosen.why


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("optimizer.name=adamw", "needs an optimizer that rounds its updates at random"),
        ("run.precision=fp32", "set run.precision = 'bf16', too"),
        ("run.parallel=fsdp", "run.parallel"),
        ("run.weights=fp16", "run.weights"),
    ],
)
def test_what_it_does_not_go_with_is_refused(tmp_path: Path, changed: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write_run(tmp_path), [*CHOSEN, changed])
    assert words in str(caught.value)
