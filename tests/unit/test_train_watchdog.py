"""A process that hangs ends, says where, and leaves a run that goes on; one that works does not end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from line_run import line_trainer, names
from train_setup import environment

from hydit_core.train import watchdog
from hydit_core.train.sections import WatchdogSection
from hydit_core.train.watchdog import Watchdog

OFF = dict.fromkeys(WatchdogSection.model_fields, 0.0)


class Clock:
    """A watchdog whose looks come when they are asked for, after so many seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **limits: float) -> None:
        self.bitten: list[tuple[str, float]] = []
        self.now = 0.0
        self.dog = Watchdog(WatchdogSection(**limits), lambda *told: self.bitten.append(told))
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now)

    def looks(self, *pauses: float) -> list[tuple[str, float]]:
        left = list(pauses)

        def wait(tick: float) -> bool:
            if not left:
                return True
            self.now += left.pop(0)
            return False

        self.dog._over.wait = wait  # type: ignore[method-assign]
        self.dog._watch()
        return self.bitten


def test_it_bites_after_the_limit_of_the_phase_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, step=10, checkpoint=30)
    with clock.dog.phase("step"):
        assert not clock.looks(*[1] * 10)
        with clock.dog.phase("checkpoint"):
            assert not clock.looks(*[1] * 30)
        assert not clock.looks(*[1] * 10)  # what was before begins anew
        assert clock.looks(1, 1, 1) == [("step", 11.0)]
    clock.bitten.clear()
    assert not clock.looks(*[1] * 1000)  # in no phase


def test_zero_is_never(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, **{**OFF, "step": 5})
    with clock.dog.phase("data"):
        assert not clock.looks(*[1] * 5000)
    with Watchdog(WatchdogSection(**OFF), print).watching():  # without a thread
        pass


def test_a_process_that_was_stopped_as_a_whole_did_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-Z and fg an hour later, or a laptop that slept: one look comes late."""
    clock = Clock(monkeypatch, step=10)
    with clock.dog.phase("step"):
        assert not clock.looks(1, 3600, 1, 1)


def test_a_run_that_goes_well_is_left_alone(tmp_path: Path) -> None:
    """Each phase shorter than its limit, all together longer."""
    limits = dict.fromkeys(OFF, 0.4)
    trainer = line_trainer(
        tmp_path, steps=8, during=lambda number: time.sleep(0.1), validation={"every": 2}, watchdog=limits
    )
    trainer.watchdog.tick = 0.02
    assert trainer.run()


SCRIPT = """
import sys, threading, time
from pathlib import Path
from line_run import line_trainer
folder = Path(sys.argv[1])
def hang(number):
    if number == 2:
        time.sleep(600)
trainer = line_trainer(folder, during=hang, checkpoint={"every": 1}, watchdog={"step": 0.5})
trainer.watchdog.tick = 0.05
trainer.run()
"""


def test_a_run_that_hangs_ends_and_goes_on(tmp_path: Path) -> None:
    here = Path(__file__).parent
    env = {**environment(), "PYTHONPATH": os.pathsep.join(map(str, (here.parents[1], here.parent, here)))}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 3
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "Traceback" not in done.stderr
    assert said[0].startswith("error: process 0: step after step 2 has taken")
    assert "watchdog.step" in said[0] and f"--resume {tmp_path / 'run'}" in said[0]
    assert "hang" in (tmp_path / "run/stuck-0.txt").read_text("utf-8")
    assert names(tmp_path / "run")[-1] == "step_00000002"
    assert line_trainer(tmp_path / "run", resume=tmp_path / "run").run()


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_stop_and_a_continue_of_the_whole_process_do_not_end_it(tmp_path: Path) -> None:
    """The real signals: what the thread sees is one late look."""
    script = (
        "import os, time\nfrom hydit_core.train.sections import WatchdogSection\n"
        "from hydit_core.train.watchdog import Watchdog\n"
        "dog = Watchdog(WatchdogSection(step=1.0), lambda *told: os._exit(9), tick=0.1)\n"
        "with dog.watching(), dog.phase('step'):\n    print('in', flush=True); time.sleep(0.3)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], env=environment(), stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"in\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=60) == 0
