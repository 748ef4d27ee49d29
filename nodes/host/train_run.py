"""A training from a graph: where it is kept, going on with it, watching it, and the LoRA that comes out."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from server import PromptServer

from ...hydit_core.errors import ConfigError, HyditError, printable
from ...hydit_core.images import to_tensor
from ...hydit_core.new_files import replacing, write_new
from ...hydit_core.train import lock
from ...hydit_core.train.config import TrainConfig, load_config
from ...hydit_core.train.launch import held_run
from ...hydit_core.train.quick.command import result
from ...hydit_core.train.quick.wish import Wish
from ...hydit_core.train.watch import RunView, blank, duration, planned_steps
from ...hydit_core.untrusted import is_plain_name, read_json
from .train_child import Child, TrainingFailed, require_trainer
from .train_paths import lora_folder, new_run
from .train_settings import Tables, configuration

log = logging.getLogger(__name__)

CONFIG, LOG = "config.toml", "log.txt"
_NOTE = "graph.json"
"""What a run's folder remembers of the graph that it is from, and of the LoRA that came out."""
_POLL = 0.25
_PATIENCE = 120
"""Seconds."""
_TOLD_LINES = 12


class Trained(NamedTuple):
    """What a training gave."""

    lora: Path
    text: str
    folder: Path


def train(wish: Wish, settings: Tables, name: str, key: str, *, node_id: str = "") -> Trained:
    """Train a LoRA, or go on with a training, or take what it gave if it is done.

    Args:
        settings: of :func:`.train_settings.user_settings`.
        name: of the file in ComfyUI's folder for LoRAs, and of the run's folder; what is there stays, and the
            new one gets a number.
        key: of all that the training depends on. A run of another key is another run.
        node_id: of the node that shows how far it is.

    Raises:
        HyditError: the trainer's error, in one line.
        InterruptProcessingException: interrupted; what was done is saved, and the next call goes on.
    """
    folder, note = _own_run(name, key)
    if not (note.get("done") and _has_lora(folder)):
        require_trainer()
        _run(replace(wish, out=folder), settings, key, node_id)
        note = _note(folder)
    lora = _published(folder, name, note)
    return Trained(lora, "\n".join(_told(folder, lora)), folder)


def fingerprint(parts: Any) -> str:
    """A key of everything in ``parts``, which JSON can hold."""
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def watch(folder: Path, *, follow: bool, node_id: str = "") -> tuple[str, Any, Any]:
    """A run as it is now: text, losses, newest samples, the last two as pictures.

    Args:
        follow: wait until it ends, and show how it goes.
    """
    view = RunView(folder)
    view.refresh()
    bar = comfy.utils.ProgressBar(1000, node_id=node_id or None)
    told = ""
    while follow and lock.holder(folder) is not None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        view.refresh()
        told = _advance(bar, view, planned_steps(folder), 0, told, node_id)
        time.sleep(_POLL)
    view.refresh()
    steps, holder = planned_steps(folder), lock.holder(folder)
    ended = _note(folder).get("done") is True or bool(steps and view.step >= steps)
    state = "running" if holder is not None else "ended" if ended else "stopped"
    lines = [f"{state}: {view.progress(steps if holder is not None else None)}"]
    lines.append(f"trained for {duration(view.seconds)}")
    lines += [f"newest samples: {path.name}" for path in view.sheets()[-1:]]
    return "\n".join(lines), view.curve() or blank(), view.sheet() or blank()


def as_image(picture: Any) -> torch.Tensor:
    """A picture as ComfyUI's IMAGE, (1, H, W, 3) in [0, 1]."""
    return ((to_tensor(picture) + 1) / 2).movedim(0, -1)[None]


# -- the run's folder ----------------------------------------------------------------------------------------


def _own_run(name: str, key: str) -> tuple[Path, dict[str, Any]]:
    """The folder of the run with this key, or of a new one, and what it remembers."""
    for number in count(1):
        folder = new_run(name, number)
        note = _note(folder)
        if note.get("key") == key or _is_free(folder, note):
            return folder, note if note.get("key") == key else {}
    raise AssertionError("unreachable")


def _note(folder: Path) -> dict[str, Any]:
    try:
        note: dict[str, Any] = read_json(folder / _NOTE, max_bytes=100_000)
    except HyditError:
        return {}
    return note


def _is_free(folder: Path, note: dict[str, Any]) -> bool:
    """Whether there is nothing, or only a run from a graph that failed before it had anything to keep."""
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    return held_run(folder) is None if note else not any(folder.iterdir())


def _write(path: Path, text: str) -> None:
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error


def _configured(wish: Wish, settings: Tables, key: str) -> TrainConfig:
    """What is trained by: written once; a run that goes on keeps what was chosen for it then."""
    folder = wish.folder
    path = folder / CONFIG
    if _note(folder).get("key") != key or not path.is_file() or held_run(folder) is None:
        text, notes = configuration(wish, settings)
        _write(path, text)
        _write(folder / _NOTE, json.dumps({"key": key, "notes": notes}))
    try:
        config = load_config(path)
    except ConfigError as error:
        first, *faults = str(error).splitlines()
        raise ConfigError(*(f"settings: {fault.strip()}" for fault in faults or [first])) from None
    given = [wish.pictures.resolve(), folder, *([wish.model.resolve()] if wish.model else [])]
    for place in _paths(config.model_dump()):
        if place.resolve() not in given and not place.resolve().is_relative_to(folder):
            raise ConfigError(f"{path} names {place}, which a graph does not give: delete this run's folder")
    return config


