"""Parameter groups, learning rates, averages."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from train_setup import needs_muon

from hydit_core.errors import ConfigError
from hydit_core.train.optim import Ema, learning_rate_factor, parameter_groups
from hydit_core.train.optimizers import Optimizers
from hydit_core.train.sections import EmaSection, GroupSection, OptimizerSection, ScheduleSection


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"dit": nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4))})}
    )


def named(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters())


def test_groups_scale_freeze_and_decay() -> None:
    config = OptimizerSection(
        weight_decay=0.1,
        groups=(
            GroupSection(match="dit.blocks.0.*", lr_scale=0.5),
            GroupSection(match=r"re:blocks\.2\.bias$", freeze=True),
            GroupSection(match="dit.blocks.2.*", weight_decay=0.3),
        ),
    )
    groups = parameter_groups(named(model()), config)
    found = {name: (g.lr_scale, g.weight_decay) for g in groups for name in g.names}
    assert found == {
        "dit.blocks.0.weight": (0.5, 0.1),
        "dit.blocks.0.bias": (0.5, 0.0),
        "dit.blocks.1.weight": (1.0, 0.0),
        "dit.blocks.1.bias": (1.0, 0.0),
        "dit.blocks.2.weight": (1.0, 0.3),
    }


def test_a_pattern_without_parameters_is_refused() -> None:
    config = OptimizerSection(groups=(GroupSection(match="dit.block.*", freeze=True),))
    with pytest.raises(ConfigError, match=r"no parameter matches 'dit\.block\.\*'.*dit\.blocks"):
        parameter_groups(named(model()), config)
    with pytest.raises(ConfigError, match="nothing to train"):
        parameter_groups(named(model()), OptimizerSection(groups=(GroupSection(match="*", freeze=True),)))


def train(module: nn.Module, optimizers: Optimizers, steps: range) -> None:
    for step in steps:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        module["dit"]["blocks"](x).square().sum().backward()
        optimizers.step(1.0)
        module.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", ["adamw", needs_muon("muon")])
def test_state_by_name_continues_bit_equal(name: str) -> None:
    config = OptimizerSection(name=name, lr=1e-2, weight_decay=0.1)
    whole = model()
    train(whole, Optimizers(parameter_groups(named(whole), config), named(whole), config), range(6))

    first = model()
    before = Optimizers(parameter_groups(named(first), config), named(first), config)
    train(first, before, range(3))
    second = model()
    second.load_state_dict(first.state_dict())
    # Another order of groups: the state must find its parameters by name.
    after = Optimizers(parameter_groups(named(second), config)[::-1], named(second), config)
    after.load({key: value.clone() for key, value in before.state().items()})
    train(second, after, range(3, 6))
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def test_adamw_is_torchs() -> None:
    config = OptimizerSection(lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    ours, theirs = model(), model()
    train(ours, Optimizers(parameter_groups(named(ours), config), named(ours), config), range(4))
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2, betas=(0.8, 0.95), eps=1e-6, foreach=False,
    )  # fmt: skip
    for step in range(4):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        theirs["dit"]["blocks"](x).square().sum().backward()
        reference.step()
        theirs.zero_grad()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-6, atol=1e-7)


def test_learning_rate_schedules() -> None:
    cosine = ScheduleSection(kind="cosine", warmup_steps=10, decay_start=0.6, min_lr=0.1)
    values = [learning_rate_factor(step, 100, cosine) for step in range(101)]
    assert values[0] == pytest.approx(0.1) and values[9] == pytest.approx(1.0)
    assert values[10:61] == [1.0] * 51
    assert values[80] == pytest.approx(0.1 + 0.9 * 0.5)
    assert values[90] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.75)))
    assert values[100] == pytest.approx(0.1)
    linear = ScheduleSection(kind="linear")
    assert [learning_rate_factor(s, 4, linear) for s in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert learning_rate_factor(10**6, 10, ScheduleSection()) == 1.0


def test_average_follows_tencents_power_warmup() -> None:
    parameter = nn.Parameter(torch.tensor([0.0], dtype=torch.float64))
    ema = Ema({"p": parameter}, EmaSection(decay=0.9, power=2 / 3))
    expected = 0.0
    for n in range(1, 40):
        parameter.data.fill_(float(n))
        ema.update()
        decay = min(0.9, 1 - (1 + n) ** (-2 / 3))
        expected = decay * expected + (1 - decay) * n
    assert float(ema.average["p"]) == pytest.approx(expected, rel=1e-5)
    assert ema.average["p"].dtype == torch.float32
    assert ema.decay(1) == pytest.approx(1 - 2 ** (-2 / 3)) and ema.decay(1000) == 0.9
    assert Ema({"p": parameter}, EmaSection(decay=0.9, warmup=False)).decay(1) == 0.9


def test_swapped_average_leaves_the_weights_as_they_were() -> None:
    parameter = nn.Parameter(torch.tensor([0.1, 0.7]))
    ema = Ema({"p": parameter}, EmaSection(decay=0.5, warmup=False))
    parameter.data.add_(1 / 3)
    ema.update()
    before = parameter.detach().clone()
    with pytest.raises(RuntimeError), ema.swapped():
        assert torch.equal(parameter, ema.average["p"]) and not torch.equal(parameter, before)
        raise RuntimeError
    assert torch.equal(parameter, before)
