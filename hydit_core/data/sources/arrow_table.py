"""Arrow and Parquet files as tables of Python values, whatever types their columns have."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ConfigError, DataError
from ..remote import RemotePath

_OPEN_FILES = 64
HELD_BYTES = 512 << 20
"""Of decoded row groups that a process keeps."""
_CHECK = Path(__file__).with_name("table_check.py")
_CHECK_SECONDS = 60
"""Of the processor; and so many for each byte:"""
_CHECK_BYTES_A_SECOND = 10 << 20
_CROWD = 30
"""By how much longer it may take by the clock, while other programs have the processor."""
_CROWDED = 1_000_000
"""Above this many rows, a file must have at least as many bytes: run lengths can claim any number."""

_checked: set[tuple[Path, int, int]] = set()


def check_tables(paths: Sequence[Path]) -> None:
    """Let another process read the files from end to end, once each, before this one does; not remote ones.

    Raises :class:`DataError` for the first that is damaged, also where it brought that process down.
    """
    local = [path for path in dict.fromkeys(paths) if not isinstance(path, RemotePath)]
    waiting = [path for path in local if _identity(path) not in _checked]
    if not waiting or not sys.executable:
        return
    _pyarrow(waiting[0])
    identities = [_identity(path) for path in waiting]
    command = [sys.executable, "-I", str(_CHECK)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        seconds = _CHECK_SECONDS + sum(size for _, size, _ in identities) // _CHECK_BYTES_A_SECOND
        timer = threading.Timer(seconds * _CROWD, child.kill)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(
                    json.dumps({"path": sys.path, "files": list(map(str, waiting)), "seconds": seconds})
                )
                child.stdin.close()
            for path, identity in zip(waiting, identities, strict=True):
                answer = child.stdout.readline()
                problem = json.loads(answer) if answer.endswith("\n") else "Arrow breaks down over it"
                if problem is not None:
                    reason = " ".join(problem.split())
                    raise DataError(f"cannot read {path}: {reason}; it is damaged, make it anew")
                _checked.add(identity)
        finally:
            timer.cancel()
            child.kill()


def _identity(path: Path) -> tuple[Path, int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    return path, status.st_size, status.st_mtime_ns


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{path}: reading Arrow and Parquet needs pyarrow; pip install pyarrow") from error
    return pyarrow


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Arrow raises OSError, its own exceptions, and what Python's conversions raise."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot read {path}: {reason}") from error


class _Groups:
    """The row groups that were used last, up to :data:`HELD_BYTES` in a process, and at least the last one.

    Neighbors in the order of a training are neighbors in a file where that is read as a stream, and for
    random access where the whole file fits.
    """

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[Table, int, tuple[str, ...]], Any] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: tuple[Table, int, tuple[str, ...]]) -> Any:
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)

    def put(self, key: tuple[Table, int, tuple[str, ...]], table: Any) -> None:
        with self._lock:
            self._held[key] = table
            self._bytes += table.nbytes
            while self._bytes > HELD_BYTES and len(self._held) > 1:
                self._bytes -= self._held.popitem(last=False)[1].nbytes


_groups = _Groups()


class Table:
    """Random access to the rows of an Arrow or Parquet file, which is mapped rather than read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._arrow: Any = _pyarrow(path)
        self._parquet: Any = None
        self._table: Any = None
        with _reading(path):
            with path.open("rb") as file:
                is_parquet = file.read(4) == b"PAR1"
            remote = isinstance(path, RemotePath)
            if remote and not is_parquet:
                raise DataError(f"{path} is no Parquet file; Arrow files have to be on a disk")
            if is_parquet:
                opened = path.open("rb") if remote else path
                self._parquet = self._arrow.parquet.ParquetFile(opened, memory_map=not remote)
                self.schema: Any = self._parquet.schema_arrow
                groups = range(self._parquet.num_row_groups)
                counts = [self._parquet.metadata.row_group(i).num_rows for i in groups]
            else:
                mapped = self._arrow.memory_map(str(path))
                try:
                    self._table = self._arrow.ipc.open_file(mapped).read_all()
                except self._arrow.ArrowInvalid:  # the streaming form, which `datasets` writes
                    mapped.seek(0)
                    self._table = self._arrow.ipc.open_stream(mapped).read_all()
                self.schema = self._table.schema
                counts = [len(self._table)]
            self._ends = [sum(counts[: i + 1]) for i in range(len(counts))] or [0]
            if len(self) > max(_CROWDED, path.stat().st_size):
                raise DataError(f"{path} claims {len(self):,} rows, more than it has bytes")
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def names(self) -> list[str]:
        return list(self.schema.names)

    def kind(self, column: str) -> str:
        """What the cells of a column are to us: "text", "texts", "number", "picture", "empty", or "" for
        anything else; encodings (dictionaries, run lengths, extension types) make no difference.
        """
        return self._kind(self._type(column))

    def type_name(self, column: str) -> str:
        """What Arrow calls the type of a column, shortened."""
        name = str(self._type(column))
        return name if len(name) <= 60 else name[:57] + "..."

    def values(self, columns: Sequence[str], rows: range | np.ndarray) -> list[dict[str, Any]]:
        """Some columns of ascending ``rows`` as Python objects."""
        found: list[dict[str, Any]] = [{} for _ in rows]
        if columns and found:
            with _reading(self.path):
                for group, places in self._by_group(rows):
                    start = self._ends[group - 1] if group else 0
                    table = self._read(group, columns)
                    for name in columns:
                        numbers = [int(rows[place]) - start for place in places]
                        for place, value in zip(places, _cells(table.column(name), numbers), strict=True):
                            found[place][name] = value
        return found

    def pictures(self, column: str, rows: range | np.ndarray) -> list[int | str | None]:
        """What stands in a column of pictures: the number of a row that holds one, a path, or nothing."""
        found: list[int | str | None] = [int(row) for row in rows]
        with _reading(self.path):
            for group, places in self._by_group(rows):
                if self._all_embedded(group, column):
                    continue
                start = self._ends[group - 1] if group else 0
                cells = self._read(group, [column]).column(column)
                for place in places:
                    cell = _storage(cells[int(rows[place]) - start])
                    if not _holds(cell):
                        path = _field(cell, "path")
                        found[place] = None if path is None else path.as_py()
        return found

    def cell(self, row: int, column: str) -> bytes | None:
        """The encoded picture in one cell, if there is one."""
        with _reading(self.path):
            group = bisect_right(self._ends, row)
            start = self._ends[group - 1] if group else 0
            value = _storage(self._read(group, [column]).column(column)[row - start])
            content = _field(value, "bytes") if hasattr(value, "keys") else value
            return None if content is None else content.as_py()

    def _type(self, column: str) -> Any:
        if self.schema.names.count(column) > 1:
            raise DataError(f"{self.path} has several columns {column!r}; rename all but one")
        return self.schema.field(column).type

    def _kind(self, kind: Any) -> str:
        types = self._arrow.types
        if isinstance(kind, self._arrow.BaseExtensionType):
            return self._kind(kind.storage_type)
        if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
            return self._kind(kind.value_type)
        name = str(kind)
        if name in ("string", "large_string", "string_view"):
            return "text"
        if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
            return "number"
        if name in ("binary", "large_binary", "binary_view") or name.startswith("fixed_size_binary"):
            return "picture"
        if types.is_struct(kind):
            fields = {kind.field(i).name: self._kind(kind.field(i).type) for i in range(kind.num_fields)}
            own, path = fields.get("bytes", "empty"), fields.get("path", "empty")
            fits = own in ("picture", "empty") and path in ("text", "empty")
            return "picture" if fits and fields.keys() & {"bytes", "path"} else ""
        if hasattr(kind, "value_type") and "list" in name:
            return "texts" if self._kind(kind.value_type) in ("text", "empty") else ""
        return "empty" if types.is_null(kind) else ""

    def _by_group(self, rows: range | np.ndarray) -> Iterator[tuple[int, range]]:
        """The places in ascending ``rows`` of each row group that they touch."""
        if not len(rows):
            return
        if not 0 <= rows[0] <= rows[-1] < len(self):
            raise DataError(f"{self.path} has {len(self)} rows, row {rows[-1]} is asked for")
        groups = np.searchsorted(self._ends, np.asarray(rows), side="right")
        for group in np.unique(groups).tolist():
            first, last = np.searchsorted(groups, [group, group + 1]).tolist()
            yield group, range(first, last)

    def _read(self, group: int, columns: Sequence[str]) -> Any:
        """A table with these columns of a row group; a cell cannot be read without all of it."""
        if self._parquet is None:
            return self._table
        with self._lock:  # Parquet's reader is not made for several threads, and ends the process
            key = self, group, tuple(columns)
            table = _groups.get(key)
            if table is None:
                table = self._parquet.read_row_group(group, columns=list(columns), use_threads=False)
                _groups.put(key, table)
            return table

    def _all_embedded(self, group: int, column: str) -> bool:
        """Whether the file itself says that no cell is without its picture."""
        if self._parquet is None:
            return False
        chunks = self._parquet.metadata.row_group(group)
        paths = (column, f"{column}.bytes")
        for chunk in (chunks.column(i) for i in range(chunks.num_columns)):
            if chunk.path_in_schema in paths:
                statistics = chunk.statistics
                return statistics is not None and statistics.has_null_count and statistics.null_count == 0
        return False


