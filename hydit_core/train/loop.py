"""The training loop: micro-batches, updates, records, checkpoints, and a clean way out."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batch, TrainData, hash_int
from ..errors import ConfigError, HyditError
from . import checkpoint as checkpoints
from .checkpoint import Checkpoint, Progress
from .config import TrainConfig, differences
from .distributed import Processes
from .draws import Draws, TrainingDraws
from .metrics import LossWindow, Metrics
from .objectives import Objective
from .optim import Ema, Optimizers, learning_rate_factor, parameter_groups
from .samples import draw_samples
from .validation import validate

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Trainer:
    """One run. ``data`` must have been opened with the run's batch size, rank and world size."""

    def __init__(
        self, config: TrainConfig, objective: Objective, data: TrainData, processes: Processes
    ) -> None:
        run = config.run
        self.config = config
        self.objective = objective
        self.data = data
        self.processes = processes
        self.folder = run.output_dir
        self.progress = Progress()

        everything = objective.parameters()
        groups = parameter_groups(everything, config.optimizer)
        trained = {name for group in groups for name in group.names}
        for name, parameter in everything.items():
            parameter.requires_grad_(name in trained)
        self.trained = {name: p for name, p in everything.items() if name in trained}
        self.model: nn.Module = processes.wrap(objective.module)
        self.optimizer = Optimizers(groups, self.trained, config.optimizer)
        self.ema = Ema(self.trained, config.ema) if config.ema.enabled else None

        self.global_batch = run.batch_size * processes.world
        self.draws = TrainingDraws(
            config.objective,
            run.seed,
            self.global_batch * run.grad_accumulation,
            num_timesteps=len(objective.schedule),
            sample_posterior=config.data.posterior == "sample",
        )
        self._fingerprint = data.fingerprint()
        self._stop_signal: str | None = None
        self._window = LossWindow(processes)
        self._replaced: set[str] = set()

    # -- the run ---------------------------------------------------------------------------------

    def run(self, *, stop_after_micro: int | None = None) -> bool:
        """Train to the last step; True if it was reached, False if the run was interrupted.

        ``stop_after_micro`` interrupts after so many micro-batches, as a signal would.
        """
        run, progress = self.config.run, self.progress
        self.metrics = Metrics(
            self.folder,
            start=progress.step,
            resumed=progress.step > 0 or progress.micro > 0,
            total=run.steps,
            active=self.processes.is_main,
            tensorboard=self.config.metrics.tensorboard,
        )
        begun, before = time.monotonic(), progress.seconds
        if progress.step == 0 and progress.micro == 0:
            self._look(0)
        micro_batches = 0
        batches = self._batches()
        with self._signals():
            while progress.step < run.steps and not self._interrupted():
                stepped = self._micro_step(*next(batches))
                progress.seconds = before + time.monotonic() - begun
                micro_batches += 1
                if stop_after_micro is not None and micro_batches >= stop_after_micro:
                    self._stop_signal = self._stop_signal or f"{stop_after_micro} micro-batches done"
                if stepped:
                    self._after_step()
        batches.close()  # ends the data workers
        finished = progress.step >= run.steps
        if not finished:
            self.save()
            self.metrics.note(
                f"stopped ({self._stop_signal}) at step {progress.step}"
                + (f", micro-batch {progress.micro}" if progress.micro else "")
                + f"; everything is saved. Continue with --resume {self.folder}"
            )
        self.metrics.close()
        return finished

    def _batches(self) -> Generator[tuple[Batch, Draws], None, None]:
        """Every micro-batch with its draws, made in a thread while the one before is trained on."""
        run, progress = self.config.run, self.progress
        start, end = progress.step * run.grad_accumulation + progress.micro, run.steps * run.grad_accumulation
        batches = self.data.loader(start, end)
        # The first batch starts the data workers. They inherit the mask: Ctrl-C and a job scheduler's
        # SIGTERM reach every process of the group, but only this one decides when to stop.
        with _signals_blocked():
            first = next(batches)
        with ThreadPoolExecutor(1) as thread:
            ahead = thread.submit(self._with_draws, start, first)
            for number in range(start + 1, end):
                ready = ahead.result()
                ahead = thread.submit(self._next_with_draws, number, batches)
                yield ready
            yield ahead.result()

    def _next_with_draws(self, number: int, batches: Iterator[Batch]) -> tuple[Batch, Draws]:
        return self._with_draws(number, next(batches))

    def _with_draws(self, number: int, batch: Batch) -> tuple[Batch, Draws]:
        """``number`` counts micro-batches through the run."""
        step, micro = divmod(number, self.config.run.grad_accumulation)
        places = (batch.positions + micro * self.global_batch).tolist()
        return batch, self.draws(step, places, self.objective.latent_shape(batch))

    def _interrupted(self) -> bool:
        if self.processes.world == 1:
            return self._stop_signal is not None
        # Processes must agree, and must not wait for each other inside an accumulation.
        if self.progress.micro:
            return False
        return self.processes.any(self._stop_signal is not None)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for a clean stop; a second SIGINT stops at once."""

        def handle(number: int, frame: Any) -> None:
            if self._stop_signal and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop_signal = signal.Signals(number).name

        try:
            old = {s: signal.signal(s, handle) for s in _STOP_SIGNALS}
        except ValueError:  # not in the main thread
            old = {}
        try:
            yield
        finally:
            for number, previous in old.items():
                signal.signal(number, previous)

    # -- one step --------------------------------------------------------------------------------

    def _micro_step(self, batch: Batch, draws: Draws) -> bool:
        """Forward and backward of one micro-batch; True when it completed an optimizer step."""
        run, progress = self.config.run, self.progress
        step, micro = progress.step, progress.micro
        last = micro + 1 == run.grad_accumulation
        inputs = self.objective.inputs(batch, draws)
        # Whatever draws from the global generator (a layer with dropout, say) is a function of the place too.
        torch.manual_seed(hash_int(run.seed, step, micro, self.processes.rank, "global") >> 1)
        with self.processes.accumulating(self.model, last):
            with self._autocast():
                terms = self.model(**inputs)
            weights = batch.weights.to(terms.loss, non_blocking=True)
            terms = terms._replace(loss=terms.loss * weights)
            (terms.loss.mean() / run.grad_accumulation).backward()
        self._window.add(terms, batch)
        self._replaced.update(batch.skipped)
        progress.micro += 1
        if last:
            self._update()
        return last

    def _autocast(self) -> torch.autocast:
        kind = self.processes.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.config.run.precision == "bf16")

    def _update(self) -> None:
        """Clip, check, update, average; then the gradients start afresh."""
        run, progress = self.config.run, self.progress
        factor = learning_rate_factor(progress.step, run.steps, self.config.schedule)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), run.clip_norm or math.inf)
        value = float(norm)
        if math.isfinite(value):
            self.optimizer.step(factor)
            progress.bad_in_a_row = 0
            if self.ema is not None:
                self.ema.update()
        else:
            self._skip(value)
        for parameter in self.trained.values():
            parameter.grad = None
        self._window.close_step(value, factor * self.config.optimizer.lr)
        progress.step += 1
        progress.micro = 0

    def _skip(self, norm: float) -> None:
        progress, step = self.progress, self.progress.step + 1
        progress.skipped += 1
        progress.bad_in_a_row += 1
        culprits = self._window.culprits()
        text = (
            f"step {step}: not finite (gradient norm {norm}), update left out "
            f"({progress.bad_in_a_row} in a row); batch: {', '.join(culprits)}"
        )
        self.metrics.note(text)
        self.metrics.record(step, {"skipped": progress.skipped, "keys": culprits})
        if progress.bad_in_a_row >= self.config.run.max_bad_steps:
            raise HyditError(
                f"{text}. Stopped: run.max_bad_steps = {self.config.run.max_bad_steps}. "
                "Lower optimizer.lr, or use precision fp32, and resume from the last checkpoint"
            )

    # -- between steps -----------------------------------------------------------------------------

    def _after_step(self) -> None:
        config, step = self.config, self.progress.step
        final = step == config.run.steps
        self.metrics.advance()
        if step % config.metrics.every == 0 or final or step == 1:
            self._log(step)
        self._look(step)
        if step % config.checkpoint.every == 0 or final:
            self.save()

    def _log(self, step: int) -> None:
        values = self._window.flush()
        if self.progress.skipped:
            values["skipped"] = self.progress.skipped
        seconds = self.progress.seconds
        values["seconds"] = round(seconds, 2)
        shown = {"loss": f"{values['loss']:.4f}", "lr": f"{values['lr']:.2e}"}
        self.metrics.record(step, values, show=shown)
        if self.config.data.on_unreadable == "skip":
            self._tell_unreadable(step)

    def _tell_unreadable(self, step: int) -> None:
        """Name the training pictures that turned out unreadable, on all processes, each once."""
        known = self.progress.unreadable
        new = sorted(set(self.processes.gather(sorted(self._replaced))) - set(known))
        self._replaced.clear()
        if new:
            known += new
            self.metrics.record(step, {"unreadable": len(known), "keys": new})
            more = f" and {len(new) - 5} more" if len(new) > 5 else ""
            self.metrics.note(
                f"step {step}: {len(known)} pictures cannot be read so far, others are shown in their place; "
                f"new: {', '.join(new[:5])}{more}"
            )

    def _look(self, step: int) -> None:
        """Validation and sample pictures, where they are due at ``step``."""
        config, final = self.config, step == self.config.run.steps
        every = config.validation.every
        if every and (step % every == 0 or final):
            values = self._validate()
            if self.ema is not None and step > 0:
                with self.ema.swapped():
                    averaged = self._validate()
                values.update({f"{name}_ema": value for name, value in averaged.items()})
            if values:
                self.metrics.record(step, values)
                self.metrics.note(
                    f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items())
                )
        every = config.samples.every
        if every and (step % every == 0 or final):
            if self.processes.is_main:
                with self._averaged():
                    path = draw_samples(
                        self.objective.parts,
                        config.samples,
                        self.folder / "samples",
                        step,
                        self.processes.device,
                        self.data.control,
                    )
                self.metrics.note(f"step {step}: pictures in {path}")
            self.processes.barrier()

    def _validate(self) -> dict[str, float]:
        drawn = self.draws.sample_posterior
        return validate(self.objective, self.data, self.processes, self._autocast, sample_posterior=drawn)

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.ema is None else self.ema.swapped()

    # -- checkpoints -------------------------------------------------------------------------------

    def save(self) -> None:
        """A checkpoint and, at the end of a step, the exported model."""
        progress = self.progress
        gradients: dict[str, Tensor] = {}
        if progress.micro:
            # Of one process only: several are never interrupted inside an accumulation.
            gradients = {n: p.grad for n, p in self.trained.items() if p.grad is not None}
        progress.window = self._window.state()
        progress.batch = [self.global_batch, self.config.run.grad_accumulation]
        progress.data = self._fingerprint
        if self.processes.is_main:
            tensors: dict[str, dict[str, Tensor]] = {
                "weights": {name: p.detach() for name, p in self.objective.parameters().items()},
                "optimizer": self.optimizer.state(),
                "gradients": gradients,
            }
            if self.ema is not None:
                tensors["ema"] = self.ema.average
                progress.ema_updates = self.ema.updates
            content = Checkpoint(progress, self.config.model_dump(mode="json"), tensors)
            keep = self.config.checkpoint.keep_last
            checkpoints.save(self.folder / "checkpoints", content, keep_last=keep)
            self._export()
        self.processes.barrier()

    def _export(self) -> None:
        settings = self.config.checkpoint
        extra = {
            "hydit.training": f"step {self.progress.step} of {self.config.run.steps}, "
            f"batch {self.draws.step_size}, seed {self.config.run.seed}",
            **settings.metadata,
        }
        with self._averaged():
            self.objective.export(
                self.folder / self.objective.export_name,
                dtype=DTYPES[settings.export_dtype],
                all_in_one=settings.export_all_in_one,
                extra=extra,
            )

    def restore(self, found: Checkpoint) -> list[str]:
        """Continue from a checkpoint; returns what differs in the configuration, for a note to the user.

        Raises :class:`ConfigError` if the checkpoint does not belong to such a model.
        """
        where, start = found.path or "the checkpoint", self.objective.start_key
        optimizer = self.config.optimizer.name
        before = found.config.get("optimizer", {}).get("name", optimizer)
        if before != optimizer:
            raise ConfigError(
                f"{where}: was trained with optimizer.name = {before!r}, the configuration says "
                f"{optimizer!r}; keep it, or start a new run from the weights by {start}"
            )
        try:
            self.objective.check_resumable(found.config)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        _copy_into(self.objective.parameters(), found.tensors.get("weights", {}), f"{where}: weights", start)
        self.optimizer.load(found.tensors.get("optimizer", {}))
        self.progress = found.progress
        self._window.load(found.progress.window, self.processes.device)
        if self.ema is not None and "ema" in found.tensors:
            _copy_into(self.ema.average, found.tensors["ema"], f"{where}: ema", start)
            self.ema.updates = found.progress.ema_updates
        elif self.ema is not None:
            self.ema = Ema(self.trained, self.config.ema)
        changed = differences(found.config, self.config.model_dump(mode="json"))
        if found.progress.data not in ("", self._fingerprint):
            changed.append("data: other pictures, captions or batches than before, in another order")
        if found.progress.batch != [self.global_batch, self.config.run.grad_accumulation]:
            found.progress.micro = 0  # the step begins again: half of it belongs to another batch
        if found.progress.micro:
            gradients = found.tensors.get("gradients", {})
            for name, parameter in self.trained.items():
                if name in gradients:
                    parameter.grad = gradients[name].to(parameter.device, copy=True)
        return changed


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    old = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _copy_into(targets: dict[str, Any], tensors: dict[str, Tensor], where: str, start: str) -> None:
    """Raises :class:`ConfigError`; ``start`` is the key by which a new run takes these weights."""
    missing = sorted(set(targets) - set(tensors))
    foreign = sorted(set(tensors) - set(targets))
    if missing or foreign:
        names = ", ".join((missing or foreign)[:3])
        raise ConfigError(
            f"{where} do not fit this configuration: {len(missing)} missing, {len(foreign)} unknown "
            f"({names}); to start a new run from these weights use {start}"
        )
    with torch.no_grad():
        for name, target in targets.items():
            if target.shape != tensors[name].shape:
                raise ConfigError(
                    f"{where}: {name} has shape {tuple(tensors[name].shape)}, "
                    f"the configuration asks for {tuple(target.shape)}"
                )
            target.copy_(tensors[name])


Note = Callable[[str], None]


def find_checkpoint(where: Path, warn: Note) -> Checkpoint | None:
    """The newest valid checkpoint of a run's folder, or the one in ``where`` itself.

    None if there is none. Raises :class:`HyditError` if there are only damaged ones.
    """
    if (where / "manifest.json").exists():
        return checkpoints.load(where)
    return checkpoints.load_latest(where / "checkpoints", warn)
