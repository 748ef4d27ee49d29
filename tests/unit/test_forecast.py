"""Forecasts in the place of network calls: which calls are real, and what the others answer."""

from __future__ import annotations

import itertools

import pytest
import torch

from hydit_core.diffusion.forecast import FORECASTS, Forecaster, tolerance_of
from hydit_core.diffusion.samplers import SAMPLERS, sample_ddim, sample_ddpm, sample_dpmpp_2m, start_latents
from hydit_core.diffusion.schedule import Schedule
from hydit_core.errors import ConfigError
from hydit_core.facts import DiffusionConfig

SHAPE = (2, 4, 6, 5)
SIGMAS = Schedule(DiffusionConfig()).sigmas_for("linspace", 50)
SAFE, FAST = FORECASTS["safe"], FORECASTS["fast"]


def noise(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Model:
    """A denoiser that notes the levels that it is called at."""

    def __init__(self, answer):
        self.answer = answer
        self.levels = []

    def __call__(self, x, sigma, **extra):
        self.levels.append(float(sigma[0]))
        return self.answer(x, sigma.view(-1, 1, 1, 1))

    def steps(self, sigmas=SIGMAS):
        return [int((sigmas - level).abs().argmin()) for level in self.levels]


def normal(x, sigma):
    """The exact denoiser of normal data with mean 0.7 and standard deviation 0.5."""
    return (0.7 * sigma**2 + x * 0.25) / (sigma**2 + 0.25)


def straight(x, sigma):
    """Results that do not depend on x and lie on a line over the noise level."""
    return noise(8, x.shape) + 0.01 * sigma * noise(9, x.shape)


def restless(x, sigma):
    """Nothing can be foretold of this."""
    return torch.sin(40 * torch.log(sigma)).expand(x.shape)


def run(answer, tolerance, sampler=sample_dpmpp_2m, sigmas=SIGMAS, shape=SHAPE, **options):
    model = Model(answer)
    forecaster = Forecaster(model, sigmas, tolerance)
    x = start_latents(noise(1, shape), sigmas)
    return sampler(forecaster, x, sigmas, {"seed": 1}, disable=True, **options), model, forecaster


PATTERNS = {
    SAFE: {*range(15), *range(14, 25, 2), *range(28, 42, 4), 42, 44, 46, 48, 49},
    FAST: {*range(6), *range(5, 20, 2), *range(19, 44, 4), 45, 47, 48, 49},
    0.2: {*range(4), *range(3, 20, 3), *range(18, 44, 5), 45, 47, 48, 49},
}
"""Of 50 steps those that are real whatever the results are."""


@pytest.mark.parametrize("name", SAMPLERS)
def test_off_is_the_model_itself(name):
    out, model, forecaster = run(normal, 0.0, SAMPLERS[name])
    x = start_latents(noise(1), SIGMAS)
    plain = SAMPLERS[name](Model(normal), x, SIGMAS, {"seed": 1}, disable=True)
    assert torch.equal(out, plain)
    assert len(model.levels) == forecaster.real == forecaster.calls == 50


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("tolerance", PATTERNS)
def test_results_on_a_line_are_foretold(name, tolerance):
    """The picture is that of the full run, the noise of ddpm included, from few calls."""
    out, model, forecaster = run(straight, tolerance, SAMPLERS[name])
    full = run(straight, 0.0, SAMPLERS[name])[0]
    assert torch.allclose(out, full, atol=2e-5)
    assert set(model.steps()) == PATTERNS[tolerance]
    assert (forecaster.calls, forecaster.real) == (50, len(model.levels))


def test_each_forecast_is_on_the_line():
    def steep(x, sigma):
        return noise(8, x.shape) + sigma * noise(9, x.shape)

    answers = []
    model = run(steep, 0.2, callback=lambda state: answers.append(state["denoised"].clone()))[1]
    assert len(model.levels) < 25
    for sigma, answer in zip(SIGMAS, answers, strict=False):
        torch.testing.assert_close(answer, steep(answer, sigma), atol=1e-4, rtol=1e-5)


def test_the_noise_of_a_run_is_the_same_with_and_without():
    def drawn(tolerance):
        seen = []
        run(normal, tolerance, sample_ddpm, noise_sampler=lambda *at: seen.append(at) or noise(3))
        return seen

    assert drawn(FAST) == drawn(0.0) != []


def test_forecasts_are_as_good_as_promised():
    """Of smooth data, with a denoiser that looks at x: nearer to the full run than as many plain steps."""
    full = run(normal, 0.0, sample_ddim)[0]
    out, model, _ = run(normal, FAST, sample_ddim)
    fewer = Schedule(DiffusionConfig()).sigmas_for("linspace", len(model.levels))
    plain = run(normal, 0.0, sample_ddim, fewer)[0]
    assert len(model.levels) < 25
    assert (out - full).abs().max() < 0.2 * (plain - full).abs().max()


def test_where_nothing_can_be_foretold_calls_are_added():
    steps = run(restless, SAFE)[1].steps()
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 4
    assert steps[:15] == [*range(15)] and steps[-1] == 49
    assert len(steps) > len(PATTERNS[SAFE]) + 10


def test_a_lower_tolerance_takes_more_calls():
    counts = [len(run(normal, tolerance)[1].levels) for tolerance in (0.3, FAST, SAFE, 1e-4, 1e-7)]
    assert counts == sorted(counts) and counts[0] < 20 and counts[-1] == 50


def test_an_error_counts_as_much_as_it_moves_x():
    """The result jumps by 0.05, and nothing else is wrong: a step that goes 2 % of the way, one of 60 %."""
    steady = torch.cat([torch.linspace(20, 10, 40), torch.tensor([0.0])])

    def real(sigmas, step):
        jump = Model(lambda x, sigma: ((sigma < sigmas[step] + 0.01) * 0.05).expand(x.shape))
        sample_ddim(Forecaster(jump, sigmas, SAFE), noise(1), sigmas, disable=True)
        return jump.steps(sigmas)

    calm = real(steady, 0)
    step = calm[-4]
    assert 30 < step < 38 and step + 1 not in calm and real(steady, step) == calm
    steep = torch.cat([steady[: step + 1], steady[step + 1 :] * 0.4])
    assert step + 1 in real(steep, step)


def test_the_worst_picture_of_a_batch_decides():
    def one_restless(x, sigma):
        return torch.cat([straight(x[:1], sigma[:1]), restless(x[1:], sigma[1:])])

    def steps(answer, shape=SHAPE):
        return run(answer, SAFE, shape=shape)[1].steps()

    assert steps(one_restless) == steps(restless) != steps(straight)


def test_every_run_starts_afresh():
    """Another run at its first level, another shape, and noise that was added again in the middle."""
    model = Model(normal)
    forecaster = Forecaster(model, SIGMAS, FAST)
    x = start_latents(noise(1), SIGMAS)
    first = sample_dpmpp_2m(forecaster, x, SIGMAS, disable=True)
    took = forecaster.real, list(model.levels)
    assert torch.equal(sample_dpmpp_2m(forecaster, x, SIGMAS, disable=True), first)
    assert (forecaster.real, model.levels[took[0] :]) == took

    def stop(state):
        if state["i"] == 30:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sample_dpmpp_2m(forecaster, x, SIGMAS, callback=stop, disable=True)
    assert torch.equal(sample_dpmpp_2m(forecaster, x, SIGMAS, disable=True), first)
    one = x[:1, :, :3]
    forecaster(x, SIGMAS[30] * torch.ones(2))
    before = len(model.levels)
    assert forecaster(one, SIGMAS[31] * torch.ones(1)).shape == one.shape and len(model.levels) > before


def test_noise_that_is_added_again_is_no_longer_the_same_run():
    model = Model(straight)
    forecaster = Forecaster(model, SIGMAS, FAST)
    x, ones = noise(1), torch.ones(2)
    for step in [*range(30), 20, 21]:
        forecaster(x, SIGMAS[step] * ones)
    assert model.steps()[-2:] == [20, 21]


def test_what_a_sampler_does_to_results_does_not_reach_the_forecasts():
    def spoil(state):
        state["denoised"].zero_()

    model = Model(straight)
    forecaster = Forecaster(model, SIGMAS, FAST)
    sample_dpmpp_2m(forecaster, noise(1), SIGMAS, callback=spoil, disable=True)
    assert set(model.steps()) == PATTERNS[FAST]
    x = noise(1)
    forecast = [forecaster(x, SIGMAS[step] * torch.ones(2)) for step in range(8)][-1]
    assert torch.allclose(forecast, straight(x, SIGMAS[7]), atol=1e-4)


def test_a_result_that_is_not_finite_can_be_asked_for_again():
    model = Model(lambda x, sigma: straight(x, sigma) / (sigma > SIGMAS[23].item() - 0.01))
    forecaster = Forecaster(model, SIGMAS, FAST)
    x, ones = noise(1), torch.ones(2)
    results = [forecaster(x, SIGMAS[step] * ones).isfinite().all() for step in range(28)]
    assert all(results[:27]) and not results[27] and model.steps()[-1] == 27
    assert not forecaster(x, SIGMAS[27] * ones).isfinite().all() and model.steps()[-2:] == [27, 27]


def heun(model, x, sigmas, extra_args=None, disable=None):
    """Two evaluations a step (Karras et al. 2022, algorithm 1)."""
    ones = torch.ones(len(x))
    for now, then in itertools.pairwise(sigmas.tolist()):
        slope = (x - model(x, now * ones)) / now
        moved = x + slope * (then - now)
        if then > 0:
            slope = (slope + (moved - model(moved, then * ones)) / then) / 2
        x = x + slope * (then - now)
    return x


def midpoint(model, x, sigmas, extra_args=None, disable=None):
    """One more evaluation between two levels, as in DPM-Solver-2 and its stochastic relatives."""
    ones = torch.ones(len(x))
    for now, then in itertools.pairwise(sigmas.tolist()):
        slope = (x - model(x, now * ones)) / now
        if then > 0:
            middle = (now * then) ** 0.5
            moved = x + slope * (middle - now)
            slope = (moved - model(moved, middle * ones)) / middle
        x = x + slope * (then - now)
    return x


@pytest.mark.parametrize("sampler", [heun, midpoint])
def test_samplers_with_two_evaluations_a_step(sampler):
    full = run(normal, 0.0, sampler)[0]
    out, model, forecaster = run(normal, FAST, sampler)
    assert forecaster.calls == 99 and len(model.levels) == forecaster.real < 55
    assert (out - full).abs().max() < 0.05 * full.std()
    assert torch.allclose(run(straight, FAST, sampler)[0], run(straight, 0.0, sampler)[0], atol=2e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_short_runs(steps):
    sigmas = Schedule(DiffusionConfig()).sigmas_for("linspace", steps)
    out, model, _ = run(normal, 1.0, sigmas=sigmas)
    assert torch.isfinite(out).all() and len(model.levels) >= min(steps, 4)


def test_levels_that_come_twice_are_one_step():
    """More steps than the model has noise levels."""
    sigmas = torch.cat([SIGMAS[:20].repeat_interleave(2), SIGMAS[20:]])
    out, model, _ = run(straight, FAST, sigmas=sigmas)
    assert torch.allclose(out, run(straight, 0.0, sigmas=sigmas)[0], atol=2e-5)
    assert len(model.levels) < 45


def test_tolerances():
    assert tolerance_of("off") == 0 < tolerance_of("safe") < tolerance_of("fast")
    assert tolerance_of("0.02") == tolerance_of(0.02) == 0.02
    for bad in ("quick", "", "nan", "inf", -0.1, 1.5, None):
        with pytest.raises(ConfigError, match=r"use off, safe, fast, or a tolerance from 0 \(off\) to 1"):
            tolerance_of(bad)
