"""Continuing a run: its checkpoint is found by one process, checked against the configuration, and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.dataset import TrainData
from ..data.mapped import MappedManifest
from ..data.order import hash_int
from ..errors import ConfigError, DataError
from . import checkpoint as checkpoints
from .checkpoint import Checkpoint, Progress
from .config import differences, up_to_date
from .distributed import Processes
from .health import Health
from .optim import Ema
from .parallel import shards
from .parallel.copies import Copies
from .place import go_on

if TYPE_CHECKING:
    from .loop import Trainer

Note = Callable[[str], None]


def find_checkpoint(where: Path, warn: Note, *, parts: bool = False) -> Checkpoint | None:
    """The newest valid checkpoint of a run's folder, or the one in ``where`` itself.

    None if there is none; ``parts``: see :func:`.checkpoint.load`. Raises :class:`HyditError` if there are
    only damaged ones.
    """
    if (where / "manifest.json").exists():
        return checkpoints.load(where, parts=parts)
    return checkpoints.load_latest(where / "checkpoints", warn, parts=parts)


def shared_checkpoint(
    where: Path,
    processes: Processes,
    warn: Note,
    into: Mapping[str, Tensor] | None = None,
    parallel: Copies | None = None,
) -> Checkpoint | None:
    """The first process's checkpoint, sent to all: the others may not see its disk.

    Where ``parallel`` splits the model, tensors that belong to one of ``into`` are split as that is; a
    checkpoint of parts is then read by each process, and only its parts.
    """
    parallel = parallel or Copies(processes)
    if processes.world == 1:
        return find_checkpoint(where, warn)
    own: list[Checkpoint] = []

    def look() -> dict[str, Any] | None:
        found = find_checkpoint(where, warn, parts=parallel.sharded)
        if found is None:
            return None
        own.append(found)
        shapes = {
            stem: {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in part.items()}
            for stem, part in found.tensors.items()
        }
        path = None if found.path is None else str(found.path)
        return {"progress": asdict(found.progress), "config": found.config, "path": path, "shapes": shapes}

    told = processes.from_main(look)
    if told is None:
        return None
    path = None if told["path"] is None else Path(told["path"])
    targets = into if parallel.sharded and into is not None else {}
    tensors: dict[str, dict[str, Tensor]] = {}
    for stem, shapes in told["shapes"].items():
        tensors[stem] = {}
        for name, (shape, dtype) in shapes.items():
            made = own[0].tensors[stem][name] if own else torch.empty(shape, dtype=getattr(torch, dtype))
            target = target_of(targets, name, tuple(shape))
            tensors[stem][name] = (
                processes.broadcast({name: made})[name] if target is None else parallel.split(made, target)
            )
    if path is not None and "weights" not in tensors:
        tensors |= _own_parts(path, targets)
    return Checkpoint(Progress(**told["progress"]), told["config"], tensors, path)


def _own_parts(path: Path, targets: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Of a checkpoint of parts, those of this process."""

    def target(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        found = target_of(targets, name, shape)
        return torch.empty(shape, dtype=dtype) if found is None else torch.empty_like(found, dtype=dtype)

    try:
        return shards.read(path / shards.FOLDER, target)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read here ({error}): where processes hold parts of the model, the run's "
            "folder has to be on a disk that all machines share"
        ) from error


