"""HunyuanDiT's training loss and the random draws that it needs.

Mean squared error on the prediction (v) plus the variational bound that trains the learned variance (Nichol &
Dhariwal 2021), as in Tencent/HunyuanDiT, where both terms are added with equal weight. Latents are float32
(B, C, H, W), timesteps int64 (B,), losses float32 (B,).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from .denoiser import predict_x0, prediction_target
from .schedule import Schedule, table_at

WEIGHTINGS = ("constant", "min_snr", "min_snr_v")
TIMESTEP_KINDS = ("uniform", "stratified", "logit_normal")


class LossTerms(NamedTuple):
    """Per-sample losses (B,): ``loss = weight * mse + vlb``; ``mse`` itself is unweighted."""

    loss: Tensor
    mse: Tensor
    vlb: Tensor


def diffusion_loss(
    model_output: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    schedule: Schedule,
    *,
    weighting: str = "constant",
    snr_gamma: float = 5.0,
    vlb: bool = True,
    mask: Tensor | None = None,
) -> LossTerms:
    """Loss of a network's output (B, 2C, H, W) at ``schedule.add_noise(x0, noise, t)``; x0 (B, C, H, W).

    The first C channels are the prediction, the others the variance logits. With ``vlb=False`` the output may
    have C channels and ``vlb`` is 0. Raises ConfigError if variance logits are needed but absent, or for an
    unknown ``weighting`` (see :func:`loss_weight`).
    """
    channels = x0.shape[1]
    predicted = model_output[:, :channels].float()
    mse = mse_loss(predicted, training_target(x0, noise, t, schedule), mask)
    weighted = mse * loss_weight(t, schedule, weighting, snr_gamma).to(mse.device)
    if not vlb:
        return LossTerms(weighted, mse, torch.zeros_like(mse))
    if model_output.shape[1] != 2 * channels:
        raise ConfigError(
            f"the model has {model_output.shape[1]} output channels, the variational bound needs "
            f"{2 * channels} (prediction and variance): train with vlb off"
        )
    bound = vlb_loss(predicted, model_output[:, channels:].float(), x0, noise, t, schedule, mask)
    return LossTerms(weighted + bound, mse, bound)


def training_target(x0: Tensor, noise: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """What the network should predict (``schedule.config.prediction``): v, the noise or x0, in float32."""
    alpha, sigma = schedule.alpha_sigma(t, x0)
    return prediction_target(x0.float(), noise.float(), alpha, sigma, schedule.config.prediction)


def v_target(x0: Tensor, noise: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """``v = alpha_t noise - sigma_t x0`` (Salimans & Ho 2022), float32, like x0."""
    alpha, sigma = schedule.alpha_sigma(t, x0)
    return prediction_target(x0.float(), noise.float(), alpha, sigma, "v")


def mse_loss(predicted: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error averaged over all but the batch: (B, ...) -> (B,); weighted with ``mask``, if given."""
    return _mean((predicted - target).square(), mask)


