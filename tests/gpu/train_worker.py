"""A process that trains: ``python train_worker.py JOBS.json RESULTS.json``, one job after another.

A job is {"id", "config", "overrides", "stop", "resume"}; its result says whether it ended as it should, with
the seconds of a step and the peak of the device's memory.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from hydit_core.train.config import load_config
from hydit_core.train.launch import train


def run(job: dict[str, Any]) -> dict[str, Any]:
    config = load_config(Path(job["config"]), job["overrides"])
    on_cuda = config.run.device.startswith("cuda")
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.monotonic()
    finished = train(config, resume=job["resume"], stop_after_micro=job["stop"])
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_cuda else 0.0
    return {"finished": finished, "seconds": time.monotonic() - start, "MiB": peak}


def main(jobs: Path, results: Path) -> None:
    found = {}
    for job in json.loads(jobs.read_text()):
        try:
            found[job["id"]] = run(job)
        except Exception as error:  # the others shall run
            traceback.print_exc()
            found[job["id"]] = {"error": f"{type(error).__name__}: {error}"[:600]}
        results.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