def target_of(targets: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor | None:
    """The parameter that a tensor of a checkpoint belongs to: as its weight, its average or a moment."""
    found = targets.get(name) if name in targets else targets.get(name.rpartition("|")[0])
    return None if found is None or tuple(found.shape) != shape else found


def restore(trainer: Trainer, found: Checkpoint) -> list[str]:
    """Continue from a checkpoint; returns what differs in configuration and data, for notes to the user.

    Raises :class:`ConfigError` if the checkpoint does not belong to such a model.
    """
    where, start = found.path or "the checkpoint", trainer.objective.start_key
    config, progress = trainer.config, found.progress
    optimizer = config.optimizer.name
    try:
        before = found.config["optimizer"]["name"]
        if before != optimizer:
            raise ConfigError(
                f"was trained with optimizer.name = {before!r}, the configuration says "
                f"{optimizer!r}; keep it, or start a new run from the weights by {start}"
            )
        trainer.objective.check_resumable(found.config)
        changed = differences(up_to_date(found.config), config.model_dump(mode="json"))
        health = Health.from_state(progress.health)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{where}: state.json holds no training configuration ({error!r})") from error
    copy_into(trainer.objective.parameters(), found.tensors["weights"], f"{where}: weights", start)
    trainer.optimizer.load(found.tensors.get("optimizer", {}))
    trainer.progress = progress
    trainer.window.load(progress.window, trainer.processes.device)
    if trainer.ema is not None and "ema" in found.tensors:
        copy_into(trainer.ema.average, found.tensors["ema"], f"{where}: ema", start)
        trainer.ema.updates = progress.ema_updates
    elif trainer.ema is not None:
        trainer.ema = Ema(trainer.trained, config.ema)
    try:
        changed += go_on(trainer.data, progress, [trainer.global_batch, config.run.grad_accumulation])
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{where}: state.json holds no place in the data ({error!r})") from error
    changed += _changed_pictures(found.tensors.get("pictures", {}), trainer)
    # Of other pictures, or another objective, other losses are usual.
    afresh = any(line.startswith(("data", "objective", "model")) for line in changed)
    trainer.health = Health() if afresh else health
    if progress.batch != [trainer.global_batch, config.run.grad_accumulation]:
        progress.micro = 0  # the step begins again: half of it belongs to another batch
    if progress.micro:
        gradients = found.tensors.get("gradients", {})
        for name, parameter in trainer.trained.items():
            if name in gradients:
                parameter.grad = gradients[name].to(parameter.device, copy=True)
    return changed


def copy_into(targets: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str, start: str) -> None:
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


# -- pictures ----------------------------------------------------------------------------------------


def picture_stamps(data: TrainData) -> dict[str, Tensor]:
    """For each picture a hash of its key and one of its file's size and time of change, both (pictures,).

    None of data that are prepared: those are believed to be as they were then.
    """
    if isinstance(data.manifest, MappedManifest):
        return {}
    keys, stamps = [], []
    seen: dict[Path, int] = {}
    for row in range(len(data.manifest)):
        path = data.manifest.picture(row).path
        if path not in seen:  # a table holds many
            try:
                status = path.stat()
                seen[path] = _signed(status.st_size, status.st_mtime_ns)
            except OSError:
                seen[path] = 0
        keys.append(_signed(data.manifest.keys[row]))
        stamps.append(seen[path])
    return {"keys": torch.tensor(keys, dtype=torch.int64), "stamps": torch.tensor(stamps, dtype=torch.int64)}


def _signed(*parts: int | str) -> int:
    return hash_int(*parts) - (1 << 63)


def _changed_pictures(before: Mapping[str, Tensor], trainer: Trainer) -> list[str]:
    now = trainer.pictures
    if not now or before.keys() != now.keys():
        return []
    was = dict(zip(before["keys"].tolist(), before["stamps"].tolist(), strict=True))
    pairs = enumerate(zip(now["keys"].tolist(), now["stamps"].tolist(), strict=True))
    names = [trainer.data.manifest.keys[row] for row, (key, stamp) in pairs if was.get(key, stamp) != stamp]
    if not names:
        return []
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    files = "1 picture file was" if len(names) == 1 else f"{len(names)} picture files were"
    return [f"data: {files} written anew: {', '.join(names[:5])}{more}"]


def require_same_data(fingerprint: str, processes: Processes) -> None:
    """Raises :class:`DataError` if the processes see other pictures or captions than the first."""
    found = processes.gather([fingerprint])
    others = [rank for rank, value in enumerate(found) if value != found[0]]
    if others:
        raise DataError(
            f"process {others[0]} sees other pictures, captions or another order of them than process 0: "
            "give all machines the same files and the same configuration"
        )
