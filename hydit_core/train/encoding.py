"""What frozen encoders make of a micro-batch, in a thread and on a stream of its own while others train."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..data.dataset import Batch
from ..data.workers import cores
from .draws import Draws
from .objectives.base import Objective

T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    """A micro-batch with its draws, and what its forward pass takes, unless that is still to be made."""

    batch: Batch
    draws: Draws
    inputs: dict[str, Any] | None = None
    made: torch.cuda.Event | None = None


class Encoding:
    """Makes an objective's inputs, ahead of the steps that take them.

    They are the same, bit for bit, as made within the step: nothing of them is drawn here, and every
    micro-batch is encoded by itself. A CPU all of whose cores compute the steps would only be disturbed:
    there they are made when they are due.
    """

    def __init__(self, objective: Objective, device: torch.device, *, ahead: bool | None = None) -> None:
        self.objective = objective
        self.device = device
        self.ahead = device.type != "cpu" or torch.get_num_threads() < cores() if ahead is None else ahead
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def prepared(self, batch: Batch, draws: Draws) -> Prepared:
        """For the thread that works ahead. Pictures that are encoded are not kept."""
        if not self.ahead:
            return Prepared(batch, draws)
        with self._lock:
            if self._stream is None:
                inputs, made = self.objective.inputs(batch, draws), None
            else:
                with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                    inputs = self.objective.inputs(_pinned(batch), _pinned(draws))
                    made = torch.cuda.Event()
                    made.record()
        lean = replace(batch, pixels=None, moments=None, control=None, mask=None, prompts=None)
        return Prepared(lean, draws, inputs, made)

    def inputs(self, prepared: Prepared) -> dict[str, Any]:
        """For the step: its inputs, ready on the device for what is queued from now on."""
        if prepared.inputs is None:
            return self.objective.inputs(prepared.batch, prepared.draws)
        if prepared.made is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(prepared.made)
            for tensor in _tensors(prepared.inputs):
                # Else its memory could be given to the next micro-batch while this step still reads it.
                tensor.record_stream(here)
        return prepared.inputs

    def paused(self) -> AbstractContextManager[Any]:
        """Within it the encoders are not in use here: they may be moved, or used by others."""
        return self._lock


def _pinned(values: T) -> T:
    """Batch or draws with their tensors in memory from which copies to a GPU do not stop this thread."""
    assert is_dataclass(values) and not isinstance(values, type)
    moved = {f.name: getattr(values, f.name) for f in fields(values)}
    return replace(values, **{n: v.pin_memory() for n, v in moved.items() if isinstance(v, Tensor)})


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_cuda else []
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return [tensor for one in inside for tensor in _tensors(one)]
