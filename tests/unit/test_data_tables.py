"""Captions in tables: JSONL and CSV as people write them, and what is refused by its line."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
from data_setup import open_data, paint_folder

from hydit_core.data.sources import PictureFile
from hydit_core.errors import DataError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return paint_folder(tmp_path / "pictures")


def test_jsonl(pictures: Path, tmp_path: Path) -> None:
    rows = [
        {"image": "pictures/00.png", "caption": "one"},
        {"file_name": "pictures/03.png", "captions": ["two", "three"], "text_zh": "二"},
        {"path": str(pictures / "06.png"), "text": "four", "width": 400, "height": 100},
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n", encoding="utf-8-sig")
    data = open_data(file)
    assert [record.captions for record in data.manifest] == [("one",), ("two", "three", "二"), ("four",)]
    assert data.manifest.size(2) == (400, 100)
    only = open_data({"path": file, "caption_fields": ["text_zh"]}, allow_missing_captions=True)
    assert [record.captions for record in only.manifest] == [("",), ("二",), ("",)]
    moved = tmp_path / "elsewhere" / "data.jsonl"
    moved.parent.mkdir()
    moved.write_text(json.dumps(rows[0]))
    with pytest.raises(DataError, match="no such file"):
        open_data(moved)
    assert open_data({"path": moved, "root": tmp_path}).summary().pictures == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": ', "line 2 is not valid JSON"),
        ("[1]", "expected an object"),
        ('{"caption": "x"}', "no picture path; expected one of image, file_name"),
        ('{"image": "pictures/00.png", "caption": 7}', "caption holds int"),
        ('{"image": "pictures/00.png", "caption": "x", "width": "wide"}', "width is 'wide'"),
        ('{"image": "pictures/00.png", "caption": "x", "width": true}', "width is True"),
        ('{"image": "pictures/00.png", "caption": "x", "width": [1]}', r"width is \[1\]"),
        ('{"image": "pictures/00.png", "caption": "x", "width": 1e300}', r"width is 1e\+300"),
        ('{"image": "pictures/00.png", "caption": "x", "height": 0.5}', r"height is 0\.5"),
        ('{"image": "pictures/00.png", "caption": ["x", {}]}', "caption holds dict"),
        ('{"image": "pictures/00.png", "caption": {"en": "x"}}', "caption holds dict"),
        ('{"image": ["pictures/00.png"], "caption": "x"}', "no picture path"),
    ],
)
def test_jsonl_errors_name_the_line(pictures: Path, tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"image": "pictures/00.png", "caption": "x"}\n' + line)
    with pytest.raises(DataError, match=message) as error:
        open_data(file)
    assert "data.jsonl, line 2" in str(error.value)


@pytest.mark.parametrize("column", ["img_path", "image_path"])
def test_csv_as_tencents_scripts_take_it(pictures: Path, tmp_path: Path, column: str) -> None:
    file = tmp_path / "data.csv"
    with open(file, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["", column, "text_zh", "md5"])
        writer.writerow([0, pictures / "00.png", "一只鸟, 在左边", "abc"])
    data = open_data(file)
    assert data.manifest[0].captions == ("一只鸟, 在左边",)


def test_tables_that_came_from_windows(pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    lines = ["image,text,width,height", "pictures\\birds\\01.png,one,48.0,32", "pictures/00.png,two,,"]
    file.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    data = open_data(file)
    assert [record.key for record in data.manifest] == ["data/pictures/birds/01.png", "data/pictures/00.png"]
    assert data.manifest.size(0) == (48, 32) and data.batch(0).pixels is not None
    (tmp_path / "a\\b.png").write_bytes((pictures / "00.png").read_bytes())  # a name may hold one, elsewhere
    file.write_text("image,text\na\\b.png,one\n")
    if os.name == "posix":
        assert open_data(file).manifest.picture(0).path == tmp_path / "a\\b.png"


def test_objects_with_a_path(pictures: Path, tmp_path: Path) -> None:
    """As `datasets` writes pictures into JSON Lines."""
    file = tmp_path / "data.jsonl"
    cell = {"bytes": None, "path": "pictures/00.png"}
    file.write_text(json.dumps({"image": cell, "text": "x", "pose": cell}))
    record = open_data({"path": file, "control_field": "pose"}).manifest[0]
    assert record.key == "data/pictures/00.png"
    assert record.extra["control"] == record.picture == PictureFile(pictures / "00.png")
    for other in ({"bytes": "iVBO", "path": "pictures/00.png"}, {"path": 7}, {"path": None}, {}):
        file.write_text(json.dumps({"image": other, "text": "x"}))
        with pytest.raises(DataError, match="line 1: no picture path"):
            open_data(file)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_lines_without_end_are_refused(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"data.{suffix}"
    with file.open("wb") as out:
        out.truncate((64 << 20) + 1)
    with pytest.raises(DataError, match=r"line 1 is longer than 64 MB"):
        open_data(file)


def test_csv_errors(pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text(f"img_path,text_zh\n{pictures / '00.png'},a bird, on the left\n")
    with pytest.raises(DataError, match=r"line 2: more cells"):
        open_data(file)
    file.write_bytes("img_path,text_zh\nx.png,鸟\n".encode("gb18030"))
    with pytest.raises(DataError, match=r"data\.csv, line 2, is not UTF-8 .*GB18030"):
        open_data(file)
    file.write_bytes("img_path,text_zh\nx.png,鸟\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"data\.csv is not UTF-8 .*it is UTF-16"):
        open_data(file)


def test_a_cell_without_end_is_told_and_other_readers_keep_their_limit(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydit_core.data.sources.csv._LONGEST_CELL", 1000)
    file, before = tmp_path / "data.csv", csv.field_size_limit()
    file.write_text(f'img_path,text_zh\n{pictures / "00.png"},"a bird{" and a bird" * 100}\n')
    with pytest.raises(DataError, match=r"data\.csv is not valid CSV: field larger than field limit"):
        open_data(file)
    assert csv.field_size_limit() == before
