"""Denoiser, guidance and samplers: the contract with networks, hosts and random generators."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from hydit_core.diffusion.denoiser import Denoiser
from hydit_core.diffusion.guidance import GuidedDenoiser, guide
from hydit_core.diffusion.samplers import (
    DEFAULT_SPACING,
    SAMPLERS,
    default_noise_sampler,
    draw_noise,
    noise_sampler_from,
    sample_ddim,
    sample_ddpm,
    start_latents,
)
from hydit_core.diffusion.schedule import SPACINGS, Schedule
from hydit_core.errors import ConfigError
from hydit_core.facts import DiffusionConfig

SHAPE = (2, 4, 6, 5)
MEAN, STD = 0.7, 0.5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(seed: int = 0, shape=SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    return Schedule(DiffusionConfig())


def oracle(x: torch.Tensor, sigma: torch.Tensor, **extra) -> torch.Tensor:
    """The exact denoiser of data that is normal with MEAN and STD: E[x0 | x]."""
    variance = sigma.view(-1, 1, 1, 1) ** 2
    return (MEAN * variance + x * STD**2) / (variance + STD**2)


# -- denoiser


def output_for(prediction: str, x0, noise, alpha, sigma):
    return {"v": alpha * noise - sigma * x0, "epsilon": noise, "sample": x0}[prediction]


@pytest.mark.parametrize("prediction", ["v", "epsilon", "sample"])
def test_a_perfect_network_recovers_the_picture(schedule, prediction):
    x0, noise = latents(1), latents(2)
    t = torch.tensor([801, 301])
    alpha = schedule.alphas_cumprod[t].sqrt().float().view(2, 1, 1, 1)
    sigma = (1 - schedule.alphas_cumprod[t]).sqrt().float().view(2, 1, 1, 1)
    seen = {}

    def network(x_t, t):
        seen.update(x_t=x_t, t=t)
        variance = torch.full_like(x0, 1e6)  # must not be looked at
        return torch.cat([output_for(prediction, x0, noise, alpha, sigma), variance], dim=1)

    x = x0 + schedule.sigmas[t].float().view(2, 1, 1, 1) * noise
    denoised = Denoiser(network, schedule, prediction)(x, schedule.sigmas[t].float(), seed=3)
    assert torch.allclose(denoised, x0, atol=1e-4)
    assert torch.allclose(seen["x_t"], schedule.add_noise(x0, noise, t), atol=1e-6)
    assert seen["t"].tolist() == [801, 301] and seen["t"].dtype == torch.float32


def test_prediction_comes_from_the_config_and_is_checked(schedule):
    config = DiffusionConfig(prediction="sample")
    answer = latents(1)
    model = Denoiser(lambda x, t: answer, Schedule(config))
    assert torch.equal(model(latents(2), torch.tensor([3.0, 3.0])), answer)
    with pytest.raises(ConfigError, match="unknown prediction 'flow'"):
        Denoiser(lambda x, t: x, schedule, "flow")(latents(), torch.tensor([3.0, 3.0]))


def test_half_precision_network_is_computed_with_in_float32(schedule):
    model = GuidedDenoiser(lambda x, t: x.to(torch.bfloat16), schedule, 6.0, 0.5)
    assert model(latents(), torch.tensor([3.0, 3.0])).dtype == torch.float32


# -- guidance


def test_guidance_formula_and_rescale():
    uncond, cond = latents(1), 2 * latents(2)
    plain = guide(uncond, cond, 5.0)
    assert torch.allclose(plain, 5 * cond - 4 * uncond, atol=1e-5)
    full = guide(uncond, cond, 5.0, 1.0)
    assert torch.allclose(full.flatten(1).std(1), cond.flatten(1).std(1), rtol=1e-5)
    factor = cond[1].std() / plain[1].std()
    assert torch.allclose(guide(uncond, cond, 5.0, 0.3)[1], plain[1] * (0.3 * factor + 0.7), rtol=1e-5)


def test_guidance_is_one_call_with_unconditional_rows_first(schedule):
    calls = []

    def network(x_t, t, offset):
        calls.append((x_t, t))
        return x_t + offset

    x = latents(1)
    sigma = schedule.sigmas[torch.tensor([500, 100])].float()
    offset = torch.tensor([0.0, 0.0, 1.0, 2.0]).view(4, 1, 1, 1)
    guided = GuidedDenoiser(network, schedule, 3.0)(x, sigma, offset=offset)
    assert len(calls) == 1
    x_t, t = calls[0]
    assert torch.equal(x_t[:2], x_t[2:]) and t.tolist() == [500, 100, 500, 100]
    single = Denoiser(lambda x_t, t: x_t + 3.0 * offset[2:], schedule)(x, sigma)
    assert torch.allclose(guided, single, atol=1e-6)


# -- samplers


def consistency(x: torch.Tensor, sigma: torch.Tensor, **extra) -> torch.Tensor:
    """Where the probability flow of the same data ends: what a distilled network answers."""
    variance = sigma.view(-1, 1, 1, 1) ** 2
    return MEAN + (x - MEAN) * STD / (variance + STD**2).sqrt()


@pytest.mark.parametrize("name, steps", [*((name, 500) for name in SAMPLERS), ("lcm", 1), ("lcm", 4)])
def test_samplers_draw_from_the_data_distribution(schedule, name, steps):
    """With an exact network every sampler must produce the distribution of the data."""
    x = latents(1, (8, 4, 16, 16))
    sigmas = schedule.sigmas_for(DEFAULT_SPACING[name], steps)
    network = consistency if name == "lcm" else oracle
    out = SAMPLERS[name](network, start_latents(x, sigmas), sigmas, extra_args={"seed": 1}, disable=True)
    assert out.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert out.std().item() == pytest.approx(STD, rel=0.03)


@pytest.mark.parametrize("name", SAMPLERS)
def test_signature_is_what_hosts_call(name):
    parameters = list(inspect.signature(SAMPLERS[name]).parameters)
    expected = ["model", "x", "sigmas", "extra_args", "callback", "disable", "noise_sampler"]
    assert parameters[: len(expected)] == expected
    assert DEFAULT_SPACING[name] in SPACINGS


@pytest.mark.parametrize("name", SAMPLERS)
def test_callback_sees_every_step_and_may_interrupt(schedule, name):
    sigmas = schedule.sigmas_for("leading", 5)
    x = start_latents(latents(), sigmas)
    before = x.clone()
    seen = []
    SAMPLERS[name](oracle, x, sigmas, {"seed": 0}, callback=seen.append, disable=True)
    assert torch.equal(x, before), "the caller's tensor was written to"
    assert [s["i"] for s in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(torch.stack([s["sigma"] for s in seen]), sigmas[:-1])
    for state in seen:
        assert state["sigma_hat"] == state["sigma"]
        expected = oracle(state["x"], state["sigma"].expand(2))
        assert torch.equal(state["denoised"], expected)

    def stop(state):
        if state["i"] == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        SAMPLERS[name](oracle, x, sigmas, {"seed": 0}, callback=stop, disable=True)


@pytest.mark.parametrize("name", SAMPLERS)
def test_last_step_to_zero_is_the_denoised_picture(schedule, name):
    sigmas = schedule.sigmas_for("leading", 4)
    states = []
    out = SAMPLERS[name](oracle, latents(), sigmas, {"seed": 0}, states.append, True)
    assert torch.allclose(out, states[-1]["denoised"], atol=1e-6)


def test_extra_args_reach_the_model(schedule):
    sigmas = schedule.sigmas_for("leading", 2)
    seen = []

    def model(x, sigma, **extra):
        seen.append((sigma.shape, extra))
        return oracle(x, sigma)

    sample_ddim(model, latents(), sigmas, {"seed": 4, "cond": "c"}, disable=True)
    assert seen == [((2,), {"seed": 4, "cond": "c"})] * 2


def test_a_partial_run_stops_at_its_last_sigma(schedule):
    """Hosts may split a run: first half, then the rest, equals the whole."""
    sigmas = schedule.sigmas_for("leading", 10)
    x = start_latents(latents(), sigmas)
    whole = sample_ddim(oracle, x, sigmas, disable=True)
    half = sample_ddim(oracle, x, sigmas[:6], disable=True)
    assert torch.allclose(sample_ddim(oracle, half, sigmas[5:], disable=True), whole, atol=1e-6)
    assert torch.equal(sample_ddim(oracle, x, sigmas[:1], disable=True), x)


@pytest.mark.parametrize("name", sorted({*SAMPLERS} - {"lcm"}))  # lcm draws anew, in ComfyUI as well
def test_a_sigma_that_comes_twice_changes_nothing(schedule, name):
    """More steps than the model has sigmas: ComfyUI's `simple` scheduler, or the 50 sigmas of LCM."""
    sigmas = schedule.sigmas_for("leading", 6)
    x = start_latents(latents(), sigmas)
    doubled = torch.cat([sigmas[:-1].repeat_interleave(2), sigmas[-1:]])
    once, twice = (SAMPLERS[name](oracle, x, run, {"seed": 0}, disable=True) for run in (sigmas, doubled))
    assert torch.allclose(once, twice, atol=1e-5)


