"""What a run shows of itself between steps: validation losses, sample pictures, whether it still learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

from ..data.dataset import TrainData
from .checkpoint import Progress
from .config import TrainConfig
from .metrics import Metrics
from .objectives.base import Objective
from .parallel.copies import Copies
from .samples import draw_samples, write_sheet
from .watchdog import Watchdog


class Looks:
    """Looks at one run's model when they are due.

    ``measure`` gives the validation losses of the weights as they are; within ``averaged()`` the model holds
    what is exported, which are other weights only if the run ``averages``.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        data: TrainData,
        parallel: Copies,
        metrics: Metrics,
        watchdog: Watchdog,
        *,
        measure: Callable[[], dict[str, float]],
        averaged: Callable[[], AbstractContextManager[None]],
        averages: bool,
    ) -> None:
        self.config = config
        self.objective = objective
        self.data = data
        self.parallel = parallel
        self.processes = parallel.processes
        self.metrics = metrics
        self.watchdog = watchdog
        self.measure = measure
        self.averaged = averaged
        self.averages = averages

    def at(self, progress: Progress) -> bool:
        """Validation and sample pictures, where they are due; True if it is the best validation so far."""
        config, step = self.config, progress.step
        final = step == config.run.steps
        best = False
        every = config.validation.every
        if every and (step % every == 0 or final):
            with self.watchdog.phase("validation"):
                best = self._validation(progress)
        every = config.samples.every
        if every and (step % every == 0 or final):
            with self.watchdog.phase("samples"):
                if self.processes.is_main or self.parallel.sharded:
                    self._samples(step)
                self.processes.barrier()
        return best

    def _validation(self, progress: Progress) -> bool:
        step = progress.step
        values = self.measure()
        if self.averages and step > 0:
            with self.averaged():
                averaged = self.measure()
            values.update({f"{name}_ema": value for name, value in averaged.items()})
        if not values:
            return False
        self.metrics.record(step, values)
        told = (f"{name} {value:.4f}" for name, value in values.items() if "_t" not in name)
        self.metrics.note(f"step {step}: " + ", ".join(told))
        return self._is_best(progress, values)

    def _is_best(self, progress: Progress, values: dict[str, float]) -> bool:
        """Whether what would be exported now has the lowest validation loss so far (``keep_best``)."""
        loss = values.get("val_loss_ema", values["val_loss"])
        if not self.config.checkpoint.keep_best or progress.step == 0 or not math.isfinite(loss):
            return False
        before, step = progress.best, progress.step
        if before.get("step") == step:  # after an interruption
            return True
        if before and loss >= before["val_loss"]:
            return False
        counted = {"counted_step": step, "counted_loss": loss}
        if before:
            last_step, last_loss = _counted(before)
            if loss > last_loss * (1 - self.config.validation.min_improvement):
                counted = {"counted_step": last_step, "counted_loss": last_loss}
        progress.best = {"step": step, "val_loss": loss, **counted}
        return True

    def _samples(self, step: int) -> None:
        with self.averaged():
            sheet = self.parallel.drawing(self._sheet)
        if self.processes.is_main:
            path = write_sheet(sheet, self.config.run.output_dir / "samples", step)
            self.metrics.note(f"step {step}: pictures in {path}")

    def _sheet(self) -> bytes:
        parts, device = self.objective.parts, self.processes.device
        return draw_samples(parts, self.config.samples, device, self.data.control)

    def learned_out(self, progress: Progress) -> bool:
        """Whether validation, which took place just now, has not become better for ``patience`` epochs."""
        validation, run = self.config.validation, self.config.run
        if not validation.patience or not progress.best or progress.micro or progress.step % validation.every:
            return False
        samples = run.batch_size * self.processes.world * run.grad_accumulation
        epochs = samples / max(1, len(self.data.samples))
        since = progress.step - _counted(progress.best)[0]
        return since * epochs >= validation.patience and progress.step * epochs >= validation.min_epochs


def _counted(best: dict[str, float]) -> tuple[float, float]:
    """Step and loss of the last validation that was better by ``min_improvement``."""
    return best.get("counted_step", best["step"]), best.get("counted_loss", best["val_loss"])
