"""The training loop: micro-batches, updates, records, checkpoints, and one way out."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict
from itertools import islice

import torch
from torch import Tensor, nn

from ..data.dataset import Batch, TrainData
from ..data.order import hash_int
from ..errors import HyditError
from .batches import made_ahead
from .checkpoint import Checkpoint, NotWritten, Progress
from .config import TrainConfig
from .distributed import Processes, Unanswered
from .draws import TrainingDraws
from .encoding import Encoding, Prepared
from .health import Health
from .looks import Looks
from .metrics import LossWindow, Metrics
from .objectives.base import Objective
from .optim import Ema, in_blocks, learning_rate_factor, parameter_groups
from .optimizers import Optimizers
from .parallel.copies import Copies
from .place import position
from .saving import BEST, is_numbered
from .stopping import StopSignals, TrainingStopped, cause_of, forget_frames, keep_traceback
from .usage import NOTABLE_WAIT, Usage
from .validation import validate
from .watchdog import Watchdog, end_stuck
from .writing import Writer

AHEAD = 2
"""Micro-batches that are prepared while one is in training."""


class Diverged(HyditError):
    """Too many steps in a row were not finite."""


class SeenByAll(HyditError):
    """An error that all processes agreed upon at the end of a step."""


class Trainer:
    """One run. ``data`` must have been opened with the run's batch size, rank and world size."""

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        data: TrainData,
        processes: Processes,
        parallel: Copies | None = None,
    ) -> None:
        run = config.run
        self.config = config
        self.objective = objective
        self.data = data
        self.processes = processes
        self.folder = run.output_dir
        self.progress = Progress()
        self.health = Health()

        everything = objective.parameters()
        groups = parameter_groups(everything, config.optimizer)
        trained = {name for group in groups for name in group.names}
        for name, parameter in everything.items():
            parameter.requires_grad_(name in trained)
            if run.weights == "bf16" and name in trained and in_blocks(name, parameter):
                parameter.data = parameter.data.to(torch.bfloat16)
        self.parallel = parallel or Copies(processes)
        self.writer = Writer(config, objective, self.parallel)
        self.saver = self.writer.saver
        self.model: nn.Module = self.parallel.wrap(objective.module)
        # Anew: where they are split, parts have taken their places.
        self.trained = {name: p for name, p in objective.parameters().items() if name in trained}
        self.optimizer = Optimizers(groups, self.trained, config.optimizer)
        self.ema = Ema(self.trained, config.ema) if config.ema.enabled else None
        self.writer.prepare(objective)

        self.global_batch = run.batch_size * processes.world
        self.draws = TrainingDraws(
            config.objective,
            run.seed,
            self.global_batch * run.grad_accumulation,
            num_timesteps=len(objective.schedule),
            sample_posterior=config.data.posterior == "sample",
        )
        self.fingerprint = data.fingerprint()
        self.pictures: dict[str, Tensor] = {}
        """What the checkpoints remember of the picture files, see :func:`.restoring.picture_stamps`."""
        self.window = LossWindow(processes)
        self.usage = Usage(processes)
        self.watchdog = Watchdog(
            config.watchdog, lambda *spent: end_stuck(processes, self.folder, self.progress.step, *spent)
        )
        self.encoding = Encoding(objective, processes.device)
        self._stop = StopSignals()
        self._replaced: set[str] = set()
        self._saved: tuple[int, int] | None = None
        self._time_is_up = False
        self._weights_whole = self._gradients_whole = True

    # -- the run ---------------------------------------------------------------------------------

    def run(self, *, stop_after_micro: int | None = None) -> bool:
        """Train to the last step; True if it was reached, False if the run was interrupted.

        ``stop_after_micro`` interrupts after so many micro-batches, as a signal would.

        Raises:
            TrainingStopped: something went wrong on the way; what was done is saved if it is worth it.
            HyditError: the run cannot begin.
        """
        run, progress = self.config.run, self.progress
        self.metrics = Metrics(
            self.folder,
            start=progress.step - progress.due,
            resumed=progress.step > 0 or progress.micro > 0,
            total=run.steps,
            active=self.processes.is_main,
            tensorboard=self.config.metrics.tensorboard,
        )
        self.looks = Looks(
            self.config,
            self.objective,
            self.data,
            self.parallel,
            self.metrics,
            self.watchdog,
            measure=self._validate,
            averaged=self._averaged,
            averages=self.ema is not None or self.optimizer.averages,
        )
        with self._stop.handled(), self.watchdog.watching():
            try:
                self._train(stop_after_micro)
                finished = self._finished()
                self._end(finished)
            except Exception as error:
                with self.watchdog.phase("checkpoint"):
                    self.writer.settle()
                    raise self._stopped(error) from error
            finally:
                self.metrics.close()
        return finished

    def _train(self, stop_after_micro: int | None) -> None:
        progress = self.progress
        begun, before = time.monotonic(), progress.seconds
        if progress.step == 0 and progress.micro == 0:
            self.looks.at(progress)
        else:
            self._continued()
        self._look_at_the_clock()
        micro_batches = 0
        with contextlib.closing(self._batches()) as batches:  # closing ends the data workers
            while not self._finished() and (ready := self._next(batches)):
                for prepared in ready:
                    with self.usage.working(), self.watchdog.phase("step"):
                        stepped = self._micro_step(prepared)
                    progress.seconds = before + time.monotonic() - begun
                    micro_batches += 1
                    if stop_after_micro is not None and micro_batches >= stop_after_micro:
                        self._stop.ask(f"{stop_after_micro} micro-batches done")
                    if stepped:
                        self._after_step()
                        self._look_at_the_clock()

    def _finished(self) -> bool:
        progress = self.progress
        return progress.step >= self.config.run.steps or self._time_is_up or self.looks.learned_out(progress)

    def _look_at_the_clock(self) -> None:
        """All processes at the same step: their clocks differ."""
        if minutes := self.config.run.minutes:
            self._time_is_up = self.processes.any(self.progress.seconds >= 60 * minutes)

    def _continued(self) -> None:
        if self.processes.is_main:
            self.saver.continued(self.progress)
            if self.saver.misses_export(self.progress):
                self.saver.export(self._state())
        self.processes.barrier()
        if self.progress.due:
            self.metrics.advance()
            self._finish_step()

    def _end(self, finished: bool) -> None:
        """The last checkpoint and export, of a finished run or of an interrupted one."""
        progress = self.progress
        if (progress.step, progress.micro) != self._saved:
            self.save(background=False)
        with self.watchdog.phase("checkpoint"):  # of a stop right after a save, it may still be written
            self.writer.wait()
        if finished and self._time_is_up:
            self.metrics.note(f"ended at step {progress.step}: run.minutes = {self.config.run.minutes:g}")
        elif finished and progress.step < self.config.run.steps:
            best = progress.best
            self.metrics.note(
                f"ended at step {progress.step}: no validation was better than {best['val_loss']:.4f} at "
                f"step {best['step']} for {self.config.validation.patience:g} epochs; the best is in {BEST}"
            )
        if not finished:
            self.metrics.note(
                f"stopped ({self._stop.name}) at step {progress.step}"
                + (f", micro-batch {progress.micro}" if progress.micro else "")
                + f"; everything is saved. Continue with --resume {self.folder}"
            )

    def _batches(self) -> Generator[Prepared, None, None]:
        run, progress = self.config.run, self.progress
        start, end = progress.step * run.grad_accumulation + progress.micro, run.steps * run.grad_accumulation

        def prepare(number: int, batch: Batch) -> Prepared:
            step, micro = divmod(number, run.grad_accumulation)
            places = (batch.positions + micro * self.global_batch).tolist()
            draws = self.draws(step, places, self.objective.latent_shape(batch))
            return self.encoding.prepared(batch, draws)

        # Several processes take all micro-batches of a step at once, see _ready.
        depth = AHEAD if self.processes.world == 1 else max(AHEAD, run.grad_accumulation)
        return made_ahead(self.data.loader(start, end), range(start, end), prepare, depth)

    def _next(self, batches: Iterator[Prepared]) -> list[Prepared]:
        with self.usage.waiting(), self.watchdog.phase("data"):
            return self._ready(batches)

    def _ready(self, batches: Iterator[Prepared]) -> list[Prepared]:
        """What comes next: a micro-batch, of several processes all those of a step; nothing to stop.

        Processes must agree, and must not wait for each other inside an accumulation.
        """
        if self.processes.world == 1:
            self.writer.check()
            return [] if self._stop.name else [next(batches)]
        ahead: list[Prepared] = []
        cause = ""
        try:
            self.writer.check()
            ahead = list(islice(batches, self.config.run.grad_accumulation - self.progress.micro))
        except Exception as error:  # the others are to know of it
            cause = cause_of(error)
        if self.processes.any(bool(cause or self._stop.name)):
            causes = self.processes.gather([f"process {self.processes.rank}: {cause}"] if cause else [])
            if causes:
                raise SeenByAll("; ".join(causes))
            return []
        return ahead

    # -- what goes wrong -------------------------------------------------------------------------

    def _stopped(self, error: Exception) -> TrainingStopped:
        """Save what is worth it; the error that says what happened and how to go on."""
        cause = cause_of(error)
        if isinstance(error, Unanswered):
            cause = self.processes.failure() or cause
        if not isinstance(error, HyditError):
            cause += keep_traceback(error, self.folder)
        forget_frames(error)
        if not isinstance(error, SeenByAll):
            self.processes.fail(cause)
        if not self._gradients_whole or self.processes.world > 1:
            self._begin_step_again()
        told = self._told(error, cause)
        if isinstance(error, SeenByAll):
            with contextlib.suppress(HyditError):
                self.processes.barrier()  # a launcher ends them all when the first one ends
        return TrainingStopped(f"{cause.rstrip('.')}. {told}")

    def _told(self, error: Exception, cause: str) -> str:
        """What is saved, in words, after saving it; parts are saved by all processes together or by none."""
        told = "Process 0 tells what is saved"
        if self.parallel.sharded and not isinstance(error, SeenByAll | Diverged):
            return f"What came after the last checkpoint is lost. Continue with --resume {self.folder}"
        if self.processes.is_main or self.parallel.sharded:
            saved = self._save_after(error, cause)
        return saved if self.processes.is_main else told

    def _save_after(self, error: Exception, cause: str) -> str:
        """What is saved, in words, after saving it."""
        progress = self.progress
        done = f"step {progress.step}" + (f", micro-batch {progress.micro}" if progress.micro else "")
        resume = f"Continue with --resume {self.folder}"
        if isinstance(error, Diverged):
            good = self.saver.good_checkpoint(progress)
            if good is None:
                return (
                    "There is no good checkpoint to go on from: begin anew in another run.output_dir, "
                    "with a lower optimizer.lr or precision fp32"
                )
            return (
                "Lower optimizer.lr, or use precision fp32, and go on from the last good checkpoint: "
                f"--resume {good}"
            )
        if not self._weights_whole:
            return f"It happened inside the update after {done}, so the last checkpoint counts. {resume}"
        if isinstance(error, NotWritten):
            return f"Stopped at {done}, which is not saved: the checkpoint before it counts. {resume}"
        try:
            self._write()
        except Exception as second:
            what = "the export is not saved" if self.saver.has(progress) else "it is not saved"
            why = cause_of(second)
            return f"Stopped at {done}; {what}{'' if why in cause else f' ({why})'}. {resume}"
        return f"Stopped at {done}; everything is saved. {resume}"

    def _begin_step_again(self) -> None:
        """Forget the gradients of half a step."""
        self.window.forget(self.progress.micro)
        self.progress.micro = 0
        for parameter in self.trained.values():
            parameter.grad = None

    # -- one step --------------------------------------------------------------------------------

    def _micro_step(self, prepared: Prepared) -> bool:
        """Forward and backward of one micro-batch; True when it completed an optimizer step."""
        run, progress = self.config.run, self.progress
        step, micro = progress.step, progress.micro
        self._gradients_whole = False
        last = micro + 1 == run.grad_accumulation
        batch, inputs = prepared.batch, self.encoding.inputs(prepared)
        # Whatever draws from the global generator (a layer with dropout, say) is a function of the place too.
        torch.manual_seed(hash_int(run.seed, step, micro, self.processes.rank, "global") >> 1)
        with self.parallel.accumulating(last):
            with self._autocast():
                terms = self.model(**inputs)
            weights = batch.weights.to(terms.loss, non_blocking=True)
            terms = terms._replace(loss=terms.loss * weights)
            (terms.loss.mean() / run.grad_accumulation).backward()
        self.window.add(terms, batch)
        self._replaced.update(batch.skipped)
        progress.micro += 1
        self._gradients_whole = True
        if last:
            self._update()
        return last

    def _autocast(self) -> torch.autocast:
        kind = self.processes.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.config.run.precision == "bf16")

    def _update(self) -> None:
        """Clip, check, update, average; then clear the gradients."""
        run, progress = self.config.run, self.progress
        self._gradients_whole = False
        factor = learning_rate_factor(progress.step, run.steps, self.config.schedule)
        value = self.parallel.clip(self.trained.values(), run.clip_norm or math.inf)
        self.window.exchange(run.grad_accumulation)  # before the update: a process that dies loses no loss
        loss = self.window.step_loss(run.grad_accumulation)
        if math.isfinite(value):
            self._weights_whole = False
            # What rounds at random rounds alike in all processes, and again when it is resumed.
            torch.manual_seed(hash_int(run.seed, progress.step, "update") >> 1)
            self.optimizer.step(factor)
            progress.bad_in_a_row = 0
            if self.ema is not None:
                self.ema.update()
        else:
            self._skip(value)
        for parameter in self.trained.values():
            parameter.grad = None
        optimizer = self.config.optimizer
        rate = factor * optimizer.lr * self.optimizer.found
        self.window.close_step(value, rate, ratio=optimizer.loraplus_lr_ratio)
        progress.due = True
        progress.step += 1
        progress.micro = 0
        self._weights_whole = self._gradients_whole = True
        self.health.observe(loss, value)

    def _skip(self, norm: float) -> None:
        progress, step = self.progress, self.progress.step + 1
        progress.skipped += 1
        progress.bad_in_a_row += 1
        culprits = self.window.culprits()
        text = (
            f"step {step}: not finite (gradient norm {norm}), update left out "
            f"({progress.bad_in_a_row} in a row); batch: {', '.join(culprits)}"
        )
        self.metrics.note(text)
        self.metrics.record(step, {"skipped": progress.skipped, "keys": culprits})
        if progress.bad_in_a_row >= self.config.run.max_bad_steps:
            raise Diverged(f"{text}; run.max_bad_steps = {self.config.run.max_bad_steps}")

    # -- between steps -----------------------------------------------------------------------------

    def _after_step(self) -> None:
        if self.processes.is_main and not self.health.trouble:
            self.saver.went_well(self.progress)
        self.metrics.advance()
        self.usage.step_done()
        self._finish_step()

    def _finish_step(self) -> None:
        """Record, validation, pictures and checkpoint, where they are due.

        An error on the way, or another process that dies, ends the run after a step that counts. Until all
        is done ``progress.due`` stands in what is then saved, and all of it is done when the run goes on.
        """
        config, step = self.config, self.progress.step
        final = step == config.run.steps
        recorded = step % config.metrics.every == 0 or final or step == 1
        if recorded:
            self._log(step)
        with self.encoding.paused():
            best = self.looks.at(self.progress)
        if recorded:
            self.window.clear()
        self.progress.due = False
        kept = is_numbered(self.progress, config.checkpoint.keep_every)
        if step % config.checkpoint.every == 0 or kept or best or final:
            self.save(best=best, background=not final)

    def _log(self, step: int) -> None:
        values = self.window.means()
        if self.progress.skipped:
            values["skipped"] = self.progress.skipped
        seconds = self.progress.seconds
        values["seconds"] = round(seconds, 2)
        values |= self.usage.flush()
        shown = {"loss": f"{values['loss']:.4f}", "lr": f"{values['lr']:.2e}"}
        if values["data_share"] >= NOTABLE_WAIT:
            shown["waits for data"] = f"{values['data_share']:.0%}"
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

    def _validate(self) -> dict[str, float]:
        return validate(
            self.objective,
            self.data,
            self.processes,
            self._autocast,
            count=self.config.validation.draws,
            sample_posterior=self.draws.sample_posterior,
        )

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within it the model holds what is exported: averages, if the run keeps any."""
        if self.optimizer.averages:
            return self.optimizer.averaged()
        return contextlib.nullcontext() if self.ema is None else self.ema.swapped()

    # -- checkpoints -------------------------------------------------------------------------------

    def save(self, *, best: bool = False, background: bool = True) -> None:
        """A checkpoint and the exported model; in the background, training goes on once they are copied."""
        with self.watchdog.phase("checkpoint"), self.usage.saving():
            self.writer.wait()
            self._write(best=best, background=background)
            self.processes.barrier()
        self._saved = (self.progress.step, self.progress.micro)

    def _write(self, *, best: bool = False, background: bool = False) -> None:
        progress, trouble = self.progress, self.health.trouble
        final = progress.step >= self.config.run.steps
        if trouble:
            good = self.saver.good_checkpoint(progress)
            whole = f"the last good checkpoint is {good}" if good else "no checkpoint so far is a good one"
            self.metrics.note(
                f"warning: step {progress.step}: {trouble}: training has probably diverged; {whole}"
                + ("" if final else "; nothing is exported until it recovers")
            )
        export = final or not trouble
        self.writer.save(self._state(), progress, best=best, export=export, background=background)
        if final and not trouble and self.processes.is_main:
            self.saver.went_well(progress)

    def _state(self) -> Checkpoint:
        progress = self.progress
        gradients: dict[str, Tensor] = {}
        if progress.micro:
            # Of one process only: several are never interrupted inside an accumulation.
            gradients = {n: p.grad for n, p in self.trained.items() if p.grad is not None}
        progress.window = self.window.state()
        progress.batch = [self.global_batch, self.config.run.grad_accumulation]
        progress.data = self.fingerprint
        progress.order = position(self.data.order, progress.step * self.config.run.grad_accumulation)
        progress.health = asdict(self.health)
        progress.ema_updates = self.ema.updates if self.ema is not None else progress.ema_updates
        tensors = {
            "weights": {name: p.detach() for name, p in self.objective.parameters().items()},
            "optimizer": self.optimizer.state(),
            "gradients": gradients,
            "pictures": self.pictures,
        }
        if self.ema is not None:
            tensors["ema"] = self.ema.average
        elif self.optimizer.averages:  # they are not what is trained, and exported
            with self.optimizer.averaged():
                tensors["ema"] = {name: p.detach().clone() for name, p in self.trained.items()}
        return Checkpoint(progress, self.config.model_dump(mode="json"), tensors)
