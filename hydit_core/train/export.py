"""The model file of a run, made from one of its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import torch
from pydantic import ValidationError

from ..errors import ConfigError
from ..weights.output import check_output
from . import checkpoint as checkpoints
from . import lock
from .checkpoint import Checkpoint
from .config import TrainConfig
from .objectives.base import Objective
from .objectives.table import make_objective, objective_of
from .parts import build
from .restoring import copy_into, find_checkpoint
from .saving import CHECKPOINTS, Saver, numbered, step_name
from .stopping import tell


def export(
    run: Path,
    *,
    step: int | None = None,
    ema: bool | None = None,
    out: Path | None = None,
    overwrite: bool = False,
) -> str:
    """Write the model of ``run`` (its folder, or a checkpoint's) as training does; returns what was written.

    Args:
        step: default: the newest valid checkpoint.
        ema: the averages or the weights as they were trained; default: the averages, if there are any.
        out: default: the file that training writes, which is replaced; with ``step`` the numbered one
            (``lora-00001000.safetensors``). The weights as trained get "-no-ema" into the name.
        overwrite: an existing ``out`` or numbered file may be replaced.

    Raises:
        ConfigError: there is no such checkpoint, it has no averages, or a training writes there now.
        HyditError: a damaged checkpoint, an output that is in the way, weights that the run needs are gone.
    """
    found = _checkpoint(run, step)
    assert found.path is not None
    averages = found.tensors.get("ema", {})
    if ema and not averages:
        raise ConfigError(f"{found.path} has no averages (ema.enabled was false): leave out --ema")
    averaged = bool(averages) if ema is None else ema
    config = _config(found)
    objective = _objective(config, found, averaged)

    folder = found.path.parent.parent
    target = folder / objective.export_name
    if step is not None:
        target = numbered(target, step)
    if averages and not averaged:
        target = target.with_stem(f"{target.stem}-no-ema")
    with contextlib.ExitStack() as held:
        if out is None and target.name == objective.export_name:
            held.enter_context(lock.hold(folder))  # a training would replace it too
        else:
            inputs = [found.path, *([config.model.init_from] if config.model.init_from else [])]
            target = out or target
            check_output(target, inputs, overwrite=overwrite)
        Saver(config, objective).write_model(target, found.progress)
    what = "averaged weights" if averaged else "weights as trained"
    return f"{target}: {what} of step {found.progress.step}"


def _checkpoint(run: Path, step: int | None) -> Checkpoint:
    if not run.is_dir():
        raise ConfigError(f"{run}: no such folder; give the output_dir of a run")
    if step is not None:
        path = run / CHECKPOINTS / step_name(step)
        if not path.is_dir():
            there = ", ".join(p.name for p in reversed(checkpoints.listing(run / CHECKPOINTS))) or "none"
            raise ConfigError(f"{run}: no checkpoint of step {step}; there: {there}")
        return checkpoints.load(path)
    found = find_checkpoint(run, tell)
    if found is None:
        raise ConfigError(f"{run}: no checkpoint there; give a run's output_dir or a checkpoint's folder")
    return found


def _config(found: Checkpoint) -> TrainConfig:
    try:
        config = TrainConfig.model_validate(found.config)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
        raise ConfigError(
            f"{found.path}: its configuration is not one of this version ({faults}); resume the run with its "
            "configuration file instead"
        ) from None
    return objective_of(config).for_export(config)


def _objective(config: TrainConfig, found: Checkpoint, averaged: bool) -> Objective:
    """The objective, holding the weights to write."""
    parts = build(config)
    if config.data.posterior != "auto":
        parts.info = dataclasses.replace(parts.info, posterior=config.data.posterior)
    objective = make_objective(config, parts, torch.device("cpu"))
    weights = found.tensors["weights"]
    if averaged:
        weights = {**weights, **found.tensors["ema"]}
    copy_into(objective.parameters(), weights, f"{found.path}: weights", objective.start_key)
    return objective
