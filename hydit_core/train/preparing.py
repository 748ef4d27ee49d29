"""``train prepare``: what a run's data are, listed in a file and, if asked for, encoded ahead."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial

import torch

from ..data.gathering import gather_into
from ..data.on_ray import gather_on_ray
from ..data.prepared import Gathering, described, prepare_again, prepared_layout
from ..errors import ConfigError
from ..ray_cluster import cluster
from .caches import encode_share, prepared, progress_of, require_caches
from .checks import check_machine
from .conditioning import CaptionFit, merged
from .config import TrainConfig
from .distributed import Processes
from .launch import processes_of
from .on_ray import encode
from .parts import build
from .stopping import ending_at_once, tell


def prepare(
    config: TrainConfig, *, features: bool = False, engine: str = "local", workers: int | None = None
) -> None:
    """Gather a run's pictures and captions anew into a file that every process of a training maps.

    Args:
        features: then encode what the caches lack, and count the tokens of all captions.
        engine: "ray" for a Ray cluster, else by this process and those that torchrun started beside it.
        workers: how many processes of the cluster encode; by default one a GPU, without any, one.

    Raises:
        ConfigError: what is asked for does not go together, or Ray is missing.
        HyditError: as :func:`~..data.prepared.prepare` and the caches do.
    """
    if features:
        require_caches(config)
    on_ray = engine == "ray"
    if on_ray and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--engine ray needs no torchrun: start it once, and Ray starts the others")
    with ending_at_once(), ExitStack() as held:
        if on_ray:
            held.enter_context(cluster())
            processes = Processes(0, 1, torch.device("cpu"))  # the GPUs are those of the cluster
        else:
            processes = held.enter_context(processes_of(config))
        if processes.is_main:
            _list(config, gather_on_ray if on_ray else gather_into, processes)
        processes.barrier()
        if not features:
            return
        if on_ray:
            with progress_of("encoding", processes) as progress:
                fits = encode(config, workers, progress)
        else:
            fits = _encode_together(config, processes)
        if processes.is_main:
            for fit in fits:
                for line in fit.lines():
                    tell(line)
            tell(f"the caches are complete, in {prepared(config).folder.parents[1]}")


def _list(config: TrainConfig, gathering: Gathering, processes: Processes) -> None:
    with progress_of("preparing", processes) as progress:
        manifest, changes = prepare_again(config.data, lambda rows: progress(rows, rows), gathering)
    prepared_layout(config.data, manifest)
    for line in manifest.findings.passed_over.lines():
        tell(line if line.startswith(" ") else f"warning: {line}")
    tell(described(manifest, changes))


def _encode_together(config: TrainConfig, processes: Processes) -> list[CaptionFit]:
    """All of the processes encode their shares; gives how all captions fit."""
    check_machine(config)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    bars = partial(progress_of, processes=processes)
    fits = encode_share(config, build(config), processes.device, processes.rank, processes.world, bars)
    processes.barrier()
    told = processes.gather([json.dumps(asdict(fit)) for fit in fits])
    return merged(CaptionFit(**json.loads(fit)) for fit in told)
