"""`hydit compare --ocr`: how much of the text that was asked for is drawn."""

from __future__ import annotations

import json
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image, ImageDraw, ImageFont

from hydit_core.compare.__main__ import main
from hydit_core.compare.drawn_text import accuracy, expected, reader


@pytest.mark.parametrize(
    ("wanted", "read", "share"),
    [
        ("open", "open", 1.0),
        ("open now", "opennow", 1.0),  # OCR loses spaces
        ("ＯＰＥＮ", "OPEN", 1.0),  # full width
        ("open", "opan", 0.75),
        ("open", "oen", 0.75),
        ("open", "opens", 0.75),
        ("open", "", 0.0),
        ("open", "a long text of others", 0.0),  # not below
        ("你好世界", "你好世", 0.75),
        ("kitten", "sitting", 0.5),  # the textbook's distance of 3
    ],
)
def test_accuracy_counts_characters(wanted, read, share):
    assert accuracy(wanted, read) == pytest.approx(share)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "open"', "open"),
        ("写着“你好”的牌子", "你好"),
        ("一本书，名叫《红楼梦》", "红楼梦"),
        ("「早」和『安』", "早安"),
        ("it's a cat's hat", ""),
        ('an inch (1")', ""),
    ],
)
def test_what_stands_in_quotation_marks_is_wanted(prompt, text):
    assert expected(prompt, "") == text
    assert expected(prompt, "given") == "given"


def run(tmp_path, capsys, *more):
    words = ["--a", str(tmp_path / "a"), "--b", str(tmp_path / "b"), "-o", str(tmp_path / "out"), *more]
    return main(words), *capsys.readouterr()


def stand_in(monkeypatch, texts):
    module = ModuleType("rapidocr")
    module.RapidOCR = lambda params: lambda array: SimpleNamespace(txts=texts.get(int(array[0, 0, 0])))
    monkeypatch.setitem(sys.modules, "rapidocr", module)


def test_each_side_has_its_accuracy(tmp_path, capsys, monkeypatch):
    for side, levels in (("a", (10, 20)), ("b", (10, 30))):
        (tmp_path / side).mkdir()
        for name, level in zip("xy", levels, strict=True):
            Image.new("RGB", (64, 64), (level,) * 3).save(tmp_path / side / f"{name}.png")
    stand_in(monkeypatch, {10: ("op", "en"), 20: ("open",), 30: None})
    code, said, errors = run(tmp_path, capsys, "--ocr", "open")
    assert code == 0 and not errors
    found = json.loads((tmp_path / "out" / "compare.json").read_text("utf-8"))["sides"]
    assert [found[side]["figures"]["text_accuracy"] for side in "ab"] == [1.0, 0.5]
    assert found["a"]["figures"]["read"] == 2
    assert re.search(r"^side .* text$", said, re.M) and re.search(r"^b .* 0\.500$", said, re.M)
    page = (tmp_path / "out" / "index.html").read_text("utf-8")
    assert "<th>text</th>" in page and "<td>0.500</td>" in page


def test_without_the_package_it_is_left_out(tmp_path, capsys, monkeypatch):
    for side in "ab":
        (tmp_path / side).mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / side / "x.png")
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    code, _, errors = run(tmp_path, capsys, "--ocr", "open")
    assert code == 0
    assert errors.strip() == (
        "warning: rapidocr is not installed, so --ocr is left out; pip install 'hydit[ocr]' brings it"
    )
    assert "text</th>" not in (tmp_path / "out" / "index.html").read_text("utf-8")


def test_the_real_one_reads_what_is_drawn(tmp_path):
    pytest.importorskip("rapidocr")
    picture = Image.new("RGB", (512, 160), "white")
    font = ImageFont.load_default(48)
    ImageDraw.Draw(picture).text((40, 50), "OPEN 24 HOURS", fill="black", font=font)
    picture.save(tmp_path / "a.png")
    assert accuracy("OPEN 24 HOURS", reader()(tmp_path / "a.png")) == 1
