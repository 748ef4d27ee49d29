"""The training loss against a second implementation in numpy, float64, written from the papers' formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from hydit_core.diffusion.losses import (
    TIMESTEP_KINDS,
    WEIGHTINGS,
    diffusion_loss,
    loss_weight,
    sample_timesteps,
    training_noise,
    training_target,
    v_target,
)
from hydit_core.diffusion.schedule import Schedule
from hydit_core.errors import ConfigError
from hydit_core.facts import DiffusionConfig

TIMESTEPS = torch.tensor([0, 1, 2, 17, 250, 417, 801, 998, 999])
SHAPE = (len(TIMESTEPS), 4, 6, 5)


def schedule_for(beta_end=0.018, prediction="v") -> Schedule:
    return Schedule(DiffusionConfig(beta_end=beta_end, prediction=prediction))


def batch(seed: int = 0, scale: float = 0.6):
    """(model output, x0, noise); x0 beyond +-0.999 occurs, so the open bins at t = 0 are used."""
    g = torch.Generator().manual_seed(seed)
    output = torch.randn(SHAPE[0], 8, *SHAPE[2:], generator=g)
    x0 = scale * torch.randn(SHAPE, generator=g)
    noise = torch.randn(SHAPE, generator=g)
    return output, x0, noise


# -- the second implementation: one sample at a time, everything spelled out


def tables(beta_end: float):
    root = [math.sqrt(0.00085) + i / 999 * (math.sqrt(beta_end) - math.sqrt(0.00085)) for i in range(1000)]
    beta = np.array(root) ** 2
    abar = np.cumprod(1 - beta)
    return beta, abar


def gaussian_cdf_tanh(x):
    return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def posterior_mean(x0, x_t, t, beta, abar):
    """Ho et al. 2020, eq. 7, written with alphas."""
    previous = abar[t - 1] if t > 0 else 1.0
    on_x0 = np.sqrt(previous) * beta[t] / (1 - abar[t])
    on_x_t = np.sqrt(1 - beta[t]) * (1 - previous) / (1 - abar[t])
    return on_x0 * x0 + on_x_t * x_t


def posterior_variance(t, beta, abar):
    previous = abar[t - 1] if t > 0 else 1.0
    return beta[t] * (1 - previous) / (1 - abar[t])


def expected_terms(output, x0, noise, t, beta_end, prediction):
    beta, abar = tables(beta_end)
    a, s = np.sqrt(abar[t]), np.sqrt(1 - abar[t])
    x_t = a * x0 + s * noise
    predicted, logits = output[:4], output[4:]
    target = {"v": a * noise - s * x0, "epsilon": noise, "sample": x0}[prediction]
    mse = np.mean((target - predicted) ** 2)
    x0_hat = {
        "v": a * x_t - s * predicted,
        "epsilon": (x_t - s * predicted) / a,
        "sample": predicted,
    }[prediction]
    mean_q = posterior_mean(x0, x_t, t, beta, abar)
    mean_p = posterior_mean(x0_hat, x_t, t, beta, abar)
    log_small = np.log(posterior_variance(max(t, 1), beta, abar))
    fraction = (logits + 1) / 2
    log_p = fraction * np.log(beta[t]) + (1 - fraction) * log_small
    if t > 0:
        var_q, var_p = np.exp(log_small), np.exp(log_p)
        nats = 0.5 * (np.log(var_p / var_q) - 1 + (var_q + (mean_q - mean_p) ** 2) / var_p)
    else:
        std = np.exp(0.5 * log_p)
        upper = gaussian_cdf_tanh((x0 - mean_p + 1 / 255) / std)
        lower = gaussian_cdf_tanh((x0 - mean_p - 1 / 255) / std)
        mass = np.where(x0 < -0.999, upper, np.where(x0 > 0.999, 1 - lower, upper - lower))
        nats = -np.log(np.maximum(mass, 1e-12))
    return mse, np.mean(nats) / np.log(2)


@pytest.mark.parametrize("beta_end", [0.018, 0.03])
@pytest.mark.parametrize("prediction", ["v", "epsilon", "sample"])
def test_terms_equal_a_float64_implementation(beta_end, prediction):
    schedule = schedule_for(beta_end, prediction)
    output, x0, noise = batch()
    if prediction == "sample":
        # Within few standard deviations at t = 0: beyond, float32's distribution function has no digits left.
        output[:, :4] = x0 + 0.01 * output[:, :4]
    terms = diffusion_loss(output, x0, noise, TIMESTEPS, schedule)
    numpy = [tensor.double().numpy() for tensor in (output, x0, noise)]
    for i, t in enumerate(TIMESTEPS.tolist()):
        mse, vlb = expected_terms(*(tensor[i] for tensor in numpy), t, beta_end, prediction)
        assert terms.mse[i].item() == pytest.approx(mse, rel=1e-5), t
        assert terms.vlb[i].item() == pytest.approx(vlb, rel=1e-4, abs=1e-10), t
    assert torch.equal(terms.loss, terms.mse + terms.vlb)
    assert terms.loss.dtype == torch.float32


def test_open_bins_and_near_certain_variance_at_t_0():
    """Latents beyond the pixel range, and a network that is right: both branches of the likelihood."""
    schedule = schedule_for()
    t = torch.zeros(SHAPE[0], dtype=torch.long)
    output, x0, noise = batch(1, scale=2.0)
    assert (x0 > 0.999).any() and (x0 < -0.999).any()
    output[:, :4] = v_target(x0, noise, t, schedule) + 0.1 * output[:, :4]
    vlb = diffusion_loss(output, x0, noise, t, schedule).vlb
    for i in range(SHAPE[0]):
        one = (tensor[i].double().numpy() for tensor in (output, x0, noise))
        assert vlb[i].item() == pytest.approx(expected_terms(*one, 0, 0.018, "v")[1], rel=1e-4)


def test_hand_computed_kl():
    """The right mean and the posterior's variance give 0; beta's variance gives the textbook value."""
    schedule = schedule_for()
    _, x0, noise = batch()
    t = torch.full((SHAPE[0],), 5)
    beta, abar = tables(0.018)
    right = v_target(x0, noise, t, schedule)
    small = torch.cat([right, torch.full_like(right, -1.0)], dim=1)
    assert diffusion_loss(small, x0, noise, t, schedule).vlb.abs().max() < 1e-6
    large = torch.cat([right, torch.full_like(right, 1.0)], dim=1)
    ratio = posterior_variance(5, beta, abar) / beta[5]
    expected = 0.5 * (ratio - 1 - math.log(ratio)) / math.log(2)
    assert expected > 1e-3
    vlb = diffusion_loss(large, x0, noise, t, schedule).vlb
    assert vlb.tolist() == pytest.approx([expected] * SHAPE[0], rel=1e-4)


def test_magnitudes_for_random_outputs():
    """Rough sizes that Tencent's code shows: about 3.9 bits at t = 0, 3e-3 at 417, 1e-5 at 999."""
    g = torch.Generator().manual_seed(0)
    output = torch.randn(3, 8, 32, 32, generator=g)
    x0, noise = torch.randn(2, 3, 4, 32, 32, generator=g)
    vlb = diffusion_loss(output, x0, noise, torch.tensor([0, 417, 999]), schedule_for()).vlb
    for found, expected in zip(vlb.tolist(), (3.9, 3e-3, 1e-5), strict=True):
        assert expected / 3 < found < expected * 3


