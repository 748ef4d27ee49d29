"""Validation loss with fixed noise: two values of one run, or of two runs, can be compared."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..data.dataset import TrainData
from .distributed import Processes
from .draws import validation_draws
from .objectives.base import Objective

BANDS = 4
"""Into so many equal parts timesteps are divided."""


@torch.no_grad()
def validate(
    objective: Objective,
    data: TrainData,
    processes: Processes,
    autocast: Callable[[], AbstractContextManager[Any]],
    *,
    sample_posterior: bool = False,
) -> dict[str, float]:
    """Mean losses over the held-out pictures, each at its own fixed noise and timestep.

    ``val_mse_t0_249`` and so on are those of the pictures whose timesteps lie there: what is learned late or
    forgotten first, composition or detail, shows in one of them.

    ``sample_posterior`` as in training: losses on other latents mean nothing for it. Every process works on
    its share. Empty when no picture is held out.
    """
    total = len(data.layout.validation)
    if total == 0:
        return {}
    module = objective.module
    num_timesteps = len(objective.schedule)
    training = module.training
    sums = torch.zeros(4 + 2 * BANDS, dtype=torch.float64, device=processes.device)
    module.eval()
    try:
        for batch in data.validation_batches():
            shape = objective.latent_shape(batch)
            draws = validation_draws(
                batch.keys,
                batch.positions.tolist(),
                total,
                shape,
                num_timesteps,
                sample_posterior=sample_posterior,
            )
            with autocast():
                terms = module(**objective.inputs(batch, draws))
            weights = batch.weights.to(processes.device, torch.float64)
            for row, losses in enumerate((terms.loss, terms.mse, terms.vlb)):
                sums[row] += (losses.double() * weights).sum()
            sums[3] += weights.sum()
            band = (draws.t * BANDS // num_timesteps).to(processes.device)
            sums[4 : 4 + BANDS].index_add_(0, band, terms.mse.double() * weights)
            sums[4 + BANDS :].index_add_(0, band, weights)
    finally:
        module.train(training)
    loss, mse, vlb, count, *bands = processes.sum(sums).tolist()
    means = {"val_loss": loss / count, "val_mse": mse / count, "val_vlb": vlb / count}
    for number, (total_mse, weight) in enumerate(zip(bands[:BANDS], bands[BANDS:], strict=True)):
        if weight:
            first, last = (edge * num_timesteps // BANDS for edge in (number, number + 1))
            means[f"val_mse_t{first}_{last - 1}"] = total_mse / weight
    return {name: round(value, 6) for name, value in means.items()}
