"""The runner of `make gpu`: rows one after the other, each within its budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import run_gpu
from run_gpu import ROOT, ROWS, Row, main, run_rows

SLEEP = "import time; time.sleep(99)"


def test_a_row_that_hangs_does_not_hide_the_others(tmp_path):
    rows = [
        Row("good", ["-c", "print('fine')"], 60),
        Row("bad", ["-c", "raise SystemExit(3)"], 60),
        Row(
            "slow",
            [
                "-c",
                f"__import__('subprocess').run([{sys.executable!r}, '-c', {SLEEP!r}])",
            ],
            1,
        ),
        Row(
            "seen",
            ["-c", f"assert len(__import__('json').load(open({str(tmp_path / 'rows.json')!r}))) == 3"],
            60,
        ),
    ]
    found = run_rows(rows, tmp_path, dict(os.environ), seconds=120)
    outcomes = ["passed", "failed", "took too long", "passed"]
    assert [result.outcome for result in found] == outcomes
    assert [result["outcome"] for result in json.loads((tmp_path / "rows.json").read_text())] == outcomes
    assert (tmp_path / "good.log").read_text() == "fine\n"


def test_two_rows_run_at_once_where_asked(tmp_path):
    """Each ends when it has seen the log of the other."""
    see = (
        "print(1, flush=True)\nimport pathlib, time\nother = pathlib.Path({!r})\n"
        "while not (other.exists() and other.read_text()): time.sleep(0.02)"
    )
    rows = [Row(a, ["-c", see.format(str(tmp_path / f"{b}.log"))], 60) for a, b in ("ab", "ba")]
    found = run_rows(rows, tmp_path, dict(os.environ), seconds=120, at_once=2)
    assert [(result.row, result.outcome) for result in found] == [("a", "passed"), ("b", "passed")]


def test_rows_for_which_no_time_is_left_are_told(tmp_path):
    (result,) = run_rows([Row("late", ["-c", "1/0"], 60)], tmp_path, {}, seconds=4)
    assert result.outcome == "left out" and not (tmp_path / "late.log").exists()


def test_all_tests_and_all_figures_have_a_row():
    files = {part for row in ROWS for part in row.command if part.endswith(".py")}
    assert files == {f"tests/gpu/{path.name}" for path in (ROOT / "tests/gpu").glob("test_*.py")} | {
        "benchmarks/gpu.py"
    }
    measured = {
        after
        for row in ROWS
        for one, after in zip(row.command, row.command[1:], strict=False)
        if one == "--only"
    }
    script = (ROOT / "benchmarks/gpu.py").read_text("utf-8")
    table = script[script.index("\nROWS:") : script.index('"""What is measured')]
    assert measured == {line.split('"')[1] for line in table.splitlines() if line.startswith('    "')}
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert sum(row.budget for row in ROWS[:6]) <= 8 * 60 + 90  # the first ones come to their end in any case


def test_one_row_can_be_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(run_gpu, "ROWS", (Row("a", ["-c", "print(1 + 1)"], 60), Row("b", ["-c", "1/0"], 60)))
    assert main(["--device", "cpu", "--only", "a"]) == 0
    assert "== a\n2\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--only", "c"])


def test_help_needs_no_torch():
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / "tests/run_gpu.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--only" in done.stdout