# -- gradients


def test_the_bound_trains_the_variance_only():
    schedule = schedule_for()
    output, x0, noise = batch()
    output.requires_grad_()
    terms = diffusion_loss(output, x0, noise, TIMESTEPS, schedule)
    (bound,) = torch.autograd.grad(terms.vlb.sum(), output, retain_graph=True)
    (error,) = torch.autograd.grad(terms.mse.sum(), output)
    assert torch.equal(bound[:, :4], torch.zeros_like(bound[:, :4]))
    assert (bound[:, 4:].flatten(1).abs().amax(1) > 0).all()
    assert torch.equal(error[:, 4:], torch.zeros_like(error[:, 4:]))
    expected = 2 * (output[:, :4] - v_target(x0, noise, TIMESTEPS, schedule)) / output[0, :4].numel()
    assert torch.allclose(error[:, :4], expected, rtol=1e-5, atol=1e-9)


def test_gradients_are_finite_in_both_branches():
    """`where` passes NaN gradients from the branch that was not taken."""
    output, x0, noise = batch()
    output = (5 * output).requires_grad_()
    diffusion_loss(output, 3 * x0, noise, TIMESTEPS, schedule_for()).loss.sum().backward()
    assert output.grad is not None and output.grad.isfinite().all()


def test_half_precision_output_is_computed_with_in_float32():
    output, x0, noise = batch()
    low = output.bfloat16()
    terms = diffusion_loss(low, x0, noise, TIMESTEPS, schedule_for())
    expected = diffusion_loss(low.float(), x0, noise, TIMESTEPS, schedule_for())
    assert torch.equal(terms.loss, expected.loss) and terms.loss.dtype == torch.float32


