"""A manifest that is mapped from a file instead of being kept by each process; see :mod:`.prepared`."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

import numpy as np

from ..errors import ConfigError, DataError
from ..untrusted import read_json
from .gathering import Findings
from .manifest import Manifest

VERSION = 1
NOTE, ROWS = "prepared.json", "rows.arrow"
NUMBERS = {
    "row": "int64",
    "width": "int32",
    "height": "int32",
    "source": "int32",
    "bytes": "int64",
    "changed": "int64",
    "place": "uint64",
    "content": "uint64",
}
"""The columns of integers, and their types."""


def arrow() -> Any:
    """pyarrow. Raises :class:`ConfigError` where it is missing."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise ConfigError("preparing data needs pyarrow; pip install pyarrow") from error
    return pyarrow


@dataclass(frozen=True)
class SourceNote:
    """What was noted of a source when its rows were written.

    Attributes:
        rows: how many.
        looked: how many of them have their picture in a file of its own that was looked at.
        digest: of their content and order, in hex digits.
        column: of pictures in a table, in which column; else empty.
        tables: the files that its rows came from, where those are tables: (path, bytes, time of change).
    """

    rows: int
    looked: int
    digest: str
    column: str
    tables: tuple[tuple[str, int, int], ...]
    findings: Findings

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        tables = [(quote_from_bytes(os.fsencode(path), safe="/\\: "), *stamp) for path, *stamp in self.tables]
        return {**vars(self), "tables": tables, "findings": self.findings.to_dict()}

    @staticmethod
    def from_dict(told: dict[str, Any]) -> SourceNote:
        """From :meth:`to_dict`. Raises what Python does for anything else."""
        tables = tuple(
            (os.fsdecode(unquote_to_bytes(path)), int(size), int(changed))
            for path, size, changed in told["tables"]
        )
        findings = Findings.from_dict(told["findings"])
        rows, looked = int(told["rows"]), int(told["looked"])
        return SourceNote(rows, looked, str(told["digest"]), str(told["column"]), tables, findings)

    def same_rows(self, other: SourceNote) -> bool:
        """Whether both found the same in the source, whatever tables it came from."""
        return (self.digest, self.findings) == (other.digest, other.findings)


class MappedManifest(Manifest):
    """The rows in a folder that was prepared; processes that map them share their memory.

    Args:
        folder: of this version of the rows.
        note: what was noted of it.

    Raises :class:`DataError` if it is not there, or not complete.
    """

    def __init__(self, folder: Path, note: dict[str, Any]) -> None:
        self.folder, self._note = folder, note
        try:
            self.digest, self.asked = str(note["digest"]), str(note["asked"])
            """Of what decides the order of the samples; of what the configuration asked for."""
            self.notes = [SourceNote.from_dict(told) for told in note["sources"]]
            self._columns = {i: source.column for i, source in enumerate(self.notes) if source.column}
            self._map(_batches(folder / ROWS, int(note["bytes"])))
            if len(self) != note["rows"]:
                raise ValueError(f"{len(self)} rows")
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            raise DataError(
                f"{folder} holds no complete prepared data ({error!r}); prepare them anew"
            ) from error
        self.findings = Findings.together(source.findings for source in self.notes)

    def _map(self, batches: list[Any]) -> None:
        def texts(name: str) -> MappedTexts:
            return MappedTexts([_text(batch.column(name)) for batch in batches])

        self._numbers = {
            name: MappedNumbers([batch.column(name).to_numpy(zero_copy_only=True) for batch in batches])
            for name in NUMBERS
        }
        lists = [batch.column("captions") for batch in batches]
        self.keys, self._paths, self._extras = texts("key"), texts("path"), texts("extra")
        self.captions = MappedTexts([_text(part.values) for part in lists])
        self._caption_ends = MappedEnds([part.offsets.to_numpy(zero_copy_only=True) for part in lists])
        self._rows, self._sources = self.numbers("row"), self.numbers("source")
        self._widths, self._heights = self.numbers("width"), self.numbers("height")

    def numbers(self, name: str) -> MappedNumbers:
        """One of the columns :data:`NUMBERS`."""
        return self._numbers[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedManifest, (self.folder, self._note)  # a worker process maps it again


def newest(folder: Path) -> MappedManifest:
    """The rows that were last prepared in ``folder``.

    Raises :class:`DataError` if there are none, or not complete ones of this version.
    """
    note = read_json(folder / NOTE, error=DataError, max_bytes=1 << 30, max_values=100_000_000)
    build = note.get("build")
    if note.get("version") != VERSION or not isinstance(build, str) or Path(build).name != build:
        raise DataError(f"{folder / NOTE} is not of this version; prepare the data anew")
    return MappedManifest(folder / build, note)


def _batches(path: Path, size: int) -> list[Any]:
    """The record batches of a file of ``size`` bytes. Raises OSError or ValueError if it is not whole."""
    pa = arrow()
    if path.stat().st_size != size:  # before Arrow, which believes what a file says of itself
        raise ValueError(f"{path} has another length")
    with pa.memory_map(str(path)) as mapped:
        reader = pa.ipc.open_file(mapped)
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    for batch in batches:
        batch.validate()
    return batches


def _text(column: Any) -> tuple[np.ndarray, memoryview]:
    """Where each text ends, (n + 1,), and all of them; neither is copied."""
    _, ends, content = column.buffers()
    return np.frombuffer(ends, dtype=np.int64)[: len(column) + 1], memoryview(content or b"")


class _Parts:
    """Items in parts, by the number of the item."""

    def __init__(self, lengths: list[int]) -> None:
        self._ends = np.cumsum(lengths).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _find(self, index: int) -> tuple[int, int]:
        """(part, place in it). Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self._ends, index)
        return part, int(index) - (self._ends[part - 1] if part else 0)


class MappedTexts(_Parts):
    """As :class:`~.columns.StringColumn`, but not to be added to."""

    def __init__(self, parts: list[tuple[np.ndarray, memoryview]]) -> None:
        super().__init__([len(ends) - 1 for ends, _ in parts])
        self._parts = parts

    def __getitem__(self, index: int) -> str:
        part, place = self._find(index)
        ends, content = self._parts[part]
        return bytes(content[ends[place] : ends[place + 1]]).decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def lengths(self) -> np.ndarray:
        """Length of every text in bytes of UTF-8, (n,) int64."""
        return np.concatenate([np.diff(ends) for ends, _ in self._parts])


class MappedNumbers(_Parts):
    """A column of integers."""

    def __init__(self, parts: list[np.ndarray]) -> None:
        super().__init__([len(part) for part in parts])
        self._parts = parts

    def __getitem__(self, index: int) -> int:
        part, place = self._find(index)
        return int(self._parts[part][place])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self._parts).astype(dtype or self._parts[0].dtype, copy=False)


class MappedEnds(_Parts):
    """Where each row's captions begin among all captions; the last item is where they end."""

    def __init__(self, parts: list[np.ndarray]) -> None:
        super().__init__([len(part) - 1 for part in parts])
        self._parts = parts
        self._firsts = np.cumsum([0, *(int(part[-1]) for part in parts)]).tolist()

    def __getitem__(self, index: int) -> int:
        if index == len(self):
            return self._firsts[-1]
        part, place = self._find(index)
        return self._firsts[part] + int(self._parts[part][place])
