"""From a network that predicts v, epsilon or the sample to ``denoised = model(x, sigma)``.

That call is the contract of k-diffusion (Karras et al. 2022): ``x`` is in sigma scaling, ``x = x_t /
alpha_t = x_0 + sigma noise``, and the answer is an estimate of ``x_0``. Samplers see nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from ..facts import PREDICTIONS
from .schedule import Schedule

ModelFn = Callable[..., Tensor]
"""``(x_t (B, C, H, W), t (B,), **extra) -> (B, C or 2C, H, W)``; variance (the second half) is ignored."""


def predict_x0(output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """Estimate of x_0 from a network's output at ``x_t = alpha x_0 + sigma noise`` (alpha^2 + sigma^2 = 1).

    ``v = alpha noise - sigma x_0`` (Salimans & Ho 2022), ``epsilon`` = noise, ``sample`` = x_0.
    """
    if prediction == "v":
        return alpha * x_t - sigma * output
    if prediction == "epsilon":
        return (x_t - sigma * output) / alpha
    if prediction == "sample":
        return output
    raise ConfigError(f"unknown prediction {prediction!r}: use one of {', '.join(PREDICTIONS)}")


def prediction_target(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """What a network should output at ``x_t = alpha x_0 + sigma noise``; inverse of :func:`predict_x0`."""
    if prediction == "v":
        return alpha * noise - sigma * x0
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return x0
    raise ConfigError(f"unknown prediction {prediction!r}: use one of {', '.join(PREDICTIONS)}")


class Denoiser:
    """``denoised = denoiser(x, sigma, **extra)``, around a network with discrete timesteps.

    Args:
        model_fn: see :data:`ModelFn`; receives x_t in float32 and t as float32 whole numbers.
        schedule: maps sigma to the timestep.
        prediction: ``v``, ``epsilon`` or ``sample``; by default that of the schedule's config.
    """

    def __init__(self, model_fn: ModelFn, schedule: Schedule, prediction: str | None = None):
        self.model_fn = model_fn
        self.schedule = schedule
        self.prediction = prediction or schedule.config.prediction

    def predict(self, x_t: Tensor, t: Tensor, **extra: Any) -> Tensor:
        """The network's prediction at x_t (B, C, H, W) and t (B,), float32, without variance channels."""
        return self.model_fn(x_t, t, **extra)[:, : x_t.shape[1]].float()

    def __call__(self, x: Tensor, sigma: Tensor, *, seed: int | None = None, **extra: Any) -> Tensor:
        """x (B, C, H, W) in sigma scaling, sigma (B,) -> x_0 (B, C, H, W) in float32.

        Sigma may be on the CPU, where reading it makes nobody wait for the device of x.

        ``seed`` is for the samplers, which hand all their ``extra_args`` to the model; other ``extra`` goes
        to the network.
        """
        level = sigma.float().view(-1, 1, 1, 1)
        alpha = (level**2 + 1).rsqrt()
        t, alpha, spread = (
            value.to(x.device, non_blocking=True)
            for value in (self.schedule.sigma_to_t(sigma), alpha, level * alpha)
        )
        x_t = x.float() * alpha
        output = self.predict(x_t, t, **extra)
        return predict_x0(output, x_t, alpha, spread, self.prediction)
