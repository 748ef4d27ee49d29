"""A run that is looked at while it goes on, and a folder of pictures before one begins."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from train_setup import ROOT, command_line, records, write_run

from hydit_core.embedded import embedded_model
from hydit_core.errors import HyditError
from hydit_core.train.dataset_report import look_at
from hydit_core.train.watch import RunView, duration, planned_steps, stacked


def write_records(folder: Path, *lines: object) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)


def test_numbers_are_read_as_they_are_written(tmp_path):
    view = RunView(tmp_path)
    assert not view.refresh() and view.progress(100) == "step 0 of 100"
    write_records(
        tmp_path, {"step": 1, "loss": 0.5, "seconds": 2.0}, {"step": 2, "loss": 0.25, "seconds": 4.0}
    )
    write_records(tmp_path, '{"step": 3, "loss": 0.1')  # half a line
    assert view.refresh()
    assert view.progress(100) == "step 2 of 100, loss 0.2500, 3 min left"
    write_records(tmp_path, 'm, "seconds"}\n', {"step": 4, "loss": 0.125, "seconds": 8.0})
    assert view.refresh() and not view.refresh()
    assert (view.step, view.seconds, view.loss) == (4, 8.0, 0.125)
    assert view.progress(None) == "step 4, loss 0.1250"
    assert view.progress(None, 20.0) == "step 4, loss 0.1250, 12 s left"


def test_what_is_no_record_is_passed_over(tmp_path):
    view = RunView(tmp_path)
    for line in ("\x00\n", "[1]\n", '{"step": "9", "seconds": 1}\n', '{"step": -1, "seconds": 1}\n'):
        write_records(tmp_path, line)
    write_records(tmp_path, {"step": True, "seconds": 1}, {"step": 5, "seconds": "x", "loss": 1e300})
    view.refresh()
    assert view.points == [] and view.loss is None and view.seconds_left(10) is None


def test_a_run_that_went_back_is_read_again(tmp_path):
    view = RunView(tmp_path)
    write_records(tmp_path, *({"step": step, "loss": 1.0, "seconds": float(step)} for step in range(1, 9)))
    view.refresh()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "seconds": 1.0}\n')
    view.refresh()
    assert view.points == [(1, 1.0)]


def test_curve_and_newest_complete_sheet_in_one_picture(tmp_path):
    view = RunView(tmp_path)
    assert view.preview() is None and view.curve() is None and view.sheet() is None
    write_records(tmp_path, *({"step": step, "loss": 1.0 / step, "seconds": 1.0} for step in (1, 2, 3)))
    (tmp_path / "samples").mkdir()
    for step, color in ((0, "red"), (2, "blue")):
        Image.new("RGB", (320, 160), color).save(tmp_path / "samples" / f"step_{step:08d}.png")
    (tmp_path / "samples" / "step_00000003.png").write_bytes(b"\x89PNG half")
    view.refresh()
    picture = view.preview()
    assert picture is not None and picture.size == (640, 360 + 320)
    assert picture.getpixel((320, 500)) == (0, 0, 255)
    assert view.preview() is None  # nothing new


def test_pictures_below_each_other():
    assert stacked([None]) is None
    both = stacked([Image.new("RGB", (64, 64), "red"), None, Image.new("RGB", (1280, 640), "lime")])
    assert both is not None and both.size == (640, 640 + 320)
    assert both.getpixel((1, 639)) == (255, 0, 0) and both.getpixel((1, 640)) == (0, 255, 0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3540, "59 min"), (3600, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_end_of_its_input_stops_a_run_which_then_goes_on(tmp_path):
    config = write_run(tmp_path)
    command = [sys.executable, "-m", "hydit_core.train", str(config), "--resume", "auto", "--attended"]
    command += ["--set", "run.steps=100000", "--set", "metrics.every=1"]
    child = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    run = tmp_path / "run"
    end = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").read_text().count("\n") > 2:
        assert time.monotonic() < end and child.poll() is None
        time.sleep(0.05)
    _, said = child.communicate(timeout=120)  # closes its input
    assert child.returncode == 3 and "everything is saved" in said
    assert planned_steps(run) == 100000
    done = records(run)[-1]["step"]
    again = command_line(
        config, "--resume", "auto", "--set", f"run.steps={done + 5}", "--set", "schedule.warmup_steps=0"
    )
    assert "continuing from" in again.stderr and records(run)[-1]["step"] == done + 5


def test_a_folder_is_told_as_it_would_be_trained(tmp_path):
    for name, size in (("a", (200, 100)), ("b", (100, 200)), ("c", (64, 64)), ("d", (300, 300))):
        Image.new("RGB", size, "blue").save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "b.txt").write_text("a cat " * 200)
    (tmp_path / "c.txt").write_text("")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    report = look_at(tmp_path, embedded_model())
    lines = report.text.split("\n")
    assert lines[0] == "4 pictures" and str(tmp_path) not in report.text
    assert "cannot be read, so left out: 1" in lines and "without a caption: 2 (red frames)" not in lines
    assert "without a caption: 3 (red frames)" in lines  # the broken one has none either
    table = [found for line in lines if (found := re.fullmatch(r"  (\d+)x(\d+): (\d+)", line))]
    assert sum(int(row[3]) for row in table) == 4 and "sizes around 128x128:" in lines
    assert "captions: 2, of 2 texts" in lines
    assert any(line.startswith("  BERT cuts 1, for example of: 'a cat a cat") for line in lines)
    # a, b and c are in the first row of two: c has a red frame, a none.
    assert report.sheet.getpixel((1, 1)) == (255, 255, 255)
    assert report.sheet.getpixel((1, report.sheet.height // 2 + 1)) == (214, 60, 40)


def test_a_folder_without_pictures(tmp_path):
    with pytest.raises(HyditError, match="no pictures found"):
        look_at(tmp_path, embedded_model())
