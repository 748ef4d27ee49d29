"""Optimizers of libraries: going on bit for bit, their averages, what they refuse, what they weigh."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save
from torch import nn
from train_setup import records, run_training, write_run

from hydit_core.errors import ConfigError
from hydit_core.train.config import load_config
from hydit_core.train.optim import parameter_groups
from hydit_core.train.optimizer_kinds import KINDS
from hydit_core.train.optimizers import Optimizers, check_optimizer_here
from hydit_core.train.sections import GroupSection, OptimizerSection

pytest.importorskip("pytorch_optimizer")
pytest.importorskip("torchao")
LIBRARIES = [name for name, kind in KINDS.items() if kind.library]


@pytest.fixture(autouse=True)
def uncompiled():
    """torchao compiles its step, which takes a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 80), nn.LayerNorm(80), nn.Linear(80, 64))


def made(module: nn.Module, config: OptimizerSection) -> Optimizers:
    named = dict(module.named_parameters())
    return Optimizers(parameter_groups(named, config), named, config)


def loss_of(module: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(step))
    return (module(x) - x.flip(-1)).square().mean()


def train(module: nn.Module, optimizers: Optimizers, steps: range) -> None:
    for step in steps:
        loss_of(module, step).backward()
        optimizers.step(min(1.0, (step + 1) / 4))
        module.zero_grad(set_to_none=True)


def test_the_schema_names_what_there_is():
    assert set(typing.get_args(OptimizerSection.model_fields["name"].annotation)) == set(KINDS)


@pytest.mark.parametrize("name", LIBRARIES)
def test_going_on_is_bit_equal(name):
    """Through a file, with numbers and quantised tensors in the state, and two groups."""
    config = OptimizerSection(name=name, weight_decay=0.1)
    whole, first, second = model(), model(), model()
    train(whole, made(whole, config), range(8))
    before = made(first, config)
    train(first, before, range(5))
    second.load_state_dict(first.state_dict())
    after = made(second, config)
    after.load(load(save(before.state())))
    assert before.state().keys() == after.state().keys()
    train(second, after, range(5, 8))
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
        assert not torch.equal(value, first.state_dict()[key]), key


@pytest.mark.parametrize("name", LIBRARIES)
def test_each_learns_with_its_own_defaults(name):
    module = model()
    optimizers = made(module, OptimizerSection(name=name))
    with torch.no_grad():
        start = float(loss_of(module, 0))
    train(module, optimizers, range(150))
    with torch.no_grad():
        assert float(loss_of(module, 0)) < 0.9 * start


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_estimate_counts_what_is_kept(name):
    module = nn.Sequential(nn.Linear(256, 512, bias=False))
    optimizers = made(module, OptimizerSection(name=name))
    (module(torch.ones(1, 256)).sum()).backward()
    optimizers.step(1.0)
    kept = sum(t.numel() * t.element_size() for key, t in optimizers.state().items() if "qmap" not in key)
    count = 256 * 512
    assert KINDS[name].state_bytes * count == pytest.approx(kept, rel=0.03)


def test_schedule_free_in_float64_by_its_paper():
    """Defazio et al. 2024, algorithm 1: y = (1 - b) z + b x, x is their weighted mean."""
    config = OptimizerSection(name="schedule_free", lr=0.1, betas=(0.9, 0.99), eps=1e-8)
    weight = nn.Parameter(torch.tensor([[1.0, -2.0, 0.5]]))
    optimizers = Optimizers(parameter_groups({"w": weight}, config), {"w": weight}, config)
    z = x = weight.detach().double().clone()
    v, total = torch.zeros_like(z), 0.0
    for t in range(1, 8):
        y = 0.1 * z + 0.9 * x
        torch.testing.assert_close(weight.detach().double(), y, rtol=1e-5, atol=1e-6)
        gradient = 2 * y * torch.tensor([[1.0, 3.0, 0.2]])
        weight.grad = 2 * weight.detach() * torch.tensor([[1.0, 3.0, 0.2]])
        optimizers.step(1.0)
        v = 0.99 * v + 0.01 * gradient**2
        z = z - 0.1 * gradient / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
        total += 0.1**2
        x = (1 - 0.1**2 / total) * x + 0.1**2 / total * z
    before = weight.detach().clone()
    with optimizers.averaged():
        torch.testing.assert_close(weight.detach().double(), x, rtol=1e-5, atol=1e-6)
    assert torch.equal(weight, before)


def test_looking_at_the_average_leaves_no_trace():
    config = OptimizerSection(name="schedule_free")
    plain, watched = model(), model()
    train(plain, made(plain, config), range(6))
    optimizers = made(watched, config)
    for step in range(6):
        train(watched, optimizers, range(step, step + 1))
        with pytest.raises(RuntimeError), optimizers.averaged():
            raise RuntimeError
    for key, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[key]), key


