"""Classifier-free guidance in one batch, and guidance rescale."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser, ModelFn
from .schedule import Schedule


def guide(uncond: Tensor, cond: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """``uncond + scale (cond - uncond)`` on the network's predictions (B, C, H, W) (Ho & Salimans 2022).

    ``rescale`` in 0..1 moves the result towards one with the standard deviation of ``cond`` per picture
    (Lin et al. 2024, section 3.4; unbiased, over C, H and W as in diffusers). That step is not affine, so
    it belongs here, on the prediction (v for HunyuanDiT): on x_0 it gives another picture.
    """
    guided = uncond + scale * (cond - uncond)
    if rescale == 0:
        return guided
    dims = tuple(range(1, guided.ndim))
    ratio = cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return guided * (rescale * ratio + (1 - rescale))


class GuidedDenoiser(Denoiser):
    """A :class:`Denoiser` whose network runs once per step on the doubled batch ``[uncond, cond]``.

    ``model_fn`` receives x_t (2B, C, H, W) and t (2B,). The conditioning that it holds, or finds in
    ``extra``, has the same order: all unconditional rows first.
    """

    def __init__(
        self,
        model_fn: ModelFn,
        schedule: Schedule,
        scale: float,
        rescale: float = 0.0,
        prediction: str | None = None,
    ):
        super().__init__(model_fn, schedule, prediction)
        self.scale = scale
        self.rescale = rescale

    def predict(self, x_t: Tensor, t: Tensor, **extra: Any) -> Tensor:
        both = super().predict(torch.cat([x_t, x_t]), torch.cat([t, t]), **extra)
        uncond, cond = both.chunk(2)
        return guide(uncond, cond, self.scale, self.rescale)


class GuidedAtFirst:
    """A denoiser that is ``guided`` down to a noise level and ``plain`` below it.

    Guidance settles what a picture shows while there is much noise; late steps that do without it take half
    the time. The network must tell by the rows of x whether it is given the doubled batch.

    Args:
        guided, plain: see :class:`GuidedDenoiser` and :class:`Denoiser`.
        sigmas: of the run, descending to its end (n + 1,).
        share: of its steps to guide, above 0, up to 1.
    """

    def __init__(self, guided: Denoiser, plain: Denoiser, sigmas: Tensor, share: float):
        self.guided = guided
        self.plain = plain
        self.last = last_guided(sigmas, share)

    def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        guided = float(sigma.flatten()[0]) >= self.last
        return (self.guided if guided else self.plain)(x, sigma, **extra)


def last_guided(sigmas: Tensor, share: float) -> float:
    """The noise level above which steps are guided: that of the last step in the first ``share``, and a hair.

    ``sigmas`` descend to the run's end (n + 1,); of its n steps, ``share * n`` are guided, rounded up.
    """
    steps = math.ceil(share * (len(sigmas) - 1) - 1e-9)
    return float(sigmas[max(steps, 1) - 1]) * (1 - 1e-4)
