"""Two processes train what one process trains with twice the batch."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import warm_commands
from safetensors.torch import load_file
from test_train_lora import write_lora_run
from train_setup import records, run_training, write_run

from hydit_core.errors import ConfigError
from hydit_core.train.distributed import Processes, _SignsOfLife, start

STEPS = ["run.steps=2", "schedule.warmup_steps=0", "validation.every=2"]


def start_rank(rank: int, port: int, config: Path, sets: list[str], *arguments: str) -> warm_commands.Started:
    """What torchrun starts, without its own process."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    overrides = [word for value in sets for word in ("--set", value)]
    return warm_commands.start(
        "-m", "hydit_core.train", config, *arguments, *overrides, environment=environment
    )


def run_two(config: Path, sets: list[str], *arguments: str) -> list[tuple[int, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [start_rank(rank, port, config, sets, *arguments) for rank in (0, 1)]
    ended = [process.wait(400) for process in processes]
    return [(one.returncode, one.stderr) for one in ended]


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ConfigError, match=r"cuda:1.* sees 1 CUDA device"):
        start("cuda")


several_processes = pytest.mark.skipif(
    os.name == "nt" or not torch.distributed.is_available(),
    reason="this torch has no distributed package, or gloo over TCP is not tested on this system",
)


@several_processes
def test_the_first_process_leaves_last_and_the_group_ends() -> None:
    """Its store answers the others until they have left."""
    store, device = dist.HashStore(), torch.device("cpu")
    dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=0, world_size=1)
    signs = [_SignsOfLife(dist.PrefixStore("signs", store), rank, 2, 10.0) for rank in (0, 1)]
    first, other = (Processes(rank, 2, device, 10.0, signs[rank]) for rank in (0, 1))
    leaving = threading.Thread(target=first.close, daemon=True)
    leaving.start()
    leaving.join(timeout=0.3)
    assert leaving.is_alive()
    other.close()
    leaving.join(timeout=4)  # it waits 5 s for those who never leave
    assert not leaving.is_alive()
    assert not dist.is_initialized()


@pytest.mark.slow
@several_processes
def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    assert run_training(config, *STEPS, f"run.output_dir={tmp_path / 'one'}", "run.batch_size=4")
    # One process begins, two go on: with the same global batch they see the same samples and draws.
    two = [*STEPS, f"run.output_dir={tmp_path / 'two'}"]
    assert not run_training(config, *two, "run.batch_size=4", stop_after_micro=2)
    finished = run_two(config, [*two, "run.batch_size=2"], "--resume", "auto")
    assert [code for code, _ in finished] == [0, 0], finished
    assert "continuing from" in finished[0][1] and "continuing from" not in finished[1][1]

    for part in ("weights", "ema"):
        file = f"checkpoints/step_00000002/{part}.safetensors"
        one, other = (load_file(tmp_path / run / file) for run in ("one", "two"))
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=2e-5)
    for mine, theirs in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert theirs == pytest.approx(mine, rel=1e-3, abs=2e-4)


@several_processes
def test_two_processes_share_a_base_in_few_bits(tmp_path: Path, tiny_model_file: Path) -> None:
    """gloo cannot send what is stored in 8 bits, and need not: it is frozen."""
    config = write_lora_run(tmp_path, tiny_model_file)
    common = ["run.steps=2", "validation.every=2", "lora.base_precision=fp8"]
    one, two = (f"run.output_dir={tmp_path / name}" for name in ("one", "two"))
    assert run_training(config, *common, one, "run.batch_size=4")
    finished = run_two(config, [*common, two, "run.batch_size=2"])
    assert [code for code, _ in finished] == [0, 0], finished
    for mine, theirs in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert theirs == pytest.approx(mine, rel=1e-3, abs=2e-4)


# -- processes that fail, or do not answer -----------------------------------------------------------


PAIRS = Path(__file__).with_name("line_pairs.py")


def run_pairs(folder: Path, *cases: str) -> dict[str, list[dict[str, Any]]]:
    """What became of the pairs of processes in line_pairs.py, of both processes in each case."""
    done = warm_commands.start(PAIRS, folder, *cases).wait(500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return run_pairs(tmp_path_factory.mktemp("pairs") / "all")


def codes(pair: list[dict[str, Any]]) -> list[int | None]:
    return [one["code"] for one in pair]


@several_processes
def test_only_the_first_process_needs_the_checkpoint(pairs: dict[str, list[dict[str, Any]]]) -> None:
    assert codes(pairs["resumes"]) == [0, 0], pairs["resumes"]
    assert codes(pairs["finds_nothing"]) == [0, 0], pairs["finds_nothing"]


@several_processes
def test_the_others_wait_for_one_that_works(pairs: dict[str, list[dict[str, Any]]]) -> None:
    assert codes(pairs["works_alone"]) == [0, 0], pairs["works_alone"]


@several_processes
def test_one_prepares_the_rows_that_all_map(pairs: dict[str, list[dict[str, Any]]]) -> None:
    assert codes(pairs["maps"]) == [0, 0], pairs["maps"]
    assert "prepared 8 pictures, in " in pairs["maps"][0]["said"] and not pairs["maps"][1]["said"]
    assert codes(pairs["maps_what_is_broken"]) == [2, 2]
    assert all("pictures without a caption: 1" in one["said"] for one in pairs["maps_what_is_broken"])


@several_processes
def test_an_error_of_one_ends_all_and_loses_nothing(pairs: dict[str, list[dict[str, Any]]]) -> None:
    for name, told in (("unreadable", "process 1: cannot read picture 7.png"), ("crashes", "process 1: out")):
        assert codes(pairs[name]) == [3, 3], pairs[name]
        first, other = pairs[name]
        assert told in first["said"] and "Stopped at step 2; everything is saved" in first["said"]
        assert "Process 0 tells what is saved" in other["said"]
        assert "Traceback" not in first["said"] + other["said"]


@several_processes
def test_one_that_does_not_answer_ends_the_run(pairs: dict[str, list[dict[str, Any]]]) -> None:
    """Stopped with SIGSTOP, in a step and while the others wait for it; the limit was 2 seconds."""
    for name, alive in (("other_is_silent", 0), ("first_is_silent", 1), ("silent_alone", 1)):
        survivor = pairs[name][alive]
        assert survivor["code"] == (2 if name == "silent_alone" else 3), pairs[name]
        assert survivor["seconds"] < 60
        assert "did not answer for 2 s (run.answer_within)" in survivor["said"]
        assert pairs[name][1 - alive]["code"] is None
    assert "Stopped at step 3; everything is saved" in pairs["other_is_silent"][0]["said"]