# -- targets and weights


@pytest.mark.parametrize("beta_end", [0.018, 0.03])
def test_v_equals_diffusers(beta_end):
    _, x0, noise = batch()
    theirs = DDPMScheduler(beta_start=0.00085, beta_end=beta_end, beta_schedule="scaled_linear")
    ours = v_target(x0, noise, TIMESTEPS, schedule_for(beta_end))
    assert torch.allclose(ours, theirs.get_velocity(x0, noise, TIMESTEPS), atol=2e-5)
    assert torch.equal(training_target(x0, noise, TIMESTEPS, schedule_for(beta_end)), ours)


def test_min_snr_weights_equal_diffusers_snr():
    schedule = schedule_for()
    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.018, beta_schedule="scaled_linear")
    snr = compute_snr(theirs, TIMESTEPS).double()
    capped = snr.clamp(max=5.0)
    # diffusers' own tables are float32: 1 - alphas_cumprod has 4 good digits at t = 0
    assert loss_weight(TIMESTEPS, schedule, "min_snr").tolist() == pytest.approx(
        (capped / snr).tolist(), rel=1e-3
    )
    found = loss_weight(TIMESTEPS, schedule, "min_snr_v").tolist()
    assert found == pytest.approx((capped / (snr + 1)).tolist(), rel=1e-3)
    assert torch.equal(loss_weight(TIMESTEPS, schedule, "constant"), torch.ones(len(TIMESTEPS)))
    assert loss_weight(TIMESTEPS, schedule, "min_snr", 1e9).tolist() == pytest.approx([1.0] * len(TIMESTEPS))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weight_applies_to_the_squared_error_alone(weighting):
    schedule = schedule_for()
    output, x0, noise = batch()
    terms = diffusion_loss(output, x0, noise, TIMESTEPS, schedule, weighting=weighting, snr_gamma=2.0)
    weight = loss_weight(TIMESTEPS, schedule, weighting, 2.0)
    assert torch.allclose(terms.loss, weight * terms.mse + terms.vlb)
    assert torch.equal(terms.mse, diffusion_loss(output, x0, noise, TIMESTEPS, schedule).mse)


def test_without_variance_channels():
    schedule = schedule_for()
    output, x0, noise = batch()
    terms = diffusion_loss(output[:, :4], x0, noise, TIMESTEPS, schedule, vlb=False)
    assert torch.equal(terms.loss, terms.mse) and not terms.vlb.any()
    with pytest.raises(ConfigError, match="4 output channels, the variational bound needs 8"):
        diffusion_loss(output[:, :4], x0, noise, TIMESTEPS, schedule)
    with pytest.raises(ConfigError, match="unknown loss weighting 'snr'"):
        diffusion_loss(output, x0, noise, TIMESTEPS, schedule, weighting="snr")