def _mean(elements: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return elements.flatten(1).mean(1)
    weights = mask.to(elements).expand_as(elements).flatten(1)
    return (elements.flatten(1) * weights).sum(1) / weights.sum(1).clamp_min(torch.finfo(weights.dtype).tiny)


def loss_weight(t: Tensor, schedule: Schedule, weighting: str, snr_gamma: float = 5.0) -> Tensor:
    """Weight of the squared error (B,), after Hang et al. 2023 ("Min-SNR").

    * ``constant``: 1.
    * ``min_snr``: min(snr, gamma) / snr, the paper's weight of an epsilon loss; Tencent applies it to v.
    * ``min_snr_v``: min(snr, gamma) / (snr + 1), the paper's weight of a v loss.
    """
    if weighting not in WEIGHTINGS:
        raise ConfigError(f"unknown loss weighting {weighting!r}: use one of {', '.join(WEIGHTINGS)}")
    snr = schedule.snr(t)
    if weighting == "constant":
        return torch.ones_like(snr)
    return snr.clamp(max=snr_gamma) / (snr if weighting == "min_snr" else snr + 1)


def vlb_loss(
    predicted: Tensor,
    variance_logits: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    schedule: Schedule,
    mask: Tensor | None = None,
) -> Tensor:
    """The term of the variational bound at t in bits per element (B,); it trains the variance only.

    KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) for t > 0; at t = 0 the negative log-likelihood of x0 under a
    Gaussian that is integrated over bins of 2/255, as if latents were 8-bit pixels in [-1, 1] (Tencent's code
    inherits that from ADM). The log-variance of p is interpolated between those of beta_t and of the
    posterior by ``(logits + 1) / 2`` (Nichol & Dhariwal 2021, eq. 15, rescaled). ``predicted`` is detached:
    the mean learns from the squared error alone.
    """
    x0, logits = x0.float(), variance_logits.float()
    alpha, sigma = schedule.alpha_sigma(t, x0)
    x_t = schedule.add_noise(x0, noise, t)
    x0_hat = predict_x0(predicted.detach().float(), x_t, alpha, sigma, schedule.config.prediction)

    log_beta = table_at(schedule.betas.log(), t, x0)
    log_posterior = table_at(schedule.posterior_log_variance, t, x0)
    log_variance = torch.lerp(log_posterior, log_beta, (logits + 1) / 2)

    # Both means are c x0 + d x_t with the same d, so their difference is c (x0 - x0_hat).
    c = schedule.betas * schedule.alphas_cumprod_prev.sqrt() / (1 - schedule.alphas_cumprod)
    mean_difference = table_at(c, t, x0) * (x0 - x0_hat)
    kl = _gaussian_kl(mean_difference, log_posterior, log_variance)
    # At t = 0 the posterior mean is x0 itself (c = 1, d = 0), and that of the model x0_hat.
    nll = _discretized_nll(x0, x0_hat, 0.5 * log_variance)
    bits = torch.where((t == 0).to(x0.device).view(-1, 1, 1, 1), nll, kl)
    return _mean(bits, mask) / math.log(2)


def _gaussian_kl(mean_difference: Tensor, log_var_q: Tensor, log_var_p: Tensor) -> Tensor:
    """KL(q || p) of diagonal Gaussians, elementwise, in nats."""
    d = log_var_p - log_var_q
    # exp(-d) - 1 + d cancels almost wholly where the variances agree, as they do at large t.
    return 0.5 * (torch.expm1(-d) + d + mean_difference.square() * torch.exp(-log_var_p))


def _discretized_nll(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """-log of a Gaussian's mass in the bin of width 2/255 around x, elementwise; outermost bins are open."""
    centered, inverse_scale = x - mean, torch.exp(-log_scale)
    below_upper = _normal_cdf((centered + 1 / 255) * inverse_scale)
    below_lower = _normal_cdf((centered - 1 / 255) * inverse_scale)
    mass = torch.where(x < -0.999, below_upper, below_upper - below_lower)
    mass = torch.where(x > 0.999, 1 - below_lower, mass)
    return -mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the standard normal's distribution function (Page 1977)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def training_noise(shape: Sequence[int], generator: torch.Generator, offset: float = 0.0) -> Tensor:
    """Standard normal noise (..., H, W) plus ``offset`` times one normal number per channel plane.

    Noise offset lets a model learn overall brightness (Guttenberg 2023); the sum is both added to the
    latent and predicted.
    """
    noise = torch.randn(*shape, generator=generator, device=generator.device)
    if offset:
        noise += offset * torch.randn(*shape[:-2], 1, 1, generator=generator, device=generator.device)
    return noise


def sample_timesteps(
    n: int,
    kind: str,
    generator: torch.Generator,
    *,
    num_timesteps: int = 1000,
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """n timesteps in 0..num_timesteps-1, int64, on the generator's device.

    * ``uniform``: independent.
    * ``stratified``: one from each of n equal parts of the range, ascending (low variance of the batch's
      loss).
    * ``logit_normal``: the sigmoid of a normal with ``mean`` and ``std``, favoring the middle (Esser et al.
      2024).
    """
    device = generator.device
    if kind == "uniform":
        return torch.randint(num_timesteps, (n,), generator=generator, device=device)
    if kind == "stratified":
        u = (torch.arange(n, device=device) + torch.rand(n, generator=generator, device=device)) / n
    elif kind == "logit_normal":
        u = torch.sigmoid(mean + std * torch.randn(n, generator=generator, device=device))
    else:
        raise ConfigError(f"unknown timestep distribution {kind!r}: use one of {', '.join(TIMESTEP_KINDS)}")
    return (u * num_timesteps).long().clamp(max=num_timesteps - 1)
