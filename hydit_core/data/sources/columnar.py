"""Arrow and Parquet tables: captions and sizes column by column, pictures as cells or as paths.

Tencent's training data are Arrow files (columns ``image``: the encoded picture, ``text_zh``, ``md5``,
``width``, ``height``), with an index JSON that lists the files and the rows that a training uses
(Tencent/HunyuanDiT, IndexKits). Hugging Face's ``datasets`` write ``image`` as a struct of bytes and path.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ...errors import ConfigError, DataError
from ...untrusted import read_json
from ..config import SourceConfig
from .entry import Entry
from .table import IMAGE_FIELDS, row_captions, row_entry, row_extra, row_side

_OPEN_FILES = 64
_ROWS_AT_ONCE = 1024


def read_columnar(source: SourceConfig) -> Iterator[Entry]:
    """All rows of one Arrow (``.arrow``) or Parquet file, in its order."""
    return _entries(source, source.path)


def read_index(source: SourceConfig) -> Iterator[Entry]:
    """The rows of an index JSON, with or without resolution groups, in the order of its files.

    The groups themselves are not used: rows go to this run's own buckets. A path in the JSON is
    relative to ``root`` if that is set, else to the JSON's folder or the nearest folder above in
    which the file exists, so that a copied project tree works from anywhere.
    """
    path = source.path
    # A million pictures are a million numbers here.
    content = read_json(path, error=DataError, max_bytes=1 << 30, max_values=100_000_000)
    try:
        files = [str(name) for name in content["arrow_files"]]
        ends = [int(end) for end in content["cum_length"]]
        rows = _index_rows(path, content)
    except (ValueError, KeyError, TypeError, BadZipFile) as error:
        raise DataError(f"{path} is not an index of Arrow files: {error!r}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if len(files) != len(ends) or (len(rows) and not 0 <= rows[0] <= rows[-1] < (ends[-1] if ends else 0)):
        raise DataError(
            f"{path}: arrow_files, cum_length and indices do not fit together; build the index again"
        )
    start = 0
    for number, name in enumerate(files):
        first, last = np.searchsorted(rows, [start, ends[number]])
        if last > first:
            yield from _entries(source, _find(path, name, source.root), rows[first:last] - start)
        start = ends[number]


def _index_rows(path: Path, content: dict[str, Any]) -> np.ndarray:
    """Global row numbers, ascending, of all groups."""
    parts: list[Any] = [content["indices"]] if isinstance(content.get("indices"), list) else []
    if content.get("indices_file"):
        with np.load(path.parent / content["indices_file"], allow_pickle=False) as arrays:
            parts += [arrays[name] for name in arrays.files]
    if not any(len(part) for part in parts):
        raise DataError(f"{path} selects no rows")
    return np.sort(np.concatenate([np.asarray(part, dtype=np.int64) for part in parts if len(part)]))


def _find(index: Path, name: str, root: Path | None) -> Path:
    if root is not None or Path(name).is_absolute():
        found = (root or Path()) / name
        if found.is_file():
            return found
    else:
        for folder in index.resolve().parents:
            if (folder / name).is_file():
                return folder / name
    where = f"in {root}" if root is not None else "beside it and in the folders above"
    raise DataError(f"{index} lists {name}, which was not found {where}; set the source's root")


def _entries(source: SourceConfig, path: Path, rows: np.ndarray | None = None) -> Iterator[Entry]:
    table = open_table(path)
    names = table.names()
    image_field = source.image_field or next((f for f in IMAGE_FIELDS if f in names), None)
    if image_field not in names:
        wanted = source.image_field or "one of " + ", ".join(IMAGE_FIELDS)
        raise DataError(f"{path}: no column for pictures; expected {wanted}, found {', '.join(names)}")
    for field in ("control_field", "mask_field"):
        beside = getattr(source, field)
        if beside in names and table.holds_pictures(beside):
            raise DataError(f"{path}: {field} = {beside!r} holds pictures, expected paths to picture files")
    embedded = table.holds_pictures(image_field)
    columns = [name for name in names if table.is_plain(name) and not (embedded and name == image_field)]
    wanted_rows = np.arange(len(table)) if rows is None else rows
    for start in range(0, len(wanted_rows), _ROWS_AT_ONCE):
        chunk = wanted_rows[start : start + _ROWS_AT_ONCE]
        for number, row in zip(chunk.tolist(), table.take(columns, chunk), strict=True):
            where = f"{path}, row {number}"
            if not embedded:
                yield row_entry(row, source, where)
                continue
            captions, hint = row_captions(row, source, where)
            key = f"{path.name}#{number}"
            width, height = row_side(row, "width", where), row_side(row, "height", where)
            extra = row_extra(row, source, where)
            yield Entry(
                key, path, captions, width, height, extra=extra, hint=hint, row=number, column=image_field
            )


def read_cell(path: Path, row: int, column: str) -> bytes:
    """The encoded picture in one cell. Raises :class:`DataError` if it is empty or the file is unreadable."""
    value = open_table(path).cell(row, column)
    content = value.get("bytes") if isinstance(value, dict) else value
    if not content:
        raise DataError(f"{path}, row {row}: column {column} holds no picture")
    return bytes(content)


class Table:
    """Random access to the rows of an Arrow or Parquet file, which is mapped rather than read."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow
            import pyarrow.ipc
            import pyarrow.parquet
        except ImportError as error:
            raise ConfigError(
                f"{path}: reading Arrow and Parquet needs pyarrow; pip install pyarrow"
            ) from error
        self._arrow: Any = pyarrow
        self._parquet: Any = None
        self._table: Any = None
        try:
            if path.suffix.lower() == ".parquet":
                self._parquet = pyarrow.parquet.ParquetFile(path, memory_map=True)
                self.schema: Any = self._parquet.schema_arrow
                groups = range(self._parquet.num_row_groups)
                counts = [self._parquet.metadata.row_group(i).num_rows for i in groups]
            else:
                mapped = pyarrow.memory_map(str(path))
                try:
                    self._table = pyarrow.ipc.open_file(mapped).read_all()
                except pyarrow.ArrowInvalid:  # the streaming form of the format, which `datasets` writes
                    mapped.seek(0)
                    self._table = pyarrow.ipc.open_stream(mapped).read_all()
                self.schema = self._table.schema
                counts = [len(self._table)]
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"cannot read {path}: {error}") from error
        self._ends = np.cumsum(counts).tolist() if counts else [0]
        self._group: tuple[int, str, Any] = (-1, "", None)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def names(self) -> list[str]:
        return list(self.schema.names)

    def holds_pictures(self, column: str) -> bool:
        """Whether cells hold encoded pictures, as bytes or in a struct with bytes, and not paths."""
        kind, types = self.schema.field(column).type, self._arrow.types
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_struct(kind)

    def is_plain(self, column: str) -> bool:
        """Whether a column is cheap to turn into Python objects: numbers, texts and lists of texts."""
        kind, types = self.schema.field(column).type, self._arrow.types
        if types.is_list(kind) or types.is_large_list(kind):
            kind = kind.value_type
        return types.is_string(kind) or types.is_large_string(kind) or types.is_primitive(kind)

    def take(self, columns: Sequence[str], rows: np.ndarray) -> list[dict[str, Any]]:
        """Some columns of ascending ``rows`` as Python objects."""
        if self._parquet is None:
            return self._table.select(columns).take(rows).to_pylist()
        found: list[dict[str, Any]] = []
        groups = np.searchsorted(self._ends, rows, side="right")
        for group in np.unique(groups):
            start = self._ends[group - 1] if group else 0
            table = self._parquet.read_row_group(int(group), columns=list(columns), use_threads=False)
            found += table.take(rows[groups == group] - start).to_pylist()
        return found

    def cell(self, row: int, column: str) -> Any:
        if self._parquet is None:
            return self._table.column(column)[row].as_py()
        group = bisect_right(self._ends, row)
        held, name, values = self._group
        if (held, name) != (group, column):
            # A cell cannot be read without its row group; the last one is kept for rows in a row.
            table = self._parquet.read_row_group(group, columns=[column], use_threads=False)
            values = table.column(0)
            self._group = (group, column, values)
        return values[row - (self._ends[group - 1] if group else 0)].as_py()


def open_table(path: Path) -> Table:
    """Open a table; the last few stay open in this process, for as long as they are not replaced."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    return _open_table(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=_OPEN_FILES)
def _open_table(path: Path, size: int, changed: int) -> Table:
    return Table(path)
