"""The noise schedule: golden values, conversions, and the timesteps of every spacing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from hydit_core.diffusion.schedule import SPACINGS, Schedule
from hydit_core.errors import ConfigError
from hydit_core.facts import DiffusionConfig

# beta_end -> alphas_cumprod at these timesteps, then the lowest and the highest sigma
GOLDEN_T = (0, 250, 500, 750, 901, 961, 981, 999)
GOLDEN = {
    0.018: (
        (0.99915, 0.6287467, 0.19037574, 0.01953742, 2.51964e-3, 9.48580e-4, 6.70015e-4, 4.85278e-4),
        (0.0291672, 45.3836),
    ),
    0.02: (
        (0.99915, 0.6152992, 0.16890635, 0.01384092, 1.43364e-3, 4.84575e-4, 3.29259e-4, 2.30013e-4),
        (0.0291672, 65.9287),
    ),
    0.03: (
        (0.99915, 0.5560484, 0.09486446, 0.00255377, 8.84840e-5, 1.74130e-5, 9.73763e-6, 5.67216e-6),
        (0.0291672, 419.879),
    ),
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.018, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    return Schedule(DiffusionConfig())


@pytest.mark.parametrize("beta_end", GOLDEN)
def test_golden_values(beta_end):
    schedule = Schedule(DiffusionConfig(beta_end=beta_end))
    alphas, (low, high) = GOLDEN[beta_end]
    assert schedule.alphas_cumprod.dtype == torch.float64
    # The table above is rounded to 6 digits.
    assert schedule.alphas_cumprod[list(GOLDEN_T)].tolist() == pytest.approx(alphas, rel=3e-6)
    assert schedule.sigmas[0].item() == pytest.approx(low, rel=3e-6)
    assert schedule.sigmas[-1].item() == pytest.approx(high, rel=3e-6)


@pytest.mark.parametrize("beta_end", [0.018, 0.03])
def test_tables_equal_diffusers(beta_end):
    schedule = Schedule(DiffusionConfig(beta_end=beta_end))
    theirs = DDPMScheduler(**{**BETAS, "beta_end": beta_end})
    assert schedule.betas.numpy() == pytest.approx(theirs.betas.numpy(), rel=1e-5)
    assert schedule.alphas_cumprod.numpy() == pytest.approx(theirs.alphas_cumprod.numpy(), rel=1e-4)


def test_add_noise_equals_diffusers(schedule):
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 6, 4, 8, 8, generator=g)
    t = torch.tensor([0, 1, 250, 500, 901, 999])
    ours = schedule.add_noise(x0, noise, t)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, DDPMScheduler(**BETAS).add_noise(x0, noise, t), atol=1e-5)


def test_each_timestep_comes_back_from_its_sigma(schedule):
    for beta_end in (0.018, 0.03):
        schedule = Schedule(DiffusionConfig(beta_end=beta_end))
        t = torch.arange(1000)
        # in the precision that samplers and hosts carry sigmas in
        back = schedule.sigma_to_t(schedule.sigmas.float())
        assert back.dtype == torch.float32
        assert torch.equal(back, t.float())
        assert schedule.t_to_sigma(t).numpy() == pytest.approx(schedule.sigmas.numpy(), rel=1e-12)


def test_sigmas_between_timesteps(schedule):
    low, high = schedule.sigmas[400].item(), schedule.sigmas[401].item()
    assert schedule.t_to_sigma(400.5).item() == pytest.approx((low * high) ** 0.5, rel=1e-12)
    nearer = torch.tensor([low**0.6 * high**0.4, low**0.4 * high**0.6])
    assert schedule.sigma_to_t(nearer).tolist() == [400, 401]
    assert schedule.sigma_to_t(torch.tensor([1e-4, 1e4])).tolist() == [0, 999]


SCHEDULERS = {
    "leading": [
        DDPMScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        DDIMScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
    ],
    "linspace": [DPMSolverMultistepScheduler(**BETAS)],
    "trailing": [
        DDPMScheduler(**BETAS, timestep_spacing="trailing"),
        DPMSolverMultistepScheduler(**BETAS, timestep_spacing="trailing"),
    ],
}


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_equal_diffusers_for_every_count(schedule, spacing):
    for scheduler in SCHEDULERS[spacing]:
        for steps in [*range(1, 130), 150, 200, 250, 333, 500, 999]:
            scheduler.set_timesteps(steps)
            ours = schedule.timesteps(spacing, steps)
            assert ours.dtype == torch.int64
            # For some counts diffusers' arange yields one element too many, the timestep -1.
            expected = [t for t in scheduler.timesteps.tolist() if t >= 0]
            assert ours.tolist() == expected, (type(scheduler).__name__, steps)


def test_timesteps_that_tencent_runs(schedule):
    assert schedule.timesteps("leading", 10).tolist() == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert schedule.timesteps("leading", 25)[[0, -1]].tolist() == [961, 1]
    assert schedule.timesteps("leading", 50)[[0, -1]].tolist() == [981, 1]
    assert schedule.timesteps("leading", 100)[[0, -1]].tolist() == [991, 1]
    expected = [999, 899, 799, 699, 599, 500, 400, 300, 200, 100]
    assert schedule.timesteps("linspace", 10).tolist() == expected


@pytest.mark.parametrize("spacing", SPACINGS)
def test_sigmas_of_a_run(schedule, spacing):
    sigmas = schedule.sigmas_for(spacing, 20)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (21,)
    assert sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    t = schedule.timesteps(spacing, 20)
    abar = schedule.alphas_cumprod[t].numpy()
    assert sigmas[:-1].numpy() == pytest.approx(np.sqrt(1 / abar - 1), rel=1e-6)


def test_strength_keeps_the_last_steps(schedule):
    whole = schedule.sigmas_for("leading", 50)
    assert torch.equal(schedule.sigmas_for("leading", 50, 0.3), whole[-16:])
    assert torch.equal(schedule.sigmas_for("leading", 50, 1.0), whole)
    assert len(schedule.sigmas_for("leading", 50, 0.02)) == 2


def test_refusals_say_what_to_use(schedule):
    with pytest.raises(ConfigError, match=r"unknown spacing 'karras': use one of leading"):
        schedule.timesteps("karras", 10)
    with pytest.raises(ConfigError, match=r"1000 steps with 'leading' spacing: use 1 to 999"):
        schedule.timesteps("leading", 1000)
    with pytest.raises(ConfigError, match=r"0 steps"):
        schedule.timesteps("linspace", 0)
    assert schedule.timesteps("trailing", 1000).tolist() == list(range(999, -1, -1))
    with pytest.raises(ConfigError, match=r"strength 0.01 of 50 steps leaves no step: use at least 0.02"):
        schedule.sigmas_for("leading", 50, 0.01)
    for steps in range(1, 1000):  # the advice works: 0.333 of 3 steps would again leave none
        with pytest.raises(ConfigError, match="use at least ") as refused:
            schedule.sigmas_for("leading", steps, 1e-9)
        assert len(schedule.sigmas_for("leading", steps, float(str(refused.value).split()[-1]))) == 2
    for strength in (0.0, 1.5):
        with pytest.raises(ConfigError, match="strength"):
            schedule.sigmas_for("leading", 50, strength)
