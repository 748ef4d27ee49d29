"""One training at a time in a run's folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from train_setup import environment, run_training, write_run

from hydit_core import locks
from hydit_core.errors import ConfigError, HyditError
from hydit_core.train import lock
from hydit_core.train.loop import Trainer

HOLDER = """
import sys, time, os
from pathlib import Path
from hydit_core.train import lock
with lock.hold(Path(sys.argv[1])):
    ready, begun = os.pipe()
    if os.fork() == 0:  # as a data worker, which outlives its killed parent
        os.close(1)
        os.write(begun, b"1")
        time.sleep(float(sys.argv[2]))
        os._exit(0)
    os.read(ready, 1)
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_one_is_told_who_holds_it_and_leaves_everything(tmp_path: Path) -> None:
    with lock.hold(tmp_path):
        assert (name := lock.holder(tmp_path)) and f"process {os.getpid()} on " in name
        refused = rf"another training writes there \(process {os.getpid()} on "
        with pytest.raises(ConfigError, match=refused), lock.hold(tmp_path):
            pass
        assert lock.holder(tmp_path)  # the refused one has not let it go
    assert lock.holder(tmp_path) is None
    with lock.hold(tmp_path):  # what is left of the file means nothing
        pass


def test_what_stands_in_the_file_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / lock.FILE).write_text("process 1 on here, since ever\n")
    assert lock.holder(tmp_path) is None
    with lock.hold(tmp_path):
        (tmp_path / lock.FILE).write_bytes(b"\x1b]0;x\x07\xff\n" * 100)
        name = lock.holder(tmp_path)
        assert name is not None and name.isprintable() and len(name) <= 200


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_killed_holder_holds_nothing_though_its_workers_live(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path), "20"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    assert f"process {process.pid} " in str(lock.holder(tmp_path))
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=20)
    assert lock.holder(tmp_path) is None
    process.stdout.close()


def test_a_training_holds_its_folder_and_another_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_run(tmp_path)
    run = tmp_path / "run"
    output = [f"run.output_dir={run}", "run.steps=1", "schedule.warmup_steps=0"]
    run.mkdir()
    with lock.hold(run):
        for resume in (None, "auto", str(run)):
            with pytest.raises(ConfigError, match=rf"{run}: another training writes there \(process "):
                run_training(config, *output, resume=resume)
        assert [path.name for path in run.iterdir()] == [lock.FILE]
    seen = []
    original = Trainer.run

    def observed(self: Trainer, **options: Any) -> bool:
        seen.append(lock.holder(self.folder))
        return original(self, **options)

    monkeypatch.setattr(Trainer, "run", observed)
    assert run_training(config, *output)
    assert f"process {os.getpid()} on " in str(seen[0]) and lock.holder(run) is None


def test_a_training_that_is_refused_takes_back_the_folders_it_made(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    empty = tmp_path / "other"
    empty.mkdir()
    run = tmp_path / "runs" / "a"
    output = [f"run.output_dir={run}", "run.steps=1", "schedule.warmup_steps=0"]
    with pytest.raises(HyditError):
        run_training(config, *output, resume=str(empty))
    assert not run.parent.exists()
    run.mkdir(parents=True)  # the user's own
    (run / "notes.txt").write_text("mine")
    with pytest.raises(HyditError):
        run_training(config, *output, resume=str(empty))
    assert (run / "notes.txt").read_text() == "mine"


def test_a_lock_that_was_taken_back_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run opened the file just before the one that made it removed it."""
    monkeypatch.setattr(locks, "_lock_patiently", lambda _: (tmp_path / lock.FILE).unlink())
    with pytest.raises(ConfigError, match="another training writes there"), lock.hold(tmp_path):
        pass
