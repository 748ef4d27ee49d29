"""Checkpoints that hold everything needed to continue, and survive a crash at any moment.

A checkpoint is a folder ``checkpoints/step_00001000`` of safetensors and JSON files, no pickles:

* ``weights``    parameters of the trained module, as they are trained
* ``ema``        their averages (if enabled)
* ``optimizer``  ``name|key`` -> moments and step counts
* ``gradients``  only when training stopped inside an accumulation
* ``pictures``   hashes of the training pictures' names, sizes and times
* ``shards``     in place of the first three where processes hold parts of the model: a folder, see
  :mod:`.parallel.shards`
* ``state.json`` the progress record: step, micro-batch, counters, configuration
* ``manifest.json`` size and SHA-256 of each of the above

It is written under another name, flushed to disk, and renamed: what bears the final name is
complete. On loading, a checkpoint that does not match its manifest is passed over for the one before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import HyditError, WeightsError
from ..new_files import remove_folder, replacing, unfinished
from ..untrusted import read_json
from ..weights.writer import save_safetensors
from .parallel import shards

FORMAT = 1
SHARDED = 2
"""The format of a checkpoint whose tensors are parts."""
_WRITING = ".writing-"
_TENSORS = ".safetensors"
_SHARD = re.compile(rf"{shards.FOLDER}/[\w-]+\.safetensors")
_NAME = re.compile(r"step_(\d{8,})(?:_micro_(\d+))?")


@dataclass
class Progress:
    """Where a run is. Everything random or scheduled is a function of this and of the configuration."""

    step: int = 0
    """Optimizer steps done."""
    micro: int = 0
    """Micro-batches of the next step that are already in the gradients."""
    ema_updates: int = 0
    unreadable: list[str] = field(default_factory=list)
    """Keys of the training pictures that could not be read and were replaced (``on_unreadable = "skip"``)."""
    skipped: int = 0
    """Steps left out because something was not finite, in the whole run."""
    bad_in_a_row: int = 0
    seconds: float = 0.0
    """Training time so far."""
    batch: list[int] = field(default_factory=lambda: [0, 0])
    """Samples of a micro-batch over all processes, and micro-batches of a step."""
    data: str = ""
    """Fingerprint of which sample is seen when."""
    order: dict[str, Any] = field(default_factory=dict)
    """Where it is in the data, see :func:`.place.position`."""
    window: dict[str, Any] = field(default_factory=lambda: {"terms": [], "norms": []})
    """Losses and gradient norms since the last record in metrics.jsonl."""
    health: dict[str, Any] = field(default_factory=dict)
    """What :class:`.health.Health` knows; its ``trouble`` is empty if training went well."""
    good: list[str] = field(default_factory=list)
    """Checkpoints from which a step was made that went well."""
    best: dict[str, float] = field(default_factory=dict)
    """Step and validation loss of the best validation so far (``checkpoint.keep_best``).

    ``counted_step`` and ``counted_loss`` are those of the last one that was better by ``min_improvement``.
    """
    due: bool = False
    """Whether what comes after ``step`` (record, validation, pictures, checkpoint) was cut off."""


@dataclass
class Checkpoint:
    """The content of a checkpoint in memory."""

    progress: Progress
    config: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    """File stem (weights, ema, optimizer, gradients) -> tensors."""
    path: Path | None = None
    write_shards: Callable[[Path], dict[str, Any]] | None = None
    """Where processes hold parts of the model: writes those into a folder; returns its manifest."""
    threads: int = field(default_factory=torch.get_num_threads)
    """That it was computed with."""


class NotWritten(HyditError):
    """A checkpoint could not be written. Nothing of it remains; those before it are still there."""


def folder_name(progress: Progress) -> str:
    micro = f"_micro_{progress.micro}" if progress.micro else ""
    return f"step_{progress.step:08d}{micro}"


def save(folder: Path, checkpoint: Checkpoint, *, keep_last: int) -> Path:
    """Write ``checkpoint`` into ``folder`` atomically, then remove all but the newest ``keep_last``.

    Raises :class:`NotWritten`.
    """
    target = write(folder, checkpoint)
    others = [path for path in listing(folder) if path != target]
    remove(others[keep_last - 1 :])
    return target


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write ``checkpoint`` into ``folder`` atomically; one of the same name is replaced.

    Raises :class:`NotWritten`.
    """
    target = folder / folder_name(checkpoint.progress)
    try:
        with replacing(target, folder=True) as temporary:
            remove(_unfinished(folder))
            _write(temporary, checkpoint)
    except (OSError, WeightsError, shards.NotSaved) as error:
        raise NotWritten(f"{target}: the checkpoint could not be written: {error}") from error
    return target


def remove(paths: Iterable[Path]) -> None:
    """Delete folders; one that cannot be deleted stays, which costs only disk space."""
    for path in list(paths):
        remove_folder(path)


