"""What a run leaves on disk: which checkpoints are kept, and the model files made from them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..dtypes import dtype_of
from . import checkpoint as checkpoints
from .checkpoint import Checkpoint, Progress
from .config import TrainConfig
from .objectives.base import Objective
from .parallel import shards

BEST = "best.safetensors"
CHECKPOINTS = "checkpoints"


class Saver:
    """Writes the checkpoints and exports of one run, and removes the checkpoints that need not be kept.

    Kept are the newest ``keep_last``, the newest ``keep_last`` good ones, those of ``keep_every``, and the
    best. A checkpoint is good when the step after it went well: only then is it known what its weights are
    worth. So ``keep_last`` remain of a run that goes well, and one that diverges pushes no good one out.

    A thread may write while training goes on: it gets copies. ``progress`` is that of the run, ``content``
    holds what it was when the checkpoint was due.
    """

    def __init__(self, config: TrainConfig, objective: Objective) -> None:
        self.config = config
        self.objective = objective
        self.folder = config.run.output_dir
        self._written: str | None = None
        self._writing: str | None = None
        self._unproven: str | None = None
        self._lock = threading.RLock()
        self._names: dict[int, str] = {}
        self._fixed: Mapping[int, Tensor] = {}
        self._value: Callable[[str], Tensor] | None = None

    # -- checkpoints -------------------------------------------------------------------------------

    def begin(self, progress: Progress) -> None:
        """A checkpoint of ``progress`` is due; the next step shows whether it is a good one."""
        name = checkpoints.folder_name(progress)
        with self._lock:
            self._writing = name
            self._unproven = None if progress.health.get("trouble") else name

    def save(self, content: Checkpoint, progress: Progress) -> None:
        """Write a checkpoint, unless it is the one written last, and remove those that need not be kept."""
        name = checkpoints.folder_name(content.progress)
        try:
            if not self.has(content.progress):
                checkpoints.write(self.folder / CHECKPOINTS, content)
            self._written = name
        finally:
            with self._lock:
                self._writing = None
        self._prune(progress.good, content.progress.best)

    def has(self, progress: Progress) -> bool:
        """Whether the checkpoint of ``progress`` was written."""
        return checkpoints.folder_name(progress) == self._written

    def continued(self, progress: Progress) -> None:
        """The run stands at the checkpoint of ``progress``; the next step shows whether it is a good one."""
        name = checkpoints.folder_name(progress)
        if (self.folder / CHECKPOINTS / name).is_dir() and not progress.due:
            self._written = name
        self._unproven = None if progress.health.get("trouble") else name

    def went_well(self, progress: Progress) -> None:
        """The step from the last checkpoint on went well, or nothing will come after it."""
        with self._lock:
            if self._unproven is None:
                return
            there = {path.name for path in checkpoints.listing(self.folder / CHECKPOINTS)}
            there |= {self._writing} if self._writing else set()
            progress.good = [name for name in [*progress.good, self._unproven] if name in there]
            self._unproven = None
            if self._writing:
                return  # what follows when it is written
        self._prune(progress.good, progress.best)

    def good_checkpoint(self, progress: Progress) -> Path | None:
        """The newest checkpoint that is known to be good."""
        found = checkpoints.listing(self.folder / CHECKPOINTS)
        return next((path for path in found if path.name in progress.good), None)

    def _prune(self, good: Sequence[str], best: Mapping[str, float]) -> None:
        settings = self.config.checkpoint
        with self._lock:
            found = checkpoints.listing(self.folder / CHECKPOINTS)
            sound = [path for path in found if path.name in good]
            kept = {*found[: settings.keep_last], *sound[: settings.keep_last]}
            if settings.keep_best and best:
                kept |= {path for path in found if path.name == step_name(int(best["step"]))}
            if settings.keep_every:
                kept |= {path for path in found if _is_kept_for_good(path.name, settings.keep_every)}
            checkpoints.remove(path for path in found if path not in kept)

    # -- exports -----------------------------------------------------------------------------------

    def know(self, names: Mapping[int, str], fixed: Mapping[int, Tensor]) -> None:
        """Say which tensor of a checkpoint a parameter (by its id) is, and what others are, as a whole."""
        self._names, self._fixed = dict(names), fixed

    def whole(self, tensor: Tensor) -> Tensor:
        """What stands for a tensor of the model in the file that is being exported."""
        name = self._names.get(id(tensor))
        if name is None or self._value is None:
            return self._fixed.get(id(tensor), tensor)
        return self._value(name)

    def export(self, content: Checkpoint, *, best: bool = False) -> None:
        """Write the model of a checkpoint, its averages if it has any.

        The newest export, with ``keep_every`` a numbered one, and the best.
        """
        progress = content.progress
        newest = self.folder / self.objective.export_name
        paths = [newest]
        if is_numbered(progress, self.config.checkpoint.keep_every):
            paths.append(numbered(newest, progress.step))
        if best:
            paths.append(self.folder / BEST)
        self._value = self._values(content)
        for path in paths:
            self.write_model(path, progress)
        self._value = None

    def _values(self, content: Checkpoint) -> Callable[[str], Tensor]:
        """Of each tensor what is exported; where this process has parts only, read from what all wrote."""
        if content.tensors.get("weights"):
            return {**content.tensors["weights"], **content.tensors.get("ema", {})}.__getitem__
        place = self.folder / CHECKPOINTS / checkpoints.folder_name(content.progress) / shards.FOLDER
        stored = shards.Stored(place)
        return lambda name: stored.get(f"ema/{name}" if f"ema/{name}" in stored else f"weights/{name}")

    def misses_export(self, progress: Progress) -> bool:
        """Whether a run that was killed could not write the numbered export of this step."""
        path = numbered(self.folder / self.objective.export_name, progress.step)
        there = (self.folder / CHECKPOINTS / checkpoints.folder_name(progress)).is_dir()
        return there and is_numbered(progress, self.config.checkpoint.keep_every) and not path.exists()

    def write_model(self, path: Path, progress: Progress) -> None:
        """Write the weights that the model holds now to ``path``."""
        config, settings = self.config, self.config.checkpoint
        step_size = progress.batch[0] * progress.batch[1]
        extra = {
            "hydit.training": f"step {progress.step} of {config.run.steps}, "
            f"batch {step_size}, seed {config.run.seed}",
            **settings.metadata,
        }
        self.objective.export(
            path,
            dtype=dtype_of(settings.export_dtype),
            all_in_one=settings.export_all_in_one,
            extra=extra,
        )


def step_name(step: int) -> str:
    """The name of the checkpoint at the end of ``step``."""
    return checkpoints.folder_name(Progress(step=step))


def numbered(path: Path, step: int) -> Path:
    """The export of one step: ``lora-00001000.safetensors`` for ``lora.safetensors``."""
    return path.with_name(f"{path.stem}-{step:08d}{path.suffix}")


def is_numbered(progress: Progress, every: int) -> bool:
    return bool(every) and progress.step > 0 and progress.micro == 0 and progress.step % every == 0


def _is_kept_for_good(name: str, every: int) -> bool:
    place = checkpoints.place_of(name)
    return place is not None and place[1] == 0 and place[0] % every == 0


def held_run(folder: Path, export_names: tuple[str, ...]) -> str | None:
    """The name of what an earlier run left in ``folder``: its newest checkpoint, or else an export."""
    found = [path.name for path in checkpoints.listing(folder / CHECKPOINTS)]
    if found:
        return found[0]
    stems = [Path(name).stem for name in export_names]
    patterns = [*export_names, BEST, *(f"{stem}-{'[0-9]' * 8}.safetensors" for stem in stems)]
    return next((path.name for pattern in patterns for path in sorted(folder.glob(pattern))), None)
