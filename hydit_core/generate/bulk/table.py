"""Tables of prompts of any length, read a shard at a time: text, JSON Lines, CSV, Parquet and Arrow.

A pass over the file finds where each shard begins; the rows themselves are never all in memory.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import ConfigError, HyditError
from ...untrusted import decode, parse_json
from .rows import COLUMNS, NEGATIVES, NUMBERS, PROMPTS, BadRow, Row, Shape, row_of

_LINES = (".jsonl", ".ndjson", ".csv", ".tsv")
_COLUMNAR = (".parquet", ".arrow")
TABLES = (*_LINES, *_COLUMNAR)
"""Suffixes of files with columns; any other is a text file with a prompt a line."""
_LONGEST_LINE = 64 << 20
_LONGEST_CELL = 1 << 24
_AT_ONCE = 1024
_MOST_SHAPES = 10_000

Progress = Callable[[int], object]


class Place(NamedTuple):
    """Where a record begins: its byte, and the number of lines before it; in a columnar file both its row."""

    offset: int = 0
    line: int = 0


class Record(NamedTuple):
    """A row as it stands in the file; ``read`` gives its cells by column."""

    place: Place
    where: str
    read: Callable[[], dict[str, Any]]


class Found(NamedTuple):
    """What a pass over the rows found.

    ``shapes`` has each shape with the place of its first row; of very many, not all.
    """

    rows: int
    shapes: dict[Shape, str]


class Prompts:
    """The rows of ``path``, in shards of ``size``; rows without a seed get ``seed`` plus their number."""

    def __init__(self, path: Path, size: int, seed: int) -> None:
        self.path, self.size, self.seed = path, size, seed
        self.starts: list[Place] = []
        """Where each shard begins."""
        self._columnar = path.suffix.lower() in _COLUMNAR
        self._header: list[str] | None = None

    # -- passes ------------------------------------------------------------------------------------------

    def look(self, *, skip: bool, trusted: bool, progress: Progress | None = None) -> Found:
        """Go through the file once: find the shards, and unless ``trusted``, check every row.

        Raises :class:`ConfigError` for the first bad row, unless ``skip``, and if nothing is left to draw.
        """
        self.starts = []
        shapes: dict[Shape, str] = {}
        if self._columnar:
            self._check_columns(trusted)
            if trusted:
                rows = len(self._table())
                self.starts = [Place(start, start) for start in range(0, rows, self.size)]
                return Found(rows, {})
        rows = bad = 0
        for number, record in enumerate(self._records(Place())):
            if number % self.size == 0:
                self.starts.append(record.place)
            if not trusted:
                row = self._row(record, number)
                if isinstance(row, Row):
                    if len(shapes) < _MOST_SHAPES:
                        shapes.setdefault(row.shape, row.where)
                elif skip:
                    bad += 1
                else:
                    raise ConfigError(f"{row.reason} (--on-error skip leaves such rows out)")
            rows = number + 1
            if progress is not None and rows % 10_000 == 0:
                progress(rows)
        if rows == bad:
            raise ConfigError(f"{self.path}: " + ("no row can be drawn" if bad else "no prompts in it"))
        return Found(rows, shapes)

    def digest(self) -> str:
        """SHA-256, hexadecimal, of the file."""
        total = hashlib.sha256()
        with self._opened() as file:
            while block := file.read(1 << 20):
                total.update(block)
        return total.hexdigest()

    def shard(self, number: int) -> list[Row | BadRow]:
        """The rows of a shard, after :meth:`look`."""
        rows: list[Row | BadRow] = []
        for record in self._records(self.starts[number]):
            rows.append(self._row(record, number * self.size + len(rows)))
            if len(rows) == self.size:
                break
        return rows

    def unused(self) -> list[str]:
        """Columns that mean nothing here, as far as the head of the file shows."""
        first = next(self._records(Place()), None)
        return [] if first is None else [name for name in first.read() if name not in COLUMNS]

    def _row(self, record: Record, number: int) -> Row | BadRow:
        try:
            return row_of(record.read(), number, record.where, (self.seed + number) % 2**64)
        except HyditError as error:
            return BadRow(number, str(error))

    # -- records -----------------------------------------------------------------------------------------

    def _records(self, start: Place) -> Iterator[Record]:
        if self._columnar:
            return self._cells(start)
        kind = self.path.suffix.lower()
        return self._csv(start) if kind in (".csv", ".tsv") else self._text(start, json=kind in _LINES)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with open(self.path, "rb") as file:
                yield file
        except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
            raise ConfigError(
                f"cannot read {self.path}: {getattr(error, 'strerror', None) or error}"
            ) from None

    def _lines(self, start: Place) -> Iterator[tuple[Place, bytes]]:
        with self._opened() as file:
            file.seek(start.offset)
            place = start
            while line := file.readline(_LONGEST_LINE + 1):
                if len(line) > _LONGEST_LINE:
                    raise ConfigError(f"{self._where(place)} is longer than {_LONGEST_LINE >> 20} MB")
                yield place, line
                place = Place(place.offset + len(line), place.line + 1)

    def _where(self, place: Place) -> str:
        return f"{self.path}, line {place.line + 1}"

    def _decoded(self, place: Place, line: bytes) -> str:
        return decode(line, f"{self._where(place)},", ConfigError)

    def _text(self, start: Place, *, json: bool) -> Iterator[Record]:
        """A prompt, or a JSON object, a line; empty lines are passed over."""
        for place, line in self._lines(start):
            if not line.removeprefix(b"\xef\xbb\xbf").strip():
                continue

            def read(place: Place = place, line: bytes = line) -> dict[str, Any]:
                text = self._decoded(place, line)
                return parse_json(text, self._where(place), error=ConfigError) if json else {"prompt": text}

            yield Record(place, self._where(place), read)

    def _csv(self, start: Place) -> Iterator[Record]:
        """Rows below a line with the columns' names; a row may have line breaks in quotes."""
        at = start

        def lines() -> Iterator[str]:
            nonlocal at
            for place, line in self._lines(start):
                at = Place(place.offset + len(line), place.line + 1)
                yield self._decoded(place, line)

        limit = csv.field_size_limit(_LONGEST_CELL)
        try:
            reader = csv.reader(lines(), delimiter="\t" if self.path.suffix.lower() == ".tsv" else ",")
            while True:
                place = at
                cells = next(reader, None)
                if cells is None:
                    return
                if place.offset == 0:
                    self._header = _header(cells, self.path)
                elif cells:
                    yield Record(place, self._where(place), self._csv_row(cells, self._where(place)))
        except csv.Error as error:
            raise ConfigError(f"{self._where(at)} is not valid CSV: {error}") from error
        finally:
            csv.field_size_limit(limit)

    def _csv_row(self, cells: list[str], where: str) -> Callable[[], dict[str, Any]]:
        header = self._header or []  # found by the pass

        def read() -> dict[str, Any]:
            if len(cells) > len(header):
                raise ConfigError(f"{where}: more cells than the header has columns; quote texts with commas")
            # Nothing between two commas is no text, not an empty one.
            return {name: cell or None for name, cell in zip(header, cells, strict=False)}

        return read

    # -- columnar files ----------------------------------------------------------------------------------

    def _table(self) -> Any:
        from ...data.sources.arrow_table import open_table

        return open_table(self.path)

    def _check_columns(self, trusted: bool) -> None:
        """Raise for a file that is damaged, or whose columns are of other types."""
        if not trusted:
            from ...data.sources.arrow_table import check_tables

            with self._opened():
                check_tables([self.path])
        table = self._table()
        expected = {
            **dict.fromkeys((*PROMPTS, *NEGATIVES), ("text", "texts")),
            **dict.fromkeys(NUMBERS, ("number", "text", "numbers")),
        }
        for name in table.names():
            kinds = expected.get(name)
            if kinds and table.kind(name) not in (kinds[0], "text", "empty"):
                raise ConfigError(
                    f"{self.path}: column {name!r} is of type {table.type_name(name)}, expected {kinds[1]}"
                )
        if not set(table.names()) & set(PROMPTS):
            raise ConfigError(
                f"{self.path}: no column for prompts; expected {' or '.join(PROMPTS)}, found "
                f"{', '.join(table.names()[:20])}"
            )

    def _cells(self, start: Place) -> Iterator[Record]:
        table = self._table()
        columns = [name for name in table.names() if name in COLUMNS]
        for first in range(start.offset, len(table), _AT_ONCE):
            chunk = range(first, min(first + _AT_ONCE, len(table)))
            for number, values in zip(chunk, table.values(columns, chunk), strict=True):
                where = f"{self.path}, row {number}"
                yield Record(Place(number, number), where, lambda values=values: values)  # type: ignore[misc]


def _header(cells: list[str], path: Path) -> list[str]:
    names = [cell.strip() for cell in cells]
    if not set(names) & set(PROMPTS):
        shown = ", ".join(name[:40] for name in names[:20])
        raise ConfigError(
            f"{path}: no column for prompts; expected a first line with {' or '.join(PROMPTS)}, found {shown}"
        )
    if len(set(names)) < len(names):
        raise ConfigError(f"{path}: two columns have the same name; rename one")
    return names
