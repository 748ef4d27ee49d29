"""Which way of sharing a model ``run.parallel`` means here."""

from __future__ import annotations

import os
from typing import Literal

import torch

from ...errors import ConfigError
from ..distributed import Processes
from ..sections import RunSection
from .copies import Copies

Kind = Literal["ddp", "fsdp", "hsdp"]
_NEEDED = (2, 9)
"""The first version of torch whose checkpoints of parts are read here."""


def make(run: RunSection, kind: Kind, processes: Processes) -> Copies:
    """How these processes share the model.

    Raises :class:`ConfigError` if they cannot do so.
    """
    if run.parallel_offload:
        require_offload(processes)
    if processes.world == 1 or kind == "ddp":
        return Copies(processes)
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _NEEDED:
        needed = ".".join(map(str, _NEEDED))
        raise ConfigError(
            f"run.parallel = {kind!r} needs torch {needed} or newer, this is {torch.__version__}"
        )
    from .sharded import Sharded

    replicas = copies_of(run, processes.world) if kind == "hsdp" else 1
    half = run.precision == "bf16"
    return Sharded(processes, replicas=replicas, half=half, offload=run.parallel_offload)


def require_offload(processes: Processes) -> None:
    """Raise :class:`ConfigError` where there is nothing that could be offloaded."""
    if processes.device.type == "cpu":
        raise ConfigError(
            "run.parallel_offload takes parts of the model from GPUs into the host's memory, and here "
            "everything is in that: leave it out"
        )
    if processes.world == 1:
        raise ConfigError(
            "run.parallel_offload needs several processes, each with a GPU. For one GPU, run.weights = "
            "'bf16' with optimizer.name = 'adamw_8bit', or a LoRA, takes least memory"
        )


def copies_of(run: RunSection, world: int) -> int:
    """How many copies of the model ``world`` processes hold with HSDP.

    Raises :class:`ConfigError` if they cannot be dealt out evenly.
    """
    machines = world // int(os.environ.get("LOCAL_WORLD_SIZE", world))
    replicas = machines if run.parallel_replicas is None else run.parallel_replicas
    if world % replicas:
        raise ConfigError(
            f"run.parallel_replicas = {replicas} does not divide {world} processes: use a number that does"
        )
    return replicas
