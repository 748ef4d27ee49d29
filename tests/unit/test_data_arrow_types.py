"""Columns of every type that Arrow has, read or refused by name."""

from __future__ import annotations

import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hydit_core.data.config import DataConfig
from hydit_core.data.dataset import TrainData, open_dataset
from hydit_core.data.sources import PictureFile, columnar
from hydit_core.data.sources.arrow_table import Table
from hydit_core.errors import ConfigError, DataError


def encoded(color: str, size: tuple[int, int] = (40, 32)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


RED, BLUE = encoded("red"), encoded("blue")
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class Tagged(pa.ExtensionType):
    """An extension type that nobody has registered."""

    def __init__(self) -> None:
        super().__init__(pa.string(), "test.tagged")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> Tagged:
        return cls()


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Good files: saves a process for each."""
    monkeypatch.setattr(columnar, "check_tables", lambda paths: None)


def write(path: Path, table: pa.Table) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
            out.write_table(table)
    return path


def open_data(path: Path, source: dict[str, object] | None = None, **options: object) -> TrainData:
    config = DataConfig(sources=[{"path": path, **(source or {})}], **{"resolution": 32, **options})
    return open_dataset(config, seed=1, batch_size=1)


def captions(data: TrainData) -> list[tuple[str, ...]]:
    return [record.captions for record in data.manifest]


def run_length(values: list[str]) -> pa.Array:
    return pa.RunEndEncodedArray.from_arrays(list(range(1, len(values) + 1)), values)


TEXTS = {
    "string": pa.array(["a", "b", "c"]),
    "large_string": pa.array(["a", "b", "c"], pa.large_string()),
    "string_view": pa.array(["a", "b", "c"], pa.string_view()),
    "dictionary": pa.array(["a", "b", "c"]).dictionary_encode(),
    "run lengths": run_length(["a", "b", "c"]),
    "extension": pa.ExtensionArray.from_storage(Tagged(), pa.array(["a", "b", "c"])),
    "binary": pa.array([b"a", b"b", b"c"]),
    "fixed_size_binary": pa.array([b"a", b"b", b"c"], pa.binary(1)),
    "list": pa.array([["a"], ["b"], ["c"]]),
    "large_list": pa.array([["a"], ["b"], ["c"]], pa.large_list(pa.string())),
    "fixed_size_list": pa.array([["a"], ["b"], ["c"]], pa.list_(pa.string(), 1)),
    "list_view": pa.array([["a"], ["b"], ["c"]], pa.list_view(pa.string())),
    "list of dictionary": pa.array(
        [["a"], ["b"], ["c"]], pa.list_(pa.dictionary(pa.int8(), pa.string()))
    ),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_without_pyarrow_the_error_says_how_to_get_it(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / f"t.{suffix}", pa.table({"image": [RED], "text": ["a"]}))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        open_data(path)


@pytest.mark.parametrize(("letters", "shown"), [(45, "{}"), (46, "{}..."), (200, "{}...")])
def test_long_names_of_types_are_cut(tmp_path: Path, letters: int, shown: str) -> None:
    """At 60 characters, with the dots."""
    kind = pa.struct([("a" * letters, pa.int32())])
    path = write(tmp_path / "t.arrow", pa.table({"c": pa.array([None], kind)}))
    name = str(kind)
    assert (letters > 45) == (len(name) > 60)
    assert Table(path).type_name("c") == shown.format(name if letters == 45 else name[:57])


@pytest.mark.parametrize("kind", TEXTS)
def test_captions(tmp_path: Path, kind: str) -> None:
    table = pa.table({"image": [RED, BLUE, RED], "text": TEXTS[kind]})
    assert captions(open_data(write(tmp_path / "t.arrow", table))) == [("a",), ("b",), ("c",)]
    try:
        path = write(tmp_path / "t.parquet", table)
    except (pa.ArrowNotImplementedError, pa.ArrowTypeError):
        return  # a type that Parquet has no place for
    assert captions(open_data(path)) == [("a",), ("b",), ("c",)]


@pytest.mark.parametrize(
    "value",
    [
        pa.array([1, 2]),
        pa.array([1.5, 2.5]),
        pa.array([True, False]),
        pa.array([{"en": "a"}, {"en": "b"}]),
        pa.array([[("a", "b")], []], pa.map_(pa.string(), pa.string())),
        pa.array([[[["a"]]], None]),
        pa.array([0, 1], pa.timestamp("ns", "UTC")),
        pa.array([0, 1], pa.duration("ns")),
        pa.array([0, 1], pa.date32()),
        pa.array([1, 2]).dictionary_encode(),
    ],
    ids=lambda value: str(value.type),
)
def test_captions_that_are_no_texts_are_refused_by_name(tmp_path: Path, value: pa.Array) -> None:
    path = write(tmp_path / "t.arrow", pa.table({"image": [RED, BLUE], "text": value}))
    with pytest.raises(DataError, match=r"t\.arrow: column 'text' is of type .*expected texts or lists"):
        open_data(path)
    other = pa.table({"image": [RED, BLUE], "other": value, "caption": ["a", "b"]})
    assert captions(open_data(write(tmp_path / "u.arrow", other))) == [("a",), ("b",)]


@pytest.mark.parametrize("name", ["t.arrow", "t.parquet"])
def test_nulls_are_no_captions(tmp_path: Path, name: str) -> None:
    table = pa.table({"image": [RED, BLUE], "text": pa.nulls(2), "caption": [None, "b"]})
    with pytest.raises(DataError, match="pictures without a caption: 1"):
        open_data(write(tmp_path / name, table))
    assert captions(open_data(tmp_path / name, {"caption": "own"})) == [("own",), ("b",)]


@pytest.mark.parametrize("name", ["t.arrow", "t.parquet"])
def test_a_table_of_nothing_but_pictures(tmp_path: Path, name: str) -> None:
    cells = [{"bytes": RED, "path": "a.png"}] * 3
    data = open_data(write(tmp_path / name, pa.table({"image": cells})), {"caption": "a photo of ohwx dog"})
    assert captions(data) == [("a photo of ohwx dog",)] * 3
    assert data.batch(0).pixels[0, :, 0, 0].tolist() == [1, -1, -1]


PICTURES = {
    "binary": pa.array([RED, BLUE]),
    "large_binary": pa.array([RED, BLUE], pa.large_binary()),
    "binary_view": pa.array([RED, BLUE], pa.binary_view()),
    "fixed_size_binary": pa.array([RED, RED], pa.binary(len(RED))),
    "dictionary": pa.array([RED, BLUE]).dictionary_encode(),
    "struct": pa.array([{"bytes": RED, "path": None}, {"bytes": BLUE, "path": "x.png"}], STRUCT),
    "struct of large": pa.array([{"bytes": RED}, {"bytes": BLUE}], pa.struct([("bytes", pa.large_binary())])),
}


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("name", ["t.arrow", "t.parquet"])
def test_pictures(tmp_path: Path, kind: str, name: str) -> None:
    table = pa.table({"image": PICTURES[kind], "text": ["a", "b"]})
    try:
        path = write(tmp_path / name, table)
    except pa.ArrowNotImplementedError:
        pytest.skip("Parquet has no place for this type")
    data = open_data(path)
    assert [record.key for record in data.manifest] == [f"t/{name}#0", f"t/{name}#1"]
    assert data.manifest.picture(0).read() == RED
    assert data.batch(0).pixels is not None


@pytest.mark.parametrize(
    "value",
    [pa.array([1, 2]), pa.array([[1, 2], [3]], pa.list_(pa.uint8())), pa.array([{"data": b"x"}] * 2),
     pa.array([[b"x"], [b"y"]])],
    ids=lambda value: str(value.type),
)  # fmt: skip
def test_pictures_in_columns_of_other_types_are_refused_by_name(tmp_path: Path, value: pa.Array) -> None:
    path = write(tmp_path / "t.parquet", pa.table({"image": value, "text": ["a", "b"]}))
    with pytest.raises(DataError, match=r"column 'image' is of type .*expected pictures or their paths"):
        open_data(path)


def test_several_columns_of_one_name(tmp_path: Path) -> None:
    columns = [pa.array([RED]), pa.array(["a"]), pa.array(["b"])]
    table = pa.Table.from_arrays(columns, ["image", "text", "text"])
    with pytest.raises(DataError, match="several columns 'text'"):
        open_data(write(tmp_path / "t.arrow", table))


@pytest.mark.parametrize("name", ["t.arrow", "t.parquet"])
def test_cells_that_hold_nothing_but_a_path(tmp_path: Path, name: str) -> None:
    """As `datasets` writes them where pictures are not embedded; some rows may be, others empty."""
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a.png").write_bytes(BLUE)
    cells = [
        {"bytes": RED, "path": "elsewhere.png"},
        {"bytes": None, "path": "img/a.png"},
        {"bytes": RED, "path": None},
        {"bytes": None, "path": None},
        None,
        {"bytes": None, "path": "img/gone.png"},
    ]
    path = write(tmp_path / name, pa.table({"image": pa.array(cells, STRUCT), "text": list("abcdef")}))
    data = open_data(path, on_unreadable="skip")
    assert [(r.key, r.captions[0]) for r in data.manifest] == [
        (f"t/{name}#0", "a"), ("t/img/a.png", "b"), (f"t/{name}#2", "c")
    ]  # fmt: skip
    assert data.manifest.picture(1) == PictureFile(tmp_path / "img" / "a.png")
    shown = "\n".join(data.summary().skipped_shown)
    assert data.summary().skipped == 3 and f"{name}, row 3" in shown and "gone.png: no such file" in shown
    moved = tmp_path / "elsewhere" / name
    moved.parent.mkdir()
    os.replace(path, moved)
    assert open_data(moved, {"root": tmp_path}, on_unreadable="skip").summary().pictures == 3


@pytest.mark.parametrize("field", ["control_field", "mask_field"])
@pytest.mark.parametrize("name", ["t.arrow", "t.parquet"])
def test_pictures_beside_a_picture_may_be_cells(tmp_path: Path, field: str, name: str) -> None:
    """As in the usual sets for ControlNets: image, conditioning_image and text."""
    half = Image.new("L", (40, 32))
    half.paste(255, (0, 0, 40, 16))
    file = io.BytesIO()
    half.save(file, "PNG")
    cells = [{"bytes": file.getvalue(), "path": "b"}] * 2
    table = {"image": [{"bytes": RED, "path": "a"}] * 2, "beside": cells, "text": ["a", "b"]}
    kind = field.removesuffix("_field")
    data = open_data(write(tmp_path / name, pa.table(table)), {field: "beside"}, **{kind: {"kind": "files"}})
    found = data.batch(0).control if kind == "control" else data.batch(0).mask
    assert found is not None
    top, bottom = found[0, 0, 0].mean(), found[0, 0, -1].mean()
    assert top == 1 and bottom == (-1 if kind == "control" else 0)

    table["beside"] = [cells[0], None]
    path = write(tmp_path / name, pa.table(table))
    if kind == "mask":  # all of that picture counts
        assert open_data(path, {field: "beside"}, mask={"kind": "files"}).summary().masks == 1
    else:
        with pytest.raises(DataError, match="row 1: no control picture in 'beside'"):
            open_data(path, {field: "beside"}, control={"kind": "files"})


def test_many_threads_read_cells(tmp_path: Path) -> None:
    contents = [encoded("red", (8 + i, 8)) for i in range(64)]
    table = pa.table({"image": contents, "text": ["x"] * 64})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=4)
    files = [PictureFile(tmp_path / "t.parquet", row, "image") for row in range(64)] * 8
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(PictureFile.read, files)) == contents * 8


SIDES = {
    "int8": pa.array([40, 40], pa.int8()),
    "uint64": pa.array([40, 40], pa.uint64()),
    "double": pa.array([40.0, 40.0]),
    "half": pa.array([np.float16(40), np.float16(40)]),
    "decimal": pa.array([40, 40]).cast(pa.decimal128(30, 2)),
    "text": pa.array(["40", " 40.0 "]),
    "dictionary": pa.array([40, 40]).dictionary_encode(),
    "null": pa.nulls(2),
}


@pytest.mark.parametrize("kind", SIDES)
def test_sides(tmp_path: Path, kind: str) -> None:
    table = pa.table({"image": [RED, BLUE], "text": ["a", "b"], "width": SIDES[kind], "height": [32, 32]})
    data = open_data(write(tmp_path / "t.arrow", table))
    assert [data.manifest.size(row) for row in (0, 1)] == [(40, 32)] * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([True, False], "column 'width' is of type bool, expected numbers of pixels"),
        ([40.5, 1.0], r"row 0: width is 40\.5"),
        ([float("nan"), 1.0], "row 0: width is nan"),
        ([float("inf"), 1.0], "row 0: width is inf"),
        ([-40, 40], "row 0: width is -40"),
        ([2**40, 40], "row 0: width is 1099511627776"),
        (["forty", "40"], "row 0: width is 'forty'"),
        ([[40], [40]], "column 'width' is of type list"),
    ],
)
def test_sides_that_are_none(tmp_path: Path, values: list[object], message: str) -> None:
    table = pa.table({"image": [RED, BLUE], "text": ["a", "b"], "width": values, "height": [32, 32]})
    with pytest.raises(DataError, match=message):
        open_data(write(tmp_path / "t.arrow", table))


def test_captions_in_binary_that_are_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "t.arrow", pa.table({"image": [RED], "text": [b"\xff\xfe\x00"]}))
    with pytest.raises(DataError, match=r"t\.arrow, row 0: text is not UTF-8"):
        open_data(path)


def test_the_content_tells_the_format(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", pa.table({"image": [RED], "text": ["a"]}))
    renamed = path.rename(tmp_path / "t.pq")
    assert captions(open_data(renamed, {"kind": "parquet"})) == [("a",)]
