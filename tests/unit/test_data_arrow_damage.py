"""Damaged tables: another process reads each first, because Arrow may not survive it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hydit_core.data.config import DataConfig
from hydit_core.data.dataset import TrainData, open_dataset
from hydit_core.data.sources import arrow_table
from hydit_core.data.sources.table_check import check
from hydit_core.errors import DataError


def encoded(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 32), color).save(file, "PNG")
    return file.getvalue()


RED, BLUE = encoded("red"), encoded("blue")


def write(path: Path, table: pa.Table) -> Path:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
        out.write_table(table)
    return path


def open_table_data(path: Path, **source: object) -> TrainData:
    config = DataConfig(sources=[{"path": path, **source}], resolution=32)
    return open_dataset(config, seed=1, batch_size=1)


def damaged(path: Path) -> Path:
    """An Arrow file whose texts reach far beyond its end: reading one would end the process."""
    write(path, pa.table({"image": [RED, BLUE], "text": ["first", "second"]}))
    content = bytearray(path.read_bytes())
    offsets = np.array([0, 5, 11], dtype="<i4").tobytes()
    assert content.count(offsets) == 1
    place = content.index(offsets)
    content[place : place + 12] = np.array([0, 2**29, 2**30], dtype="<i4").tobytes()
    path.write_bytes(content)
    return path


def test_a_damaged_table_is_refused_before_it_is_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*t\.arrow: .*it is damaged"):
        open_table_data(damaged(tmp_path / "t.arrow"))


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os._exit(0)", "os.write(1, b'nul')"])
def test_what_brings_arrow_down_does_not_bring_us_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    script = tmp_path / "check.py"
    script.write_text(f"import os, sys\nsys.stdin.read()\nprint('null', flush=True)\n{end}\n")
    monkeypatch.setattr(arrow_table, "_CHECK", script)
    good = [write(tmp_path / f"{i}.arrow", pa.table({"image": [RED], "text": ["a"]})) for i in (1, 2)]
    with pytest.raises(DataError, match=r"cannot read .*2\.arrow: Arrow breaks down over it"):
        arrow_table.check_tables(good)


def test_a_table_that_takes_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "check.py"
    script.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(arrow_table, "_CHECK", script)
    monkeypatch.setattr(arrow_table, "_CHECK_SECONDS", 1)
    monkeypatch.setattr(arrow_table, "_CROWD", 0.2)
    path = write(tmp_path / "t.arrow", pa.table({"image": [RED], "text": ["a"]}))
    with pytest.raises(DataError, match=r"cannot read .*t\.arrow"):
        arrow_table.check_tables([path])


@pytest.mark.skipif(os.name == "nt", reason="Windows limits no time of a process")
def test_what_counts_is_the_time_of_the_processor() -> None:
    """A machine that is busy with other things makes no table a damaged one."""
    code = (
        "import time\n"
        "from hydit_core.data.sources.table_check import _limit_seconds\n"
        "_limit_seconds(1)\n"
        "time.sleep(1.5)\n"
        "print('slept', flush=True)\n"
        "while True:\n    pass"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "slept\n" and run.returncode == -signal.SIGXCPU


def test_a_table_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "t.arrow", pa.table({"image": [RED], "text": ["a"]}))
    open_table_data(path)
    monkeypatch.setattr(arrow_table, "_CHECK", tmp_path / "none.py")
    open_table_data(path)
    write(path, pa.table({"image": [RED, RED], "text": ["a", "b"]}))
    with pytest.raises(DataError):
        open_table_data(path)


def test_a_table_that_claims_more_rows_than_it_can_hold(tmp_path: Path) -> None:
    many = pa.RunEndEncodedArray.from_arrays([2**31 - 1], ["a.png"])
    path = tmp_path / "t.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, pa.schema([("image", many.type)])) as out:
        out.write_batch(pa.RecordBatch.from_arrays([many], ["image"]))
    with pytest.raises(DataError, match=r"t\.arrow"):
        open_table_data(path, caption="x")


@pytest.mark.parametrize("column", ["text", "image"])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_texts_that_are_no_utf8_are_found_in_every_column(tmp_path: Path, suffix: str, column: str) -> None:
    """The path inside of a picture's cell as well: small tables are decoded whole."""
    offsets, damaged = pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff")
    text = pa.Array.from_buffers(pa.string(), 1, [None, offsets, damaged])
    if column == "image":
        cell = pa.StructArray.from_arrays([pa.array([b"x"]), text], names=["bytes", "path"])
        table = pa.table({"image": cell, "text": ["a"]})
    else:
        table = pa.table({"image": [b"x"], "text": text})
    path = tmp_path / f"t.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        write(path, table)
    with pytest.raises(pa.ArrowInvalid, match="UTF8"):
        check(str(path))


@pytest.mark.skipif(os.name == "nt", reason="Windows limits no memory of a process")
def test_the_process_that_reads_first_may_not_fill_the_memory(tmp_path: Path) -> None:
    """Some gigabytes are granted for what a small file may decode to, not the whole machine."""
    path = write(tmp_path / "a.arrow", pa.table({"text": ["first"]}))
    code = (
        "import resource, sys\n"
        "from hydit_core.data.sources.table_check import _limit_memory\n"
        "_limit_memory([sys.argv[1]])\n"
        "print(resource.getrlimit(resource.RLIMIT_AS)[0])\n"
        "try:\n    bytearray(64 << 30)\nexcept MemoryError:\n    print('refused')"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    limit, said = run.stdout.split()
    assert 1 << 30 <= int(limit) <= 8 << 30 and said == "refused"
