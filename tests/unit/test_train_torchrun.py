"""Two processes under torchrun: its exit codes, and what it starts anew."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train_distributed import PAIRS, run_pairs, several_processes
from train_setup import ROOT, environment, records

pytestmark = [pytest.mark.slow, several_processes]


def torchrun(folder: Path, case: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A case of line_pairs.py in ``folder``; a process that has been stopped is killed after two seconds."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    return subprocess.run(
        [sys.executable, *launcher, PAIRS, folder, case],
        env={
            **environment(),
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, PAIRS.parent))),
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2",
        },
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_it_reports_exit_code_3_and_ends_with_1(tmp_path: Path) -> None:
    """What docs/training.md says of it: a launcher's own code is not ours to choose."""
    done = torchrun(tmp_path, "unreadable")
    assert done.returncode == 1
    assert re.search(r"exitcode +: 3 ", done.stderr), done.stderr
    assert "process 1: cannot read picture 7.png" in done.stderr
    assert [path.name for path in (tmp_path / "0/checkpoints").iterdir()] == ["step_00000002"]


def test_it_starts_anew_what_was_killed_or_stopped(tmp_path: Path) -> None:
    """kill -9, SIGSTOP, kill -9 of one of two; the run ends with the bits of one that nothing disturbed.

    The last time between an update and its record.
    """
    begun = time.monotonic()
    done = torchrun(tmp_path / "disturbed", "ended_thrice", "--max-restarts=3")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 300
    ended = run_pairs(tmp_path, "undisturbed")["undisturbed"]
    assert [one["code"] for one in ended] == [0, 0], ended
    disturbed, undisturbed = tmp_path / "disturbed/0", tmp_path / "undisturbed/0"
    for part in ("weights", "optimizer"):
        file = f"checkpoints/step_00000006/{part}.safetensors"
        found, expected = load_file(disturbed / file), load_file(undisturbed / file)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert records(disturbed) == records(undisturbed)
