"""What a run waits for and what memory it takes: measured, recorded, shown."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from line_run import line_trainer
from train_setup import records

from hydit_core.train import usage
from hydit_core.train.distributed import Processes
from hydit_core.train.page.collect import collect
from hydit_core.train.usage import Usage, resident_bytes

ALONE = Processes(0, 1, torch.device("cpu"))


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(usage, "time", clock)
    return clock


def step(found: Usage, clock: Clock, *, waits: float, works: tuple[float, ...]) -> None:
    for seconds in works:
        with found.waiting():
            clock.now += waits
        with found.working():
            clock.now += seconds
    found.step_done()


def test_seconds_and_share_of_a_step_since_the_last_record(clock: Clock) -> None:
    found = Usage(ALONE)
    step(found, clock, waits=7.0, works=(1.0,))  # the first wait starts the workers
    step(found, clock, waits=0.5, works=(1.0, 2.0))
    clock.now += 1000.0  # validating is neither
    with found.saving():
        clock.now += 3.0
    first = found.flush()
    assert first["save_stall"] == 3.0 and "save_stall" not in found.flush()
    assert (first["data_wait"], first["data_share"]) == (0.5, round(1.0 / 5.0, 4))
    assert (found.flush()["data_wait"], found.flush()["data_share"]) == (0.0, 0.0)
    step(found, clock, waits=3.0, works=(1.0,))
    again = found.flush()
    assert (again["data_wait"], again["data_share"]) == (3.0, 0.75)


def test_of_several_processes_the_largest(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for the slowest one; what it waits for is what all wait for."""
    processes = Processes(1, 3, torch.device("cpu"))
    tables: list[torch.Tensor] = []

    def exchanged(own: torch.Tensor) -> torch.Tensor:
        tables.append(own)
        return own + torch.tensor(
            [[4.0, 0.9, 0.0, 1e6, 0.0], [0.0] * 5, [5.0, 0.1, 2.0, 1.0, 0.0]], dtype=own.dtype
        )

    monkeypatch.setattr(processes, "sum", exchanged)
    found = Usage(processes)
    step(found, clock, waits=0.0, works=(1.0,))
    values = found.flush()
    assert (values["data_wait"], values["data_share"], values["rss_mib"]) == (5.0, 0.9, 1e6)
    assert values["save_stall"] == 2.0
    assert not tables[0][[0, 2]].any() and "device_peak_mib" not in values


def test_the_memory_of_this_process() -> None:
    before = resident_bytes()
    kept = torch.ones(16 << 20)  # 64 MiB
    assert 48 << 20 < resident_bytes() - before < 256 << 20
    assert kept.numel()


def test_a_run_that_waits_says_so(tmp_path: Path) -> None:
    """In its records and on its page; one that does not is silent."""
    for name, seconds, waits in (("slow", 0.05, True), ("fast", 0.0, False)):
        folder = tmp_path / name
        slow = lambda number, seconds=seconds: time.sleep(seconds if number else 0)  # noqa: E731
        busy = lambda number: time.sleep(0.01)  # noqa: E731
        assert line_trainer(folder, steps=4, loading=slow, during=busy).run()
        found = [record for record in records(folder, without=()) if "loss" in record]
        assert all(record["rss_mib"] > 10 for record in found)
        assert found[0]["data_wait"] == 0.0  # the start
        assert (found[-1]["data_share"] > 0.5) == waits
        page = collect(folder)
        assert [one["say"] for one in page["warnings"]] == (["waits"] if waits else [])
        assert len(page["curves"]["rss_mib"]["mean"]) == 4 and len(page["curves"]["data_share"]["mean"]) == 4
