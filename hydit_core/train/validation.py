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

    ``sample_posterior`` as in training: losses on other latents mean nothing for it. Every process works on
    its share. Empty when no picture is held out.
    """
    total = len(data.layout.validation)
    if total == 0:
        return {}
    module = objective.module
    training = module.training
    sums = torch.zeros(4, dtype=torch.float64, device=processes.device)
    module.eval()
    try:
        for batch in data.validation_batches():
            shape = objective.latent_shape(batch)
            draws = validation_draws(
                batch.keys, batch.positions.tolist(), total, shape, sample_posterior=sample_posterior
            )
            with autocast():
                terms = module(**objective.inputs(batch, draws))
            weights = batch.weights.to(processes.device, torch.float64)
            for row, losses in enumerate((terms.loss, terms.mse, terms.vlb)):
                sums[row] += (losses.double() * weights).sum()
            sums[3] += weights.sum()
    finally:
        module.train(training)
    loss, mse, vlb, count = processes.sum(sums).tolist()
    values = {"val_loss": loss, "val_mse": mse, "val_vlb": vlb}
    return {name: round(value / count, 6) for name, value in values.items()}