def test_dpmpp_2m_is_second_order(schedule):
    """Doubling the steps divides the error by about 4, where Euler's is halved.

    Checked between two sigmas, in equal steps of log sigma, against the exact solution for normal data.
    """
    x = latents()
    high, low = 10.0, 0.5

    def error(name: str, steps: int) -> float:
        sigmas = torch.logspace(math.log10(high), math.log10(low), steps + 1, dtype=torch.float64)
        out = SAMPLERS[name](oracle, high * x.double(), sigmas, disable=True)
        spread = ((low**2 + STD**2) / (high**2 + STD**2)) ** 0.5
        return (out - (MEAN + (high * x.double() - MEAN) * spread)).abs().max().item()

    assert error("euler", 40) / error("euler", 80) == pytest.approx(2, rel=0.1)
    assert error("dpmpp_2m", 40) / error("dpmpp_2m", 80) == pytest.approx(4, rel=0.15)


# -- randomness


def test_step_noise_continues_the_generator_of_the_start_noise(schedule):
    """Restarting it would add the start noise again at the first step."""
    g = generator(5)
    start = torch.randn(SHAPE, generator=g)
    second = torch.randn(SHAPE, generator=g)
    sample = default_noise_sampler(start, 5)
    assert torch.equal(sample(2.0, 1.0), second)

    sigmas = schedule.sigmas_for("leading", 6)
    by_seed = sample_ddpm(oracle, start_latents(start, sigmas), sigmas, {"seed": 5}, disable=True)
    g = generator(5)
    start = draw_noise(SHAPE, g)
    by_generator = sample_ddpm(
        oracle, start_latents(start, sigmas), sigmas, disable=True, noise_sampler=noise_sampler_from(start, g)
    )
    assert torch.equal(by_seed, by_generator)


