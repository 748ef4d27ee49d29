"""One run of a sampler: what the network is told at each step, and a watch on its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HyditError
from ..finite import FiniteWatch, why_not_finite
from .forecast import Forecaster
from .masked import Known
from .samplers import SAMPLERS, noise_sampler_from

Progress = Callable[[int, int, Tensor], object]
"""``(step, steps, denoised latents)``, called once per step; ``step`` counts from 1."""


def run_sampler(
    sampler: str,
    denoiser: Forecaster,
    x: Tensor,
    sigmas: Tensor,
    times: Sequence[float],
    network: Mapping[str, Any],
    generators: Sequence[torch.Generator],
    *,
    dit: nn.Module,
    dtype: torch.dtype,
    eta: float | None = None,
    known: Known | None = None,
    callback: Progress | None = None,
) -> Tensor:
    """Latents (B, C, h, w), float32, at the end of a run from ``x``.

    Args:
        sampler: a key of :data:`~.samplers.SAMPLERS`.
        denoiser: of the run.
        x: in sigma scaling at ``sigmas[0]``.
        sigmas: (n + 1,), on the host; ``times`` are the timesteps of the first n. ControlNets are chosen by
            them, and nothing in a step may wait for the device.
        network: the denoiser's arguments besides ``now``, the present timestep.
        generators: those that drew the start noise. They continue, so that step noise is independent of it.
        dit: computes in ``dtype``; named where its values cease to be finite.
        eta: of the ddim sampler.
        known: the part of the picture that is to stay.

    Raises:
        HyditError: the values are not finite; the error names the step and the layer.
    """
    told: dict[str, Any] = {**network, "now": times[0]}

    def blame(state: dict[str, Any]) -> HyditError:
        i, x = state["i"], state["x"]

        def again() -> Tensor:
            level = state["sigma"] * x.new_ones(len(x))
            return denoiser.model(x, level, **{**told, "now": times[i]})

        return HyditError(why_not_finite(i + 1, x, dit, again, dtype))

    watch = FiniteWatch(blame)

    def each_step(state: dict[str, Any]) -> None:
        watch.look(state["denoised"], state)
        told["now"] = times[min(state["i"] + 1, len(times) - 1)]
        if callback is not None:
            callback(state["i"] + 1, len(times), state["denoised"])

    latents = SAMPLERS[sampler](
        denoiser if known is None else known.kept(denoiser),
        x,
        sigmas,
        extra_args=told,
        callback=each_step,
        disable=True,
        noise_sampler=noise_sampler_from(x, generators),
        **({} if eta is None else {"eta": eta}),
    )
    watch.settle()
    return latents
