"""Trainings of several processes, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import socket
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
import warm_commands

from hydit_core.train.config import load_config
from hydit_core.train.launch import train
from hydit_core.train.parallel import choice

Run = tuple[Path, list[str], str | None]
"""The configuration, what overrides it, and the checkpoint to go on from."""


def run_together(world: int, runs: list[Run]) -> list[list[str]]:
    """Train ``runs`` one after the other in ``world`` processes.

    What ended each run in each process; "" where it reached its last step.
    """
    probes = [socket.socket() for _ in runs]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    usual = multiprocessing.set_start_method, (warm_commands.METHOD, True)
    with ProcessPoolExecutor(world, warm_commands.CONTEXT, *usual) as pool:
        ranks = [pool.submit(_train, rank, world, ports, runs) for rank in range(world)]
        told = [rank.result() for rank in ranks]
    return [list(of_run) for of_run in zip(*told, strict=True)]


def _train(rank: int, world: int, ports: list[int], runs: list[Run]) -> list[str]:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", LOCAL_WORLD_SIZE=str(world))
    told = []
    for port, (config, sets, resume) in zip(ports, runs, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        try:
            with (
                torch.compiler.set_stance("force_eager"),  # torchao compiles its step, which takes a minute
                mock.patch.object(choice, "require_offload"),  # which refuses what has no GPU
            ):
                done = train(load_config(config, sets), resume=resume)
            told.append("" if done else "interrupted")
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
    return told
