"""What a run records: metrics.jsonl always, tensorboard if installed, a progress bar on the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.dataset import Batch
from ..errors import DataError, HyditError
from ..new_files import replacing
from ..untrusted import parse_json
from . import RECORDS
from .distributed import Processes
from .stopping import silence_stderr

_STEPS = 1 << 53
"""More than any run has; what tensorboard and floating-point numbers hold."""


class Metrics:
    """Writer of one run's records; a ``Metrics`` of a process that is not the main one writes nothing.

    Records after step ``start`` are removed first: they belong to work that a resumed run repeats. A run that
    is not ``resumed`` begins with none.
    """

    def __init__(
        self,
        folder: Path,
        *,
        start: int,
        total: int,
        resumed: bool = True,
        active: bool = True,
        tensorboard: bool = True,
    ) -> None:
        self.active = active
        self._board: Any = None
        if not active:
            return
        path = self._path = folder / RECORDS
        last = start if resumed else -1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _truncate(path, last)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise _unwritable(path, error) from error
        if tensorboard:
            self._board = _summary_writer(folder / "tensorboard", last)
        self._bar = tqdm(
            total=total,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.05,
            # A log file wants a line now and then, a terminal a smooth bar.
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )

    def advance(self) -> None:
        """One more step on the bar."""
        if self.active:
            try:
                self._bar.update()
            except OSError:  # the terminal is gone
                self._bar.disable = True
                silence_stderr()

    def record(self, step: int, values: dict[str, Any], *, show: dict[str, str] | None = None) -> None:
        """Append ``{"step": step, **values}``; ``show`` goes to the progress bar."""
        if not self.active:
            return
        # JSON has no NaN: what is not finite is null, so that every reader can read the file.
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        try:
            self._file.write(json.dumps({"step": step, **plain}) + "\n")
            self._file.flush()
            if self._board is not None:
                for name, value in values.items():
                    if isinstance(value, (int, float)):
                        self._board.add_scalar(name, value, step)
        except OSError as error:
            raise _unwritable(self._path, error) from error
        if show:
            self._bar.set_postfix(show, refresh=False)

    def note(self, text: str) -> None:
        """Print a line on the terminal, above the bar."""
        if not self.active:
            return
        try:
            self._bar.write(text, file=sys.stderr)
        except OSError:  # the terminal is gone
            self._bar.disable = True
            silence_stderr()

    def close(self) -> None:
        """End the bar and the files; :meth:`record` has already reported what a full disk did not take."""
        if not self.active:
            return
        for part in (self._bar, self._file, self._board):
            if part is not None:
                with contextlib.suppress(OSError):
                    part.close()


def _summary_writer(folder: Path, last: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=last + 1)


def _unwritable(path: Path, error: OSError) -> HyditError:
    return HyditError(f"{path}: cannot be written: {error.strerror or error}")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a metrics file; lines that are not records (a crash cut off the last one) are skipped."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = parse_json(line, str(path), error=DataError)
            except DataError:
                continue
            step = record.get("step")
            if type(step) is int and 0 <= step < _STEPS:
                yield record


def _truncate(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [record for record in read(path) if record["step"] <= step]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")


class LossWindow:
    """Losses since the last record, kept on the device so that no step waits for them."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._terms: list[Tensor] = []
        self._norms: list[float] = []
        self._lr, self._ratio = 0.0, 1.0
        self._step: list[tuple[Tensor, list[str]]] = []

    def add(self, terms: Any, batch: Batch) -> None:
        per_sample = torch.stack([terms.loss, terms.mse, terms.vlb]).detach()  # (3, B)
        self._terms.append(per_sample.mean(1))
        self._step.append((per_sample[0], batch.keys))

    def exchange(self, micro_batches: int) -> None:
        """Let the terms of the last so many micro-batches be the means over all processes."""
        if self.processes.world > 1:
            everywhere = self.processes.sum(torch.stack(self._terms[-micro_batches:])) / self.processes.world
            self._terms[-micro_batches:] = everywhere.unbind()

    def close_step(self, norm: float, lr: float, *, ratio: float = 1.0) -> None:
        """``ratio`` is LoRA+'s, between the learning rate of a LoRA's B and that of its A."""
        self._norms.append(norm)
        self._lr, self._ratio = lr, ratio
        self._step.clear()

    def step_loss(self, micro_batches: int) -> float:
        """Mean loss of the last so many micro-batches."""
        return float(torch.stack(self._terms[-micro_batches:])[:, 0].mean())

    def forget(self, micro_batches: int) -> None:
        """Take back the last micro-batches: their step begins again."""
        del self._terms[len(self._terms) - micro_batches :]
        self._step.clear()

    def culprits(self) -> list[str]:
        """Keys of this step's samples, on all processes, whose loss is not finite; if there is none, all."""
        everyone = [key for _, keys in self._step for key in keys]
        guilty = [
            key
            for losses, keys in self._step
            for key, loss in zip(keys, losses.tolist(), strict=True)
            if not math.isfinite(loss)
        ]
        return self.processes.gather(guilty) or self.processes.gather(everyone)

    def state(self) -> dict[str, Any]:
        """For the progress record, so that an interruption leaves no trace in the next record."""
        terms = [[_plain(value) for value in term.tolist()] for term in self._terms]
        norms = [_plain(norm) for norm in self._norms]
        return {"terms": terms, "norms": norms, "rates": [self._lr, self._ratio]}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        self._terms = [torch.tensor([float(v) for v in term], device=device) for term in state["terms"]]
        self._norms = [float(norm) for norm in state["norms"]]
        self._lr, self._ratio = map(float, state.get("rates", (0.0, 1.0)))

    def clear(self) -> None:
        """What there was is in a record."""
        self._terms.clear()
        self._norms.clear()

    def means(self) -> dict[str, Any]:
        """Means since the last :meth:`clear`, without asking another process."""
        means = torch.stack(self._terms).nanmean(0)
        norms = [n for n in self._norms if math.isfinite(n)]
        norm = sum(norms) / len(norms) if norms else math.nan
        names = ("loss", "mse", "vlb")
        values: dict[str, Any] = {name: round(v, 6) for name, v in zip(names, means.tolist(), strict=True)}
        values |= {"grad_norm": round(norm, 4), "lr": self._lr}
        return values if self._ratio == 1 else {**values, "lr_b": self._lr * self._ratio}


def _plain(value: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)
