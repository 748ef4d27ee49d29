"""Training a few numbers with the real loop: steps take a millisecond, and any of them can fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from line import PROCESSES, LineData, LineObjective, batch_of

from hydit_core.data.dataset import Batch
from hydit_core.train.checkpoint import Checkpoint
from hydit_core.train.config import TrainConfig
from hydit_core.train.distributed import Processes
from hydit_core.train.loop import Trainer
from hydit_core.train.restoring import find_checkpoint, restore

During = Callable[[int], None]
"""Called with the number of each micro-batch before it is computed; may raise."""


class Objective(LineObjective):
    """A line with targets of one size; ``factors`` multiplies the targets of some micro-batches."""

    export_name = "model.safetensors"

    def __init__(self, during: During, factors: Callable[[int], float]) -> None:
        super().__init__()
        self.during, self.factors = during, factors
        self.module.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, module: Any, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.during(inputs.pop("number"))
        return args, inputs

    def check_resumable(self, before: dict[str, Any]) -> None:
        pass

    def inputs(self, batch: Batch, draws: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(batch.step)
        x = torch.randn(3, 3, generator=generator)
        return {"x": x, "target": torch.ones(3, 4) * self.factors(batch.step), "number": batch.step}

    def export(self, path: Path, *, extra: dict[str, str], **how: Any) -> None:
        path.write_text(extra["hydit.training"])


class Data(LineData):
    """``loading`` is called with the number of each micro-batch before it is given out; may raise."""

    def __init__(self, loading: During) -> None:
        self.loading = loading

    def loader(self, start: int, end: int) -> Iterator[Batch]:
        for number in range(start, end):
            self.loading(number)
            yield batch_of(number)


def nothing(number: int) -> None:
    pass


def line_trainer(
    folder: Path,
    *,
    steps: int = 6,
    micro: int = 1,
    lr: float = 1e-2,
    during: During = nothing,
    loading: During = nothing,
    factors: Callable[[int], float] = lambda number: 1.0,
    resume: Path | None = None,
    processes: Processes = PROCESSES,
    **sections: dict[str, Any],
) -> Trainer:
    """A trainer that writes to ``folder``, continued from the checkpoint or run in ``resume``."""
    tables: dict[str, Any] = {
        "model": {"init_from": folder / "none"},
        "data": {"sources": [{"path": folder}], "validation": 4},
        "run": {"output_dir": folder, "steps": steps, "batch_size": 3, "grad_accumulation": micro},
        "optimizer": {"lr": lr},
        "ema": {"enabled": False},
        "checkpoint": {"every": 1000},
        "metrics": {"every": 1, "tensorboard": False},
    }
    for name, values in sections.items():
        tables[name] = {**tables.get(name, {}), **values}
    tables["run"]["device"] = "cpu"
    config = TrainConfig.model_validate(tables)
    trainer = Trainer(config, Objective(during, factors), Data(loading), processes)
    if resume is not None:
        found = find_checkpoint(resume, print)
        assert isinstance(found, Checkpoint)
        restore(trainer, found)
    return trainer


def names(folder: Path) -> list[str]:
    """The checkpoints there, oldest first."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())