@pytest.mark.parametrize("name", ["schedule_free", "prodigy"])
def test_a_run_that_is_interrupted_goes_on_bit_equal(tmp_path, name):
    """And validates and exports what the optimizer averages, if it does."""
    config = write_run(tmp_path)
    text = (
        config.read_text(encoding="utf-8").replace("[ema]\ndecay = 0.95\n", "").replace("lr = 1e-3\n", "", 1)
    )
    config.write_text(text, encoding="utf-8")
    more = [f"optimizer.name={name}", "schedule.kind=constant", "schedule.warmup_steps=2", "run.steps=8"]
    more += ["validation.every=4", "checkpoint.export_dtype=fp32"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_training(config, *more, f"run.output_dir={whole}")
    assert not run_training(config, *more, f"run.output_dir={parts}", stop_after_micro=11)
    assert run_training(config, *more, f"run.output_dir={parts}", resume="auto")
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    looked = [r for r in records(whole) if "val_loss" in r and r["step"]]
    assert len(looked) == 2 and all(r["val_loss"] != r["val_loss_ema"] for r in looked)
    assert looked == [r for r in records(parts) if "val_loss" in r and r["step"]]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.name=adam"], "optimizer.name"),
        (["optimizer.args={d_coef = 2}"], "optimizer.args is for optimizers of libraries; adamw"),
        (["optimizer.name=schedule_free"], "averages the weights itself: leave ema.enabled out"),
        (["optimizer.name=schedule_free", "ema.enabled=false"], "takes the place of a schedule"),
        (
            ["optimizer.name=prodigy", "optimizer.groups=[{match='*', lr_scale=0.5}]"],
            "finds one learning rate for all parameters",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, overrides, words):
    config = write_run(tmp_path)
    config.write_text(config.read_text().replace("[ema]", "[ema]\nenabled = true"), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(config, overrides)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("prodigy", {"d_coeff": 2.0}, "prodigy does not take d_coeff; it takes"),
        ("prodigy", {"lr": 2.0}, "does not take lr"),
        ("prodigy", {"params": 2.0}, "does not take params"),
        ("lion", {"betas": (1.5, 0.9)}, "optimizer.args: lion:"),
        ("adamw_8bit", {"block_size": "many"}, "optimizer.args: adamw_8bit"),
    ],
)
def test_arguments_that_an_optimizer_does_not_take(name, args, words):
    config = OptimizerSection(name=name, args=args)
    with pytest.raises(ConfigError) as caught:
        check_optimizer_here(config)
    assert words in str(caught.value)


def test_a_library_that_is_missing_is_named(monkeypatch):
    from hydit_core.train import optimizer_kinds

    monkeypatch.setattr(optimizer_kinds.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"needs pytorch-optimizer: pip install pytorch-optimizer, or hydit\["
    ):
        made(model(), OptimizerSection(name="prodigy"))


def test_other_groups_than_the_checkpoints_are_refused():
    config = OptimizerSection(name="prodigy", weight_decay=0.1)
    module = model()
    before = made(module, config)
    train(module, before, range(2))
    other = OptimizerSection(
        name="prodigy", weight_decay=0.1, groups=(GroupSection(match="0.weight", weight_decay=0.5),)
    )
    with pytest.raises(ConfigError, match="written with 2 groups of parameters, these are 3"):
        made(module, other).load(before.state())


def test_own_defaults_give_way_to_what_is_written(tmp_path: Path):
    config = write_run(tmp_path)
    assert load_config(config, ["optimizer.name=prodigy"]).optimizer.lr == 1e-3
    assert OptimizerSection.model_validate({"name": "prodigy"}).lr == 1.0
    assert OptimizerSection.model_validate({"name": "lion"}).betas == (0.9, 0.99)
    assert OptimizerSection.model_validate({"name": "lion", "betas": [0.5, 0.6]}).betas == (0.5, 0.6)


def test_records_have_the_rate_that_prodigy_found(tmp_path: Path) -> None:
    """It begins with ``d0`` and only grows."""
    sets = ["optimizer.name=prodigy", "optimizer.lr=1.0", "optimizer.args={d0=2e-4}"]
    sets += ["run.steps=3", "metrics.every=1"]
    sets += ["objective.train_text_encoders=false", "ema.enabled=false", "validation.every=0"]
    sets += ["schedule.kind=constant", "schedule.warmup_steps=0", f"run.output_dir={tmp_path / 'run'}"]
    assert run_training(write_run(tmp_path), *sets)
    rates = [record["lr"] for record in records(tmp_path / "run") if "lr" in record]
    assert len(rates) == 3 and rates[0] == pytest.approx(2e-4) and sorted(rates) == rates and rates[-1] < 0.1
