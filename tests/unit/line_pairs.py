"""Pairs of training processes, forked from one that has imported the loop: ``line_pairs.py FOLDER [CASE]``.

Under torchrun ``line_pairs.py FOLDER CASE``.

Prints one JSON object: for each case and rank the exit code (None: it had to be killed), what it said, and
after how many seconds it ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from line_run import line_trainer

from hydit_core.data import prepared
from hydit_core.data.dataset import open_dataset
from hydit_core.errors import DataError
from hydit_core.train import distributed
from hydit_core.train.config import load_config
from hydit_core.train.distributed import Processes
from hydit_core.train.restoring import restore, shared_checkpoint
from hydit_core.train.stopping import TrainingStopped

LIMIT = 2.0
GRACE = 15.0
"""Seconds that a process has to end by itself after the first one did."""
Case = Callable[[Processes, Path], None]


def resumes(processes: Processes, folder: Path) -> None:
    """Only the first process's folder holds a checkpoint."""
    if processes.is_main:
        assert not line_trainer(folder).run(stop_after_micro=3)
    trainer = line_trainer(folder, processes=processes, run={"batch_size": 3})
    found = shared_checkpoint(folder, processes, print)
    assert found is not None
    restore(trainer, found)
    assert trainer.progress.step == 3
    assert trainer.run()
    total = processes.sum(torch.stack([p.detach().sum() for p in trainer.trained.values()]))
    mine = torch.stack([p.detach().sum() for p in trainer.trained.values()])
    torch.testing.assert_close(total, 2 * mine)
    assert (folder / "model.safetensors").exists() == processes.is_main


def finds_nothing(processes: Processes, folder: Path) -> None:
    assert shared_checkpoint(folder, processes, print) is None


def works_alone(processes: Processes, folder: Path) -> None:
    """The first process takes longer than the limit, and the other waits for it."""
    if processes.is_main:
        time.sleep(2 * LIMIT)
    processes.barrier()


def unreadable(processes: Processes, folder: Path) -> None:
    def loading(number: int) -> None:
        if processes.rank == 1 and number == 5:
            raise DataError("cannot read picture 7.png: no such file")

    line_trainer(folder, processes=processes, micro=2, loading=loading).run()


def crashes(processes: Processes, folder: Path) -> None:
    def during(number: int) -> None:
        if processes.rank == 1 and number == 5:
            raise RuntimeError("out of memory: tried to allocate 2 GiB")

    line_trainer(folder, processes=processes, micro=2, during=during).run()


def silent(rank: int, processes: Processes, folder: Path) -> None:
    def during(number: int) -> None:
        if processes.rank == rank and number == 3:
            os.kill(os.getpid(), signal.SIGSTOP)

    line_trainer(folder, processes=processes, during=during).run()


def other_is_silent(processes: Processes, folder: Path) -> None:
    silent(1, processes, folder)


def first_is_silent(processes: Processes, folder: Path) -> None:
    silent(0, processes, folder)


def silent_alone(processes: Processes, folder: Path) -> None:
    """While it draws pictures or saves, with the other waiting."""
    processes.barrier()
    if processes.is_main:
        os.kill(os.getpid(), signal.SIGSTOP)
    processes.barrier()


def maps(processes: Processes, folder: Path) -> None:
    """One prepares rows that are many, both map them; the batches are those of rows that each keeps."""
    from train_setup import write_run  # with what follows, most of what there is to import

    from hydit_core.train import launch

    place = folder.parent / "both"
    prepared.FEW = launch.FEW = 3
    if processes.is_main:
        write_run(place)
    processes.barrier()
    config = load_config(
        place / "train.toml", [f"data.cache.dir={place / 'cache'}", "data.buckets.enabled=true"]
    )
    for _ in range(2):
        data = launch.open_together(config, processes)
        kept = open_dataset(config.data, seed=0, batch_size=2, world_size=2, rank=processes.rank)
        assert isinstance(data.layout.own, np.memmap) and not isinstance(kept.layout.own, np.memmap)
        for one, other in zip(kept.loader(0, 9), data.loader(0, 9, workers=1), strict=True):
            assert (one.keys, one.captions, one.size) == (other.keys, other.captions, other.size)
            assert torch.equal(one.pixels, other.pixels) and torch.equal(one.positions, other.positions)
        assert data.fingerprint() == processes.from_main(data.fingerprint)
        assert len(list(place.glob("cache/*/*/rows.arrow"))) == 1
        processes.barrier()