def _cells(column: Any, numbers: list[int]) -> list[Any]:
    """Cells of a column by ascending number. Not by Arrow's ``take``, which lacks some types."""
    if numbers[-1] - numbers[0] + 1 == len(numbers):
        column = column.slice(numbers[0], len(numbers))
        numbers = list(range(len(numbers)))
    return [_storage(column[number]).as_py() for number in numbers]


def _storage(cell: Any) -> Any:
    """A cell without its encodings."""
    while (inner := getattr(cell, "value", None)) is not None and hasattr(inner, "as_py"):
        cell = inner
    return cell


def _holds(cell: Any) -> bool:
    content = _field(cell, "bytes") if hasattr(cell, "keys") else cell
    return content is not None and content.is_valid


def _field(cell: Any, name: str) -> Any:
    """A field of a struct, or None where it or the whole struct is null or lacks it."""
    if not cell.is_valid or not hasattr(cell, "keys") or name not in cell.keys():  # noqa: SIM118
        return None
    field = cell[name]
    return field if field.is_valid else None


def open_table(path: Path) -> Table:
    """Open a table; the last few stay open in this process, for as long as they are not replaced."""
    return _open_table(*_identity(path))


@lru_cache(maxsize=_OPEN_FILES)
def _open_table(path: Path, size: int, changed: int) -> Table:
    return Table(path)


def read_cell(path: Path, row: int, column: str) -> bytes:
    """The encoded picture in one cell. Raises :class:`DataError` if it is empty or the file is unreadable."""
    content = open_table(path).cell(row, column)
    if not content:
        raise DataError(f"{path}, row {row}: column {column} holds no picture")
    return content
