"""The blind sheet of `compare`: names nowhere, the key beside it, and the interval of the answers."""

from __future__ import annotations

import base64
import io
import json
import re

import pytest
from PIL import Image

from hydit_core.compare.__main__ import main
from hydit_core.compare.blind import Counts, verdict, wilson


@pytest.fixture
def sheet(tmp_path, monkeypatch):
    """A sheet of twelve pairs: the reference's pictures are dark, the other side's are light."""
    monkeypatch.chdir(tmp_path)
    for folder, value in (("secretone", 0), ("secrettwo", 250)):
        (tmp_path / folder).mkdir()
        for i in range(12):
            Image.new("RGB", (32, 32), (value, i, 0)).save(tmp_path / folder / f"p{i:02d}.png")
    arguments = ["--a", "secretone", "--b", "secrettwo", "--blind", "b", "-o", "out"]
    assert main([*arguments, "--blind-seed", "5"]) == 0
    page = (tmp_path / "out/blind.html").read_text("utf-8")
    return page, json.loads((tmp_path / "out/blind-key.json").read_text("utf-8"))


def test_the_sheet_does_not_tell_which_is_which(sheet):
    page, key = sheet
    assert "secret" not in page and not re.search(r"data-side|reference", page[page.index("<body") :])
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(text)))
        for text in re.findall(r'src="data:image/webp;base64,(.*?)"', page)
    ]
    assert len(pictures) == 24
    lefts = ["b" if picture.convert("RGB").getpixel((0, 0))[0] > 100 else "a" for picture in pictures[::2]]
    assert lefts == key["left"]
    assert set(lefts) == {"a", "b"}
    assert key["pictures"] != sorted(key["pictures"])  # in another order
    assert sorted(key["pictures"]) == [f"p{i:02d}" for i in range(12)]


def test_answers_are_counted_by_the_key(sheet, tmp_path, capsys):
    left = sheet[1]["left"]
    lines = []
    for i in range(9):  # the light one seven times, the dark one twice
        wanted = "b" if i < 7 else "a"
        lines.append(f"{i + 1} {'left' if left[i] == wanted else 'right'}")
    (tmp_path / "answers.txt").write_text("\n".join([*lines, "", "10: same"]) + "\n")
    capsys.readouterr()
    assert main(["--answers", "answers.txt", "--key", "out/blind-key.json"]) == 0
    out = capsys.readouterr().out
    assert "b preferred: 7, a preferred: 2, no difference: 1, unanswered: 2" in out
    assert "78%" in out and "45% to 94%" in out and "no difference is shown" in out


@pytest.mark.parametrize("text", ("13 left", "0 left", "1 middle", "1 left\n1 right", "left"))
def test_what_is_no_answer_is_refused(sheet, tmp_path, capsys, text):
    (tmp_path / "answers.txt").write_text(text)
    capsys.readouterr()
    assert main(["--answers", "answers.txt", "--key", "out/blind-key.json"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: answers.txt, line") and err.count("\n") == 1


@pytest.mark.parametrize("text", ("[]", "{}", '{"reference": "a", "side": "b", "left": ["x"]}', "{"))
def test_a_file_that_is_no_key(sheet, tmp_path, capsys, text):
    (tmp_path / "answers.txt").write_text("1 left")
    (tmp_path / "key.json").write_text(text)
    capsys.readouterr()
    assert main(["--answers", "answers.txt", "--key", "key.json"]) == 2
    assert capsys.readouterr().err.startswith("error: key.json")


def test_the_interval_is_that_of_the_tables():
    # prop.test(..., correct=FALSE) of R
    assert wilson(50, 100) == pytest.approx((0.4038315, 0.5961685), abs=1e-6)
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0, 0.2775328), abs=1e-6)
    assert wilson(0, 0) == (0, 1)


def test_a_clear_preference_is_called_one():
    assert "no chance" in verdict("a", "b", Counts(30, 5, 0, 0))
    assert "%" not in verdict("a", "b", Counts(0, 0, 5, 0))
