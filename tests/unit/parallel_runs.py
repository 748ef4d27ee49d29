"""Trainings of several processes, forked from one that has imported everything.

``parallel_runs.py`` reads a JSON object from stdin: ``world`` is how many processes, ``runs`` a list of
``[configuration, overrides, resume]``, which they train one after the other. It prints a list: of each run
and process what ended it, or "".
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from train_setup import environment

from hydit_core.train.config import load_config
from hydit_core.train.launch import train
from hydit_core.train.parallel import sharded  # noqa: F401, imported once, before the forks

Run = tuple[Path, list[str], str | None]


def run_together(world: int, runs: list[Run]) -> list[list[str]]:
    """What ended each run in each process; "" where it reached its last step."""
    here = Path(__file__).resolve().parent
    paths = (here.parents[1], here.parent, here)
    job = {"world": world, "runs": [[str(config), sets, resume] for config, sets, resume in runs]}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(job),
        env={**environment(), "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told: list[list[str]] = json.loads(done.stdout.splitlines()[-1])
    return told


def _child(rank: int, ports: list[int], job: dict[str, Any]) -> list[str]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["world"]))
    os.environ.update(MASTER_ADDR="127.0.0.1", LOCAL_WORLD_SIZE=str(job["world"]))
    told = []
    for port, (config, sets, resume) in zip(ports, job["runs"], strict=True):
        os.environ["MASTER_PORT"] = str(port)
        try:
            done = train(load_config(Path(config), sets), resume=resume)
            told.append("" if done else "interrupted")
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def _main() -> None:
    torch.set_num_threads(1)
    job = json.load(sys.stdin)
    probes = [socket.socket() for _ in job["runs"]]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    ends = []
    for rank in range(job["world"]):
        out, into = os.pipe()
        if os.fork() == 0:
            os.write(into, json.dumps(_child(rank, ports, job)).encode())
            os._exit(0)
        os.close(into)
        ends.append(out)
    told = [json.loads(os.fdopen(out).read() or "[]") for out in ends]
    print()
    print(json.dumps([list(of_run) for of_run in zip(*told, strict=True)]))


if __name__ == "__main__":
    _main()
