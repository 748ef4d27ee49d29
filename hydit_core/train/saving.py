"""What a run leaves on disk: which checkpoints are kept, and the model files made from them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from ..dtypes import dtype_of
from . import checkpoint as checkpoints
from .checkpoint import Checkpoint, Progress
from .config import TrainConfig
from .objectives.base import Objective

BEST = "best.safetensors"
CHECKPOINTS = "checkpoints"


class Saver:
    """Writes the checkpoints and exports of one run, and removes the checkpoints that need not be kept.

    Kept are the newest ``keep_last``, the newest ``keep_last`` good ones, those of ``keep_every``, and the
    best. A checkpoint is good when the step after it went well: only then is it known what its weights are
    worth. So ``keep_last`` remain of a run that goes well, and one that diverges pushes no good one out.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        averaged: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.config = config
        self.objective = objective
        self.averaged = averaged
        self.folder = config.run.output_dir
        self._written: str | None = None
        self._unproven: str | None = None

    def save(self, content: Checkpoint) -> None:
        """Write a checkpoint, unless it is the one written last, and remove those that need not be kept."""
        if not self.has(content.progress):
            checkpoints.write(self.folder / CHECKPOINTS, content)
        self.continued(content.progress)
        self._prune(content.progress)

    def has(self, progress: Progress) -> bool:
        """Whether the checkpoint of ``progress`` was written."""
        return checkpoints.folder_name(progress) == self._written

    def continued(self, progress: Progress) -> None:
        """The run stands at the checkpoint of ``progress``; the next step shows whether it is a good one."""
        name = checkpoints.folder_name(progress)
        if (self.folder / CHECKPOINTS / name).is_dir():
            self._written = name
        self._unproven = None if progress.health.get("trouble") else name

    def went_well(self, progress: Progress) -> None:
        """The step from the last checkpoint on went well, or nothing will come after it."""
        if self._unproven is None:
            return
        there = {path.name for path in checkpoints.listing(self.folder / CHECKPOINTS)}
        progress.good = [name for name in [*progress.good, self._unproven] if name in there]
        self._unproven = None
        self._prune(progress)

    def good_checkpoint(self, progress: Progress) -> Path | None:
        """The newest checkpoint that is known to be good."""
        found = checkpoints.listing(self.folder / CHECKPOINTS)
        return next((path for path in found if path.name in progress.good), None)

    def _prune(self, progress: Progress) -> None:
        settings = self.config.checkpoint
        found = checkpoints.listing(self.folder / CHECKPOINTS)
        good = [path for path in found if path.name in progress.good]
        kept = {*found[: settings.keep_last], *good[: settings.keep_last]}
        if settings.keep_best and progress.best:
            kept |= {path for path in found if path.name == step_name(int(progress.best["step"]))}
        if settings.keep_every:
            kept |= {path for path in found if _is_kept_for_good(path.name, settings.keep_every)}
        checkpoints.remove(path for path in found if path not in kept)

    # -- exports -----------------------------------------------------------------------------------

    def export(self, progress: Progress, *, best: bool = False) -> None:
        """Write the model as it is: the newest export, with ``keep_every`` a numbered one, and the best."""
        newest = self.folder / self.objective.export_name
        paths = [newest]
        if is_numbered(progress, self.config.checkpoint.keep_every):
            paths.append(numbered(newest, progress.step))
        if best:
            paths.append(self.folder / BEST)
        with self.averaged():
            for path in paths:
                self.write_model(path, progress)

    def export_missing(self, progress: Progress) -> None:
        """Write the numbered export of this step if a run that was killed could not."""
        path = numbered(self.folder / self.objective.export_name, progress.step)
        if is_numbered(progress, self.config.checkpoint.keep_every) and not path.exists():
            with self.averaged():
                self.write_model(path, progress)

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
