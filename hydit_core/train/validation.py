"""Validation loss with fixed noise: two values of one run, or of two runs, can be compared."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..data.dataset import TrainData
from .distributed import Processes
from .draws import validation_draws
from .objectives.base import Objective

BANDS = 4
"""Into so many equal parts timesteps are divided."""

Autocast = Callable[[], AbstractContextManager[Any]]


@torch.no_grad()
def validate(
    objective: Objective,
    data: TrainData,
    processes: Processes,
    autocast: Autocast,
    *,
    count: int = 1,
    sample_posterior: bool = False,
) -> dict[str, float]:
    """Mean losses over the held-out pictures, each at ``count`` fixed timesteps, with fixed noise for each.

    ``val_mse_t0_249`` and so on are those of the timesteps there: what is learned late or forgotten first,
    composition or detail, shows in one of them. ``val_prior_loss`` and ``val_prior_mse`` are those of
    pictures that show what the base knows: as far as they grow, it is forgotten. Of these about as many
    values are measured as of the others, or one of each.

    ``sample_posterior`` as in training: losses on other latents mean nothing for it. Every process works on
    its share. Empty when no picture is held out.
    """
    module = objective.module
    training = module.training
    found: dict[str, float] = {}
    own, known = len(data.layout.validation), len(data.layout.prior_validation)
    counts = {False: count if own else 0}
    if known:
        counts[True] = max(1, round(count * own / known)) if own else count
    module.eval()
    try:
        for prior, times in counts.items():
            if times:
                sums = _sums(objective, data, processes, autocast, prior, times, sample_posterior)
                found |= _means(processes.sum(sums).tolist(), prior, len(objective.schedule))
    finally:
        module.train(training)
    return {name: round(value, 6) for name, value in found.items()}


def _sums(
    objective: Objective,
    data: TrainData,
    processes: Processes,
    autocast: Autocast,
    prior: bool,
    count: int,
    sample_posterior: bool,
) -> Tensor:
    """(4 + 2 BANDS,) sums of loss, mse, vlb and weights, then of mse and of weights by band.

    Where the held-out pictures fill a part of a batch, the rest of it measures them at other timesteps.
    """
    total = len(data.layout.prior_validation if prior else data.layout.validation)
    num_timesteps = len(objective.schedule)
    sums = torch.zeros(4 + 2 * BANDS, dtype=torch.float64, device=processes.device)
    copies = data.validation_copies(prior=prior)
    for batch in data.validation_batches(prior=prior):
        positions = batch.positions.tolist()
        copy = [positions[:row].count(position) for row, position in enumerate(positions)]
        own = batch.weights[[positions.index(position) for position in positions]]
        for first in range(0, count, copies):
            numbers = [first + number for number in copy]
            used = [c < copies and number < count for c, number in zip(copy, numbers, strict=True)]
            weights = (own * torch.tensor(used)).to(processes.device, torch.float64)
            draws = validation_draws(
                batch.keys,
                positions,
                total,
                objective.latent_shape(batch),
                num_timesteps,
                numbers=numbers,
                count=count,
                sample_posterior=sample_posterior,
            )
            with autocast():
                terms = objective.module(**objective.inputs(batch, draws))
            for row, losses in enumerate((terms.loss, terms.mse, terms.vlb)):
                sums[row] += (losses.double() * weights).sum()
            sums[3] += weights.sum()
            band = (draws.t * BANDS // num_timesteps).to(processes.device)
            sums[4 : 4 + BANDS].index_add_(0, band, terms.mse.double() * weights)
            sums[4 + BANDS :].index_add_(0, band, weights)
    return sums


def _means(sums: list[float], prior: bool, num_timesteps: int) -> dict[str, float]:
    loss, mse, vlb, weight, *bands = sums
    if prior:
        return {"val_prior_loss": loss / weight, "val_prior_mse": mse / weight}
    means = {"val_loss": loss / weight, "val_mse": mse / weight, "val_vlb": vlb / weight}
    for number, (total_mse, counted) in enumerate(zip(bands[:BANDS], bands[BANDS:], strict=True)):
        if counted:
            first, last = (edge * num_timesteps // BANDS for edge in (number, number + 1))
            means[f"val_mse_t{first}_{last - 1}"] = total_mse / counted
    return means