def maps_what_is_broken(processes: Processes, folder: Path) -> None:
    """Whoever prepares meets the error; the other ends with it."""
    from train_setup import write_run

    from hydit_core.train import launch

    place = folder.parent / "both"
    prepared.FEW = launch.FEW = 3
    if processes.is_main:
        write_run(place)
        (place / "pictures" / "6.txt").unlink()
    processes.barrier()
    config = load_config(place / "train.toml", [f"data.cache.dir={place / 'cache'}"])
    try:
        launch.open_together(config, processes)
    except Exception as error:
        processes.fail(str(error))
        raise


def _goes_on(
    processes: Processes,
    folder: Path,
    ends: dict[int, tuple[int, signal.Signals]],
    records: dict[int, int] | None = None,
) -> None:
    """In some attempts of a launcher process 1 gets a signal at some micro-batch; the next one resumes.

    ``records``: in which attempts it is killed when the record of which step is made.
    """
    records = records or {}
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    at, received = ends.get(attempt, (-1, signal.SIGKILL))

    def during(number: int) -> None:
        if processes.rank == 1 and number == at:
            os.kill(os.getpid(), received)

    trainer = line_trainer(folder, processes=processes, during=during, checkpoint={"every": 3})
    flush = trainer.usage.flush

    def record() -> dict[str, float]:
        if processes.rank == 1 and records.get(attempt) == trainer.progress.step:
            os.kill(os.getpid(), signal.SIGKILL)
        return flush()

    trainer.usage.flush = record  # type: ignore[method-assign]
    found = shared_checkpoint(folder, processes, print)
    assert (found is None) == (attempt == 0)
    if found is not None:
        restore(trainer, found)
        processes.barrier()
    assert trainer.run()


def ended_thrice(processes: Processes, folder: Path) -> None:
    """Killed at the fifth of six steps; after the restart, frozen there; then killed before its record."""
    _goes_on(processes, folder, {0: (4, signal.SIGKILL), 1: (4, signal.SIGSTOP)}, {2: 5})


def undisturbed(processes: Processes, folder: Path) -> None:
    _goes_on(processes, folder, {})


CASES = [
    resumes,
    finds_nothing,
    works_alone,
    unreadable,
    crashes,
    other_is_silent,
    first_is_silent,
    silent_alone,
    maps,
    maps_what_is_broken,
]
MORE_CASES = [unreadable, ended_thrice, undisturbed]
"""For torchrun, and what its runs are compared with."""


def child(case: Case, rank: int, port: int, folder: Path) -> int:
    folder.mkdir(parents=True)
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
    os.environ.update(
        {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    )
    return work(case, folder)


def work(case: Case, folder: Path) -> int:
    """One process's part; its exit code."""
    try:
        processes = distributed.start("cpu", LIMIT)
        try:
            case(processes, folder)
        finally:
            processes.close()
    except TrainingStopped as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 3
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def pair(case: Case, folder: Path) -> list[dict[str, object]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    begun = time.monotonic()
    ranks = {}
    for rank in (0, 1):
        pid = os.fork()
        if pid == 0:
            os._exit(child(case, rank, port, folder / str(rank)))
        ranks[pid] = rank
    ended: dict[int, tuple[int | None, float]] = {}
    deadline = begun + 120.0
    while len(ended) < 2 and time.monotonic() < deadline:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            time.sleep(0.02)
            continue
        ended[ranks[pid]] = (os.waitstatus_to_exitcode(status), time.monotonic() - begun)
        grace = 0 if "silent" in case.__name__ else GRACE  # what was stopped stays so
        deadline = min(deadline, time.monotonic() + grace)
    for pid, rank in ranks.items():
        if rank not in ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            ended[rank] = (None, time.monotonic() - begun)
    return [
        {
            "code": ended[rank][0],
            "seconds": ended[rank][1],
            "said": (folder / str(rank) / "stderr").read_text("utf-8", "replace"),
        }
        for rank in (0, 1)
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    places, chosen = Path(sys.argv[1]), [case for case in MORE_CASES if case.__name__ in sys.argv[2:]]
    if "RANK" in os.environ:  # started by torchrun
        sys.exit(work(chosen[0], places / os.environ["RANK"]))
    if not chosen:  # once, before the forks, and not in the time that a pair has
        import train_setup  # noqa: F401

        from hydit_core.train import launch  # noqa: F401
    print(json.dumps({case.__name__: pair(case, places / case.__name__) for case in chosen or CASES}))