def _unfinished(folder: Path) -> list[Path]:
    """What a crash left here, where this run alone writes."""
    # Earlier releases had a name of their own for it.
    return [*unfinished(folder), *folder.glob(f"{_WRITING}*")]


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    """The files of a checkpoint."""
    folder.mkdir()
    for stem, tensors in checkpoint.tensors.items():
        if tensors:
            save_safetensors(folder / f"{stem}{_TENSORS}", tensors)
    manifest = {}
    if checkpoint.write_shards is not None:
        found = checkpoint.write_shards(folder / shards.FOLDER)
        manifest = {f"{shards.FOLDER}/{name}": entry for name, entry in found.items()}
    record = {
        "format": SHARDED if manifest else FORMAT,
        "progress": asdict(checkpoint.progress),
        "config": checkpoint.config,
        "torch": torch.__version__,
        "threads": checkpoint.threads,
    }
    (folder / "state.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    for path in folder.iterdir():
        if path.is_file():
            manifest[path.name] = {"size": path.stat().st_size, "sha256": shards.sha256(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def listing(folder: Path) -> list[Path]:
    """Finished checkpoints in ``folder``, newest first."""
    if not folder.is_dir():
        return []
    found = [(place, p) for p in folder.iterdir() if (place := place_of(p.name)) and p.is_dir()]
    return [p for _, p in sorted(found, key=lambda pair: pair[0], reverse=True)]


def place_of(name: str) -> tuple[int, int] | None:
    """(step, micro-batch) of a checkpoint's folder by its name; None for anything else."""
    match = _NAME.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2] or 0))


def set_aside_newer(path: Path) -> list[Path]:
    """Rename the checkpoints beside ``path`` that are newer: damaged, or of another course of the run.

    A later ``--resume auto`` would take them for the end of the run that goes on from ``path``. Returns
    their new places.
    """
    beside = listing(path.parent)
    moved = []
    for newer in beside[: beside.index(path)] if path in beside else []:
        number, target = 1, path.parent / f"set-aside-{newer.name}"
        while target.exists():
            number += 1
            target = path.parent / f"set-aside-{newer.name}-{number}"
        moved.append(newer.rename(target))
    return moved


def load_latest(folder: Path, warn: Callable[[str], None], *, parts: bool = False) -> Checkpoint | None:
    """The newest valid checkpoint; damaged ones are reported through ``warn`` and passed over.

    ``parts``: see :func:`load`.

    None when there are no checkpoints. Raises :class:`HyditError` when all of them are damaged.
    """
    found = listing(folder)
    for number, path in enumerate(found, 1):
        try:
            return load(path, parts=parts)
        except HyditError as error:
            if number == len(found):
                raise HyditError(
                    f"{folder}: all {number} checkpoints are damaged; none can be resumed ({error})"
                ) from error
            warn(f"{error}; trying the checkpoint before it")
    return None


def load(path: Path, *, parts: bool = False) -> Checkpoint:
    """Read and verify one checkpoint; with ``parts``, without what :func:`.parallel.shards.read` reads.

    Raises :class:`HyditError` when it is incomplete or damaged.
    """
    try:
        names = _verified(path)
        record = read_json(path / "state.json", error=HyditError)
        if record["format"] not in (FORMAT, SHARDED):
            raise HyditError(
                f"{path}: checkpoint format {record['format']}, this version reads {FORMAT} and {SHARDED}; "
                "update hydit"
            )
        stems = [name.removesuffix(_TENSORS) for name in names if name.endswith(_TENSORS) and "/" not in name]
        tensors = {stem: load_file(path / f"{stem}{_TENSORS}") for stem in stems}
        if record["format"] == SHARDED and not parts:
            tensors |= shards.read(path / shards.FOLDER)
        progress = Progress(**record["progress"])
        _check_types(progress)
        config = record["config"]
        if not isinstance(config, dict):
            raise TypeError("config is no table")
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise HyditError(f"{path}: not a complete checkpoint ({error})") from error
    return Checkpoint(progress, config, tensors, path)


def _verified(path: Path) -> list[str]:
    """The names in a checkpoint's manifest, whose files match it. Raises :class:`HyditError`."""
    manifest = read_json(path / "manifest.json", error=HyditError)
    weights = [name for name in manifest if name == f"weights{_TENSORS}" or _SHARD.fullmatch(name)]
    missing = [
        *(() if "state.json" in manifest else ["state.json"]),
        *(() if weights else [f"weights{_TENSORS}"]),
    ]
    if missing:
        raise ValueError(f"manifest.json does not name {', '.join(missing)}")
    for name, entry in manifest.items():
        if Path(name).name != name and name not in weights:
            raise ValueError(f"manifest.json names {name!r}, which is no file in this folder")
        size = (path / name).stat().st_size
        if size != entry["size"]:
            raise HyditError(f"{path}: {name} is damaged ({size} bytes, {entry['size']} were written)")
        if shards.sha256(path / name) != entry["sha256"]:
            raise HyditError(f"{path}: {name} is damaged (its content is not what was written)")
    return list(manifest)


def _check_types(progress: Progress) -> None:
    """Raise TypeError for a value of another type than in a new record, ValueError for one below 0."""
    for name, usual in asdict(Progress()).items():
        value = getattr(progress, name)
        wanted = (int, float) if isinstance(usual, float) else type(usual)
        if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(usual, bool):
            raise TypeError(f"state.json: {name} is a {type(value).__name__}")
    if min(progress.step, progress.micro) < 0:
        raise ValueError("state.json: step and micro cannot be negative")
