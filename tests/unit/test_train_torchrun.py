"""Two processes under torchrun: its exit codes, and what it starts anew."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train_distributed import run_script, several_processes
from train_setup import records

pytestmark = [pytest.mark.slow, several_processes]
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
RESTARTS = (*LAUNCHER, "--max-restarts=1")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("torchrun")
    done = run_script(folder, "undisturbed", launcher=RESTARTS)
    assert done.returncode == 0, done.stderr
    return folder / "0"


def test_it_reports_exit_code_3_and_ends_with_1(tmp_path: Path) -> None:
    """What docs/training.md says of it: a launcher's own code is not ours to choose."""
    done = run_script(tmp_path, "unreadable", launcher=LAUNCHER)
    assert done.returncode == 1
    assert re.search(r"exitcode +: 3 ", done.stderr), done.stderr
    assert "process 1: cannot read picture 7.png" in done.stderr
    assert [path.name for path in (tmp_path / "0/checkpoints").iterdir()] == ["step_00000002"]


@pytest.mark.parametrize("case", ["killed", "frozen"])
def test_it_starts_anew_what_was_killed_or_stopped(case: str, undisturbed: Path, tmp_path: Path) -> None:
    """kill -9 and SIGSTOP of one of two; the run ends with the bits of one that nothing disturbed."""
    begun = time.monotonic()
    done = run_script(tmp_path, case, launcher=RESTARTS, more={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"})
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 300
    for part in ("weights", "optimizer"):
        file = f"checkpoints/step_00000006/{part}.safetensors"
        found, expected = load_file(tmp_path / "0" / file), load_file(undisturbed / file)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert records(tmp_path / "0") == records(undisturbed)
