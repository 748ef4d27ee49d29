"""How many processes prepare batches, where the configuration leaves it to the machine."""

from __future__ import annotations

import os
import sys

import torch

from .config import DataConfig

MOST = 8
MOST_OF_LATENTS = 2
"""Latents are only read, not decoded."""


def cores() -> int:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def chosen_workers(config: DataConfig) -> int:
    """``data.workers``, or, where that is unset, what suits this machine.

    A run on GPUs gets this process's share of the cores, but for one, and at most :data:`MOST`. A run on the
    CPU gets none: its cores compute. Nor does one where every worker would have to import everything anew.
    """
    if config.workers is not None:
        return config.workers
    if not torch.cuda.is_initialized() or sys.platform in ("win32", "darwin"):
        return 0
    here = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    most = MOST_OF_LATENTS if config.cache.latents else MOST
    return max(0, min(most, cores() // here - 1))