def _paths(value: Any) -> Iterator[Path]:
    """All paths in a configuration."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _paths(part)


# -- the training --------------------------------------------------------------------------------------------


def _run(wish: Wish, settings: Tables, key: str, node_id: str) -> None:
    folder = wish.folder
    _wait_for_another(folder, node_id)
    comfy.model_management.unload_all_models()  # before the memory is asked for what fits into it
    comfy.model_management.soft_empty_cache()
    try:
        config = _configured(wish, settings, key)
    except HyditError as error:
        raise HyditError("; ".join(line.strip() for line in str(error).splitlines())) from None
    child = Child(folder / CONFIG, folder / LOG)
    try:
        _watch(child, RunView(folder), config, node_id)
        child.check()
    except TrainingFailed as failed:
        for line in failed.lines:
            log.error("hydit: %s", line)
        raise
    finally:
        _end(child, node_id)
    if not _has_lora(folder):
        raise HyditError(f"{folder}: stopped before there was a LoRA; run it again to go on")
    _write(folder / _NOTE, json.dumps({**_note(folder), "done": True}))


def _wait_for_another(folder: Path, node_id: str) -> None:
    """Let a trainer that is still saving end, such as that of a ComfyUI that was killed."""
    end = time.monotonic() + _PATIENCE
    while lock.holder(folder) is not None and time.monotonic() < end:
        comfy.model_management.throw_exception_if_processing_interrupted()
        _show("waiting for the training that still writes there ...", node_id)
        time.sleep(_POLL)


def _watch(child: Child, view: RunView, config: TrainConfig, node_id: str) -> None:
    """Show how far it is until it ends."""
    bar = comfy.utils.ProgressBar(1000, node_id=node_id or None)
    steps, seconds = config.run.steps, 60 * config.run.minutes
    told = ""
    while child.running():
        comfy.model_management.throw_exception_if_processing_interrupted()
        view.refresh()
        told = _advance(bar, view, steps, seconds, told, node_id, "" if view.points else _last(child))
        time.sleep(_POLL)


def _advance(
    bar: Any, view: RunView, steps: int | None, limit: float, told: str, node_id: str, instead: str = ""
) -> str:
    """Show how far a run is, of so many steps or seconds; returns the line that is on the node then.

    Args:
        told: the line that is there.
        instead: what to say while there are no numbers.
    """
    done = max(view.step / steps if steps else 0, view.seconds / limit if limit else 0)
    picture = view.preview()
    bar.update_absolute(round(1000 * min(1.0, done)), preview=picture and ("JPEG", picture, None))
    text = instead or view.progress(None if limit else steps, limit)
    if text != told:
        _show(text, node_id)
    return text


def _end(child: Child, node_id: str) -> None:
    """Have it save and end; whoever interrupts once more does not want to wait for that."""
    child.ask_to_stop()
    if not child.running():
        return
    _show("saving ...", node_id)
    while child.running():
        if comfy.model_management.processing_interrupted():
            child.kill()
        time.sleep(_POLL)
    _show("stopped: run it again to go on", node_id)


def _last(child: Child) -> str:
    lines = child.lines()
    return lines[-1][:200] if lines else "starting the trainer ..."


def _show(text: str, node_id: str) -> None:
    """A line on the node while it runs."""
    server = PromptServer.instance
    if node_id and server.client_id is not None:
        server.send_progress_text(text, node_id, server.client_id)


# -- the LoRA ------------------------------------------------------------------------------------------------


def _has_lora(folder: Path) -> bool:
    try:
        return bool(result(folder))
    except HyditError:
        return False


def _published(folder: Path, name: str, note: dict[str, Any]) -> Path:
    """The run's LoRA in ComfyUI's folder for them: where it is already, or under a name that is free."""
    content = result(folder).read_bytes()
    known = note.get("lora")
    if is_plain_name(known) and _holds(lora_folder() / str(known), content):
        return lora_folder() / str(known)
    path = write_new(lora_folder() / f"{name}.safetensors", content, keep_same=True)
    _write(folder / _NOTE, json.dumps({**note, "lora": path.name}))
    return path


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.stat().st_size == len(content) and path.read_bytes() == content
    except OSError:
        return False


def _told(folder: Path, lora: Path) -> Iterator[str]:
    """What the node shows of a finished training."""
    view = RunView(folder)
    view.refresh()
    loss = "" if view.loss is None else f", loss {view.loss:.4f}"
    yield f"trained: {view.step} steps in {duration(view.seconds)}{loss}"
    yield f"LoRA: {lora.name}"
    yield f"run: {folder.relative_to(folder_paths.get_output_directory()).as_posix()}"
    notes = _note(folder).get("notes")
    if isinstance(notes, list):
        yield from (printable(str(note))[:300] for note in notes[:_TOLD_LINES])
    try:
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    yield from list(dict.fromkeys(line for line in lines if line.startswith("warning: ")))[:_TOLD_LINES]