# -- random draws


def test_noise_offset_shifts_whole_planes():
    def draw(offset):
        return training_noise((64, 4, 32, 32), torch.Generator().manual_seed(1), offset)

    plain, shifted = draw(0.0), draw(0.5)
    plane = (shifted - plain).mean(dim=(2, 3), keepdim=True)
    assert torch.allclose(shifted - plain, plane.expand_as(plain), atol=1e-5)
    assert plane.std().item() == pytest.approx(0.5, rel=0.15)
    assert plain.std().item() == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("kind", TIMESTEP_KINDS)
def test_timesteps_are_reproducible_and_in_range(kind):
    def draw(seed):
        return sample_timesteps(500, kind, torch.Generator().manual_seed(seed), num_timesteps=800)

    t = draw(1)
    assert t.dtype == torch.int64 and t.shape == (500,)
    assert 0 <= t.min() < 80 and 720 < t.max() < 800
    state = torch.get_rng_state()
    assert torch.equal(draw(1), t) and not torch.equal(draw(2), t)
    assert torch.equal(torch.get_rng_state(), state)


def test_uniform_is_uniform():
    t = sample_timesteps(100_000, "uniform", torch.Generator().manual_seed(0))
    counts = torch.bincount(t // 100, minlength=10)
    assert (counts - 10_000).abs().max() < 500


@pytest.mark.parametrize("n", [1, 3, 8, 250, 1000])
def test_stratified_covers_the_range(n):
    """One timestep in each n-th of 0..999, for every draw."""
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        t = sample_timesteps(n, "stratified", g)
        edges = torch.arange(n + 1) * (1000 / n)
        assert (t >= edges[:-1].floor()).all() and (t <= edges[1:]).all()
        assert t.max() <= 999
    if n == 1000:
        assert len(t.unique()) > 900
    many = torch.stack([sample_timesteps(n, "stratified", g) for _ in range(400 // n + 50)])
    assert many.float().mean().item() == pytest.approx(499.5, rel=0.25 if n == 1 else 0.05)


def test_logit_normal_has_the_median_and_spread_of_its_normal():
    g = torch.Generator().manual_seed(0)
    u = (sample_timesteps(100_000, "logit_normal", g, mean=0.5, std=0.8).double() + 0.5) / 1000
    logits = torch.log(u / (1 - u))
    assert logits.median().item() == pytest.approx(0.5, abs=0.02)
    assert logits.std().item() == pytest.approx(0.8, rel=0.02)


def test_logit_normal_is_the_sigmoid_of_its_normal():
    z = torch.randn(1000, generator=torch.Generator().manual_seed(1)).double()
    expected = 1000 / (1 + torch.exp(-(0.5 + 0.8 * z)))
    found = sample_timesteps(1000, "logit_normal", torch.Generator().manual_seed(1), mean=0.5, std=0.8)
    assert ((found - expected.floor()).abs() <= 1).all()
    assert (found == expected.floor()).double().mean() > 0.99


def test_noise_offset_is_added_plane_by_plane():
    generator = torch.Generator().manual_seed(2)
    plain, shifts = torch.randn(3, 4, 5, generator=generator), torch.randn(3, 1, 1, generator=generator)
    found = training_noise((3, 4, 5), torch.Generator().manual_seed(2), 0.25)
    torch.testing.assert_close(found, plain + 0.25 * shifts)


def test_unknown_timestep_distribution_is_refused():
    with pytest.raises(ConfigError, match="unknown timestep distribution 'cosine': use one of uniform"):
        sample_timesteps(4, "cosine", torch.Generator())