def test_global_random_state_is_neither_used_nor_changed(schedule):
    sigmas = schedule.sigmas_for("leading", 4)

    def run(seed):
        return sample_ddpm(oracle, latents(), sigmas, {"seed": seed}, disable=True)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = run(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(run(1), first)
    assert not torch.equal(run(2), first)


def test_noise_without_a_source_is_refused(schedule):
    sigmas = schedule.sigmas_for("leading", 4)
    with pytest.raises(ConfigError, match="seed"):
        sample_ddpm(oracle, latents(), sigmas, disable=True)
    sample_ddim(oracle, latents(), sigmas, disable=True)  # draws nothing
    with pytest.raises(ConfigError, match=r"eta 1\.5"):
        sample_ddim(oracle, latents(), sigmas, {"seed": 1}, disable=True, eta=1.5)


def test_one_generator_per_picture_makes_pictures_independent_of_the_batch():
    pair = draw_noise(SHAPE, [generator(3), generator(4)])
    assert torch.equal(pair[1:], draw_noise((1, *SHAPE[1:]), [generator(4)]))
    assert torch.equal(pair[:1], draw_noise((1, *SHAPE[1:]), generator(3)))
    with pytest.raises(ConfigError, match="3 random generators for a batch of 2"):
        draw_noise(SHAPE, [generator()] * 3)


def test_start_is_unit_noise_or_a_noised_picture(schedule):
    sigmas = schedule.sigmas_for("leading", 10)
    noise, init = latents(1), latents(2)
    x_t = start_latents(noise, sigmas) / (1 + sigmas[0] ** 2).sqrt()
    assert torch.allclose(x_t, noise, atol=1e-6)
    x_t = start_latents(noise, sigmas, init) / (1 + sigmas[0] ** 2).sqrt()
    assert torch.allclose(x_t, schedule.add_noise(init, noise, torch.tensor([901, 901])), atol=1e-6)
