"""Every random draw of training, as a function of (seed, step, place in the step).

Nothing here depends on the rank, on the data workers or on what was drawn before, so a resumed run,
a run on two processes and a run without interruption see the same numbers. All draws are made on
the CPU: the same sample gets the same noise on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.order import hash_int, sample_generator
from ..diffusion.losses import sample_timesteps, training_noise
from .sections import ObjectiveSection


@dataclass
class Draws:
    """The draws of one micro-batch; latents are (B, C, h, w)."""

    t: Tensor
    """(B,) int64 timesteps."""
    noise: Tensor
    """(B, C, h, w), what is added to the latents, offset included."""
    posterior_noise: Tensor
    """(B, C, h, w), for sampling the latents from the VAE's posterior; zeros give its mean."""
    drop_bert: list[bool]
    drop_t5: list[bool]
    drop_control: list[bool]
    drop_image: list[bool]


class TrainingDraws:
    """The draws of one run.

    ``step_size`` is the number of samples of one optimizer step over all processes and micro-batches:
    stratified timesteps are spread over all of them.
    """

    def __init__(
        self,
        objective: ObjectiveSection,
        seed: int,
        step_size: int,
        *,
        num_timesteps: int = 1000,
        sample_posterior: bool = True,
    ) -> None:
        self.objective = objective
        self.seed = seed
        self.step_size = step_size
        self.num_timesteps = num_timesteps
        self.sample_posterior = sample_posterior

    def __call__(self, step: int, places: Sequence[int], shape: Sequence[int]) -> Draws:
        """``places`` are the samples' numbers within the step, ``shape`` is (C, h, w)."""
        objective = self.objective
        noise = torch.empty(len(places), *shape)
        posterior_noise = torch.zeros_like(noise)
        drop_bert, drop_t5, drop_control, drop_image = [], [], [], []
        for row, place in enumerate(places):
            generator = sample_generator(self.seed, step, place, "training")
            u = torch.rand(3, generator=generator).tolist()
            joint = u[2] < objective.dropout_joint
            drop_bert.append(joint or u[0] < objective.dropout_bert)
            drop_t5.append(joint or u[1] < objective.dropout_t5)
            noise[row] = training_noise(shape, generator, objective.noise_offset)
            if self.sample_posterior:
                posterior_noise[row].normal_(generator=generator)
            # Last, so that the other draws are those of a training without control and prompt pictures
            drop_control.append(torch.rand(1, generator=generator).item() < objective.dropout_control)
            drop_image.append(torch.rand(1, generator=generator).item() < objective.dropout_image)
        t = self.timesteps(step)[list(places)]
        return Draws(t, noise, posterior_noise, drop_bert, drop_t5, drop_control, drop_image)

    def timesteps(self, step: int) -> Tensor:
        """(step_size,) timesteps of all samples of a step, in random order."""
        generator = sample_generator(self.seed, step, 0, "timesteps")
        kind, total = self.objective.timesteps, self.num_timesteps
        t = sample_timesteps(self.step_size, kind, generator, num_timesteps=total)
        return t[torch.randperm(len(t), generator=generator)]


def validation_draws(
    keys: Sequence[str],
    indices: Sequence[int],
    total: int,
    shape: Sequence[int],
    num_timesteps: int = 1000,
    *,
    numbers: Sequence[int] = (),
    count: int = 1,
    sample_posterior: bool = False,
) -> Draws:
    """The same noise and timestep for a sample at every validation, whatever the training seed.

    ``indices`` number the samples among all ``total`` validation samples. The timesteps are an even grid
    over all samples and the ``count`` times that each is measured, of which these are ``numbers``, by
    default the first; those of one sample are spread evenly too.
    """
    numbers = numbers or [0] * len(keys)
    noise = torch.empty(len(keys), *shape)
    posterior_noise = torch.zeros_like(noise)
    for row, (key, number) in enumerate(zip(keys, numbers, strict=True)):
        generator = torch.Generator().manual_seed(hash_int("validation", key, *([number] if number else [])))
        noise[row].normal_(generator=generator)
        if sample_posterior:
            posterior_noise[row].normal_(generator=generator)
    # A stride coprime to the total mixes pictures and timesteps: neighbors in the list are often alike,
    # and should not all be measured at one noise level.
    places = total * count
    stride = max(1, round(places * 0.618))
    while math.gcd(stride, places) != 1:
        stride += 1
    slots = torch.tensor([(i + n * total) * stride % places for i, n in zip(indices, numbers, strict=True)])
    t = ((slots + 0.5) * num_timesteps / places).long()
    never = [False] * len(keys)
    return Draws(t, noise, posterior_noise, never, never, never, never)
