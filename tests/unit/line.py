"""A network of a few numbers for the real loop, quick to import: ``y = W x + b``, with ``|y - target|^2``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from hydit_core.data.dataset import Batch
from hydit_core.diffusion.losses import LossTerms
from hydit_core.train.distributed import Processes

ROWS = 3
WEIGHTS = np.array([1.0, 0.5, 2.0])
PROCESSES = Processes(0, 1, torch.device("cpu"))


class Line(nn.Module):
    """A module with the names that the trainer sorts by."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(3, 4))

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> LossTerms:
        loss = (self.blocks(x) - target).square().sum(1)
        return LossTerms(loss, loss, torch.zeros_like(loss))


def numbers(*key: int, shape: tuple[int, ...]) -> np.ndarray:
    """Exact in float32, so that both sides start from the same."""
    return np.random.default_rng(key).normal(size=shape).astype(np.float32).astype(np.float64)


class LineObjective:
    """The part of an objective that the loop asks for."""

    export_name, start_key = "line.safetensors", "none"
    schedule = range(1000)

    def __init__(self) -> None:
        self.module = Line()
        self.parts = SimpleNamespace(whole=None)
        with torch.no_grad():
            self.module.blocks[0].weight.copy_(torch.from_numpy(numbers(1, shape=(4, 3))))
            self.module.blocks[0].bias.copy_(torch.from_numpy(numbers(2, shape=(4,))))

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters(prefix="dit"))

    def latent_shape(self, batch: Batch) -> tuple[int, int, int]:
        return 1, 1, 1

    def inputs(self, batch: Batch, draws: Any) -> dict[str, torch.Tensor]:
        x, target = example(batch.step)
        return {"x": torch.from_numpy(x).float(), "target": torch.from_numpy(target).float()}

    def fixed_in_export(self) -> list[nn.Parameter]:
        return []

    def export(self, path: Path, **how: Any) -> None:
        pass


def example(number: int) -> tuple[np.ndarray, np.ndarray]:
    """x (3, 3) and targets (3, 4) of micro-batch ``number``; their size grows, and the gradients with it."""
    return numbers(3, number, shape=(ROWS, 3)), (1 + number) * numbers(4, number, shape=(ROWS, 4))


def batch_of(number: int, weights: np.ndarray = WEIGHTS) -> Batch:
    sizes = torch.zeros(ROWS, 2, dtype=torch.int64)
    return Batch(
        step=number, keys=list("abc"), captions=[""] * ROWS, size=(8, 8), original_sizes=sizes, crops=sizes,
        positions=torch.arange(ROWS), weights=torch.from_numpy(weights).float(),
    )  # fmt: skip


class LineData:
    """Micro-batches by number; two validation batches, the second filled up with rows that count nothing."""

    layout = SimpleNamespace(validation=(0, 1, 2, 3), prior_validation=())
    order = None

    def fingerprint(self) -> str:
        return ""

    def loader(self, start: int, end: int) -> Iterator[Batch]:
        return iter([batch_of(number) for number in range(start, end)])

    def validation_copies(self, *, prior: bool = False) -> int:
        return 1

    def validation_batches(self, *, prior: bool = False) -> Iterator[Batch]:
        if prior:
            yield batch_of(22, np.array([1.0, 1.0, 0.0]))
            return
        yield batch_of(20, np.ones(ROWS))
        yield batch_of(21, np.array([1.0, 0.0, 0.0]))
