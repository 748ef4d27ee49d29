"""Noise schedule, denoisers, guidance, samplers and training losses."""

from __future__ import annotations

from .denoiser import PREDICTIONS, Denoiser
from .guidance import GuidedDenoiser, guide
from .losses import LossTerms, diffusion_loss, sample_timesteps, training_noise
from .samplers import (
    DEFAULT_SPACING,
    SAMPLERS,
    default_noise_sampler,
    draw_noise,
    noise_sampler_from,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
    sample_euler,
    start_latents,
)
from .schedule import SPACINGS, Schedule

__all__ = [
    "DEFAULT_SPACING",
    "PREDICTIONS",
    "SAMPLERS",
    "SPACINGS",
    "Denoiser",
    "GuidedDenoiser",
    "LossTerms",
    "Schedule",
    "default_noise_sampler",
    "diffusion_loss",
    "draw_noise",
    "guide",
    "noise_sampler_from",
    "sample_ddim",
    "sample_ddpm",
    "sample_dpmpp_2m",
    "sample_euler",
    "sample_timesteps",
    "start_latents",
    "training_noise",
]
