"""When the checkpoints of a run are written: beside the training, or while it waits."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .background import Background, HostCopies
from .checkpoint import Checkpoint, Progress
from .config import TrainConfig
from .objectives.base import Objective
from .parallel import shards
from .parallel.copies import Copies
from .saving import Saver

_MODEL = ("weights", "optimizer", "ema")
"""What of a checkpoint is as large as the model."""


class Writer:
    """Writes checkpoints, and what is exported with them.

    In the background, what is to be written is copied into the host's memory first; then training goes on,
    and the next one waits until this one is written. With several processes, all of them have to save.

    It has to be made before ``parallel`` splits the networks.
    """

    def __init__(self, config: TrainConfig, objective: Objective, parallel: Copies) -> None:
        self.parallel = parallel
        self.processes = parallel.processes
        # Parts are gathered into the networks, and given up, while a thread would read them there.
        self._exported = skeleton(objective) if parallel.sharded else objective
        self.saver = Saver(config, self._exported)
        self._work = Background()
        self._copies = HostCopies(self.processes.device)
        self._copying: bool | None = None
        self._number = 0
        # What went wrong is told between steps, or when the next one is due.
        self.check, self.wait, self.settle = self._work.check, self._work.wait, self._work.settle

    def prepare(self, objective: Objective) -> None:
        """Once ``objective`` is split: what no checkpoint has of an export is kept as a whole."""
        exported = self._exported
        names = {id(parameter): name for name, parameter in exported.parameters().items()}
        fixed = {}
        pairs = zip(exported.fixed_in_export(), objective.fixed_in_export(), strict=True)
        for place, parameter in pairs if self.parallel.sharded else ():
            whole = self.parallel.gathered(parameter)
            if self.processes.is_main:
                fixed[id(place)] = whole.cpu()
        self.saver.know(names, fixed)
        exported.parts.whole = self.saver.whole

    def save(
        self,
        content: Checkpoint,
        progress: Progress,
        *,
        best: bool = False,
        export: bool = True,
        background: bool = False,
    ) -> None:
        """Write a checkpoint and, for ``export``, the model file. Call :meth:`wait` before.

        Args:
            content: its tensors are those of the run, or this process's parts of them.
            progress: of the run; it goes on.
            best: the checkpoint has the lowest validation loss so far.
            background: where there is memory for a copy, what goes wrong is raised later, by :meth:`check`.
        """
        if not (self.processes.is_main or self.parallel.sharded):
            return
        if self.processes.is_main:
            self.saver.begin(content.progress)
        self._number += 1
        content = dataclasses.replace(content, progress=copy.deepcopy(content.progress))
        job, tensors = self._job_of(content, progress, best, export)
        if background and self._may_copy(tensors):
            copies = self._copies.of(tensors)
            tensors.clear()
            tensors.update(copies)
            self._work.start(job)
        else:
            job()

    def _job_of(
        self, content: Checkpoint, progress: Progress, best: bool, export: bool
    ) -> tuple[Callable[[], None], dict[str, Tensor]]:
        """What this process has to do, and the tensors that it will then write, which may be replaced."""
        if not self.parallel.sharded:
            flat = shards.flat(content.tensors)

            def lead() -> None:
                content.tensors = shards.nested(flat)
                self._lead(content, progress, best, export)

            return lead, flat
        model = {stem: content.tensors.pop(stem) for stem in _MODEL if stem in content.tensors}
        parts, processes, number = shards.parts_of(model, self.processes), self.processes, self._number
        if not processes.is_main:
            return lambda: shards.write_beside(parts, processes, number), parts.tensors
        content.write_shards = lambda folder: shards.write(folder, parts, processes, number)
        return lambda: self._lead(content, progress, best, export), parts.tensors

    def _may_copy(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether to write in the background, which is decided once."""
        if self._copying is None:
            chosen = self.saver.config.checkpoint.background
            fits = chosen == "always" or (chosen == "auto" and self._copies.fit(tensors))
            self._copying = not self.processes.any(not fits) if self.parallel.sharded else fits
        return self._copying

    def _lead(self, content: Checkpoint, progress: Progress, best: bool, export: bool) -> None:
        """The first process's part."""
        try:
            self.saver.save(content, progress)
        except BaseException:
            if self.parallel.sharded:
                shards.give_up(self.processes, self._number)
            raise
        if export:
            self.saver.export(content, best=best)


def skeleton(objective: Objective) -> Objective:
    """A copy whose module has parameters without content, to export others in their places.

    What is no part of the module, such as encoders that are not trained, is shared.
    """
    parts, module = objective.parts, objective.module
    memo: dict[int, Any] = {id(buffer): buffer for buffer in module.buffers()}
    for parameter in module.parameters():
        if type(parameter) is nn.Parameter:
            memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), False)
        else:  # quantised, and not exported
            memo[id(parameter)] = parameter
    copied = {id(one) for one in module.modules()} | {id(parts)}
    for value in (*vars(objective).values(), *vars(parts).values(), parts.text.tokenizers):
        if id(value) not in copied and not isinstance(value, dict):
            memo[id(value)] = value
    return copy.deepcopy(objective, memo)
