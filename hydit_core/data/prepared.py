"""A manifest in a file: written once, then mapped by every process, which keeps nothing of it.

A folder has a folder for each version of its rows, in which lies ``rows.arrow``: uncompressed Arrow IPC, in
record batches of a fixed length, so that a row is found without looking for it:

======================= ============================================================================
``key``                 the picture's name, stable when the data move (bytes of UTF-8)
``path``, ``row``       the file that holds it, and its row there if that is a table, else -1
``extra``               JSON: where its control picture and mask are; empty without any
``captions``            a list of texts
``width``, ``height``   in pixels, as it is shown
``source``              the number of the source that it came from
``bytes``, ``changed``  of its file: size, and time of change in nanoseconds; 0 where nobody looked
``place``, ``content``  hashes of where it is, and of all else, by which two versions are compared
======================= ============================================================================

``prepared.json`` names the newest one, and says of which configuration and tables it was made and what
gathering found. It is replaced last and in one step, so there is always a whole version or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..errors import ConfigError, DataError
from ..images import Size
from ..new_files import abandoned, remove_folder, replacing
from .buckets import bucket_sizes
from .cache.latents import require_outside_sources, user_cache_folder
from .config import DataConfig
from .gathering import Findings, gather_into, gather_source
from .layout import Layout
from .manifest import GatheredManifest, Look, Manifest, extra_text
from .mapped import NOTE, NUMBERS, ROWS, VERSION, MappedManifest, SourceNote, arrow, newest
from .order import hash_int
from .remote import place
from .sources import Entry, tables_of

FEW = 100_000
"""So many rows each process keeps in its memory; so many files of a source are looked at at every start."""
_BATCH = 1 << 16

Stamp = tuple[int, int]
Progress = Callable[[int], None]
"""Is called with the number of rows so far."""


# -- writing ------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row as the file has it, with a hash of what of it decides the order, and its picture's column."""

    key: str
    path: str
    extra: str
    captions: tuple[str, ...]
    row: int
    width: int
    height: int
    source: int
    bytes: int
    changed: int
    place: int
    content: int
    order: int
    column: str

    @staticmethod
    def of(entry: Entry, key: str, look: Look, source: int) -> Row:
        path, extra = str(entry.path), extra_text(entry)
        order = hash_int(key, *entry.captions, *look.size, source)
        place = hash_int(path, entry.row)
        content = hash_int(order, entry.column, extra, look.bytes, look.changed)
        told = (entry.row, *look.size, source, look.bytes, look.changed)
        return Row(key, path, extra, entry.captions, *told, place, content, order, entry.column)


class SourceMarks:
    """What tells one version of a source's rows from another; a :class:`~.gathering.RowSink`."""

    def __init__(self, tables: dict[Path, Stamp] | None = None) -> None:
        self.rows = self.looked = 0
        self.column = ""
        self.tables = {str(path): stamp for path, stamp in (tables or {}).items()}
        self._digest = hashlib.sha256()

    def append(self, entry: Entry, key: str, look: Look, source: int) -> None:
        self.add(Row.of(entry, key, look, source))

    def add(self, row: Row) -> None:
        self._digest.update(struct.pack("<QQ", row.place, row.content))
        self.rows += 1
        self.looked += row.bytes > 0
        if row.row >= 0 and row.path not in self.tables:
            self.tables[row.path] = _stamp(place(row.path))
        self.column = row.column or self.column

    def __len__(self) -> int:
        return self.rows

    def note(self, findings: Findings) -> SourceNote:
        tables = tuple((path, *stamp) for path, stamp in self.tables.items())
        digest = self._digest.hexdigest()
        return SourceNote(self.rows, self.looked, digest, self.column, tables, findings)


def _stamp(path: Path) -> Stamp:
    """A file's bytes and time of change; zeros if it is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return 0, 0
    return (status.st_size, status.st_mtime_ns) if path.is_file() else (0, 0)


class ManifestWriter:
    """Takes the rows that :func:`~.gathering.gather_into` finds into a file at ``path``.

    ``tables`` are those of each source, with their stamps from before they are read.
    """

    def __init__(self, path: Path, tables: list[dict[Path, Stamp]], progress: Progress | None = None) -> None:
        self._arrow = pa = arrow()
        text = pa.large_binary()
        numbers = [pa.field(name, getattr(pa, kind)()) for name, kind in NUMBERS.items()]
        self._schema = pa.schema(
            [("key", text), ("path", text), ("extra", text), ("captions", pa.large_list(text)), *numbers]
        )
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)
        self._rows: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        self._digest = hashlib.sha256()
        self._progress = progress
        self.marks = [SourceMarks(stamps) for stamps in tables]
        self.rows = 0

    def append(self, entry: Entry, key: str, look: Look, source: int) -> None:
        self.add(Row.of(entry, key, look, source))

    def add(self, row: Row) -> None:
        """Write a row, after those before it."""
        self.marks[row.source].add(row)
        key, path, extra, captions, *numbers, order, _ = row
        values = (_bytes(key), _bytes(path), _bytes(extra), [_bytes(text) for text in captions], *numbers)
        for column, value in zip(self._rows.values(), values, strict=True):
            column.append(value)
        self._digest.update(struct.pack("<Q", order))
        self.rows += 1
        if self.rows % _BATCH == 0:
            self._flush()

    def _flush(self) -> None:
        if self._rows["key"]:
            batch = self._arrow.record_batch(list(self._rows.values()), schema=self._schema)
            self._writer.write_batch(batch)
            self._rows = {name: [] for name in self._schema.names}
        if self._progress is not None:
            self._progress(self.rows)

    def __len__(self) -> int:
        return self.rows

    def close(self) -> str:
        """Complete the file; returns what identifies all that decides the order of samples."""
        self._flush()
        self._writer.close()
        self._file.close()
        return self._digest.hexdigest()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


class Gathering(Protocol):
    """Reads all sources into a file, as :func:`~.gathering.gather_into` does, with the same errors."""

    def __call__(
        self, config: DataConfig, rows: ManifestWriter, known: KnownSizes | None, /
    ) -> list[Findings]: ...


def prepare(
    config: DataConfig,
    known: KnownSizes | None = None,
    progress: Progress | None = None,
    gathering: Gathering = gather_into,
) -> MappedManifest:
    """Gather all rows into a file and map them; sizes in ``known`` spare opening unchanged pictures.

    The file is the same, byte for byte, whatever ``gathering`` reads the sources.

    Raises :class:`DataError` as :func:`~.gathering.gather` does, or if the folder cannot be written to, and
    :class:`ConfigError` if that is inside a folder of pictures.
    """
    folder = prepared_folder(config)
    require_outside_sources(folder, config, "the prepared data")
    build = secrets.token_hex(8)
    tables = [{path: _stamp(path) for path in tables_of(source)} for source in config.sources]
    try:
        before = _newest_build(folder)
        with replacing(folder / build, folder=True) as temporary:
            temporary.mkdir()
            writer = ManifestWriter(temporary / ROWS, tables, progress)
            try:
                findings = gathering(config, writer, known)
            finally:
                digest = writer.close()
            size = (temporary / ROWS).stat().st_size
        notes = [marks.note(found) for marks, found in zip(writer.marks, findings, strict=True)]
        note = {
            "version": VERSION,
            "build": build,
            "asked": asked_for(config),
            "rows": len(writer),
            "bytes": size,
            "digest": digest,
            "sources": [told.to_dict() for told in notes],
        }
        with replacing(folder / NOTE) as temporary:
            temporary.write_text(json.dumps(note), encoding="utf-8")
        for left in [*abandoned(folder), *([folder / before] if before else [])]:
            remove_folder(left)
    except OSError as error:
        raise DataError(
            f"cannot write the prepared data to {folder}: {error.strerror or error}; "
            "set data.cache.dir to a place that can be written to"
        ) from error
    return MappedManifest(folder / build, note)


def _newest_build(folder: Path) -> str | None:
    try:
        return newest(folder).folder.name
    except DataError:
        return None


# -- what changed -------------------------------------------------------------------------------------


class KnownSizes:
    """Sizes of pictures that were looked at before, a :data:`~.gathering.Known`."""

    def __init__(self, manifest: MappedManifest) -> None:
        self._manifest = manifest
        rows = np.flatnonzero(
            (np.asarray(manifest.numbers("row")) < 0) & (np.asarray(manifest.numbers("changed")) > 0)
        )
        self._places, firsts = np.unique(np.asarray(manifest.numbers("place"))[rows], return_index=True)
        self._rows = rows[firsts]

    def __call__(self, path: Path, size: int, changed: int) -> Size | None:
        wanted = np.uint64(hash_int(str(path), -1))
        place = int(np.searchsorted(self._places, wanted))
        if place == len(self._places) or self._places[place] != wanted:
            return None
        row, manifest = int(self._rows[place]), self._manifest
        same = (manifest.numbers("bytes")[row], manifest.numbers("changed")[row]) == (size, changed)
        return manifest.size(row) if same else None


@dataclass(frozen=True)
class Changes:
    """How many pictures are in one version of the rows and not in the other, or have changed."""

    new: int
    changed: int
    vanished: int

    @staticmethod
    def between(before: MappedManifest, after: MappedManifest) -> Changes:
        """Of what is in both several times, the first counts."""
        (old, old_content), (new, new_content) = (_contents(rows) for rows in (before, after))
        both, of_old, of_new = np.intersect1d(old, new, assume_unique=True, return_indices=True)
        changed = int((old_content[of_old] != new_content[of_new]).sum())
        return Changes(len(new) - len(both), changed, len(old) - len(both))

    def __bool__(self) -> bool:
        return any((self.new, self.changed, self.vanished))

    def __str__(self) -> str:
        return f"{self.new} new, {self.changed} changed, {self.vanished} gone"


def _contents(manifest: MappedManifest) -> tuple[np.ndarray, np.ndarray]:
    places, firsts = np.unique(np.asarray(manifest.numbers("place")), return_index=True)
    return places, np.asarray(manifest.numbers("content"))[firsts]


def unchanged(config: DataConfig, prepared: MappedManifest) -> bool:
    """Whether the sources still are as they were prepared, as far as that is looked at.

    Tables are by size and time of change. Sources of up to :data:`FEW` picture files are gathered
    again, without opening those that did not change. The pictures of larger ones are believed to be as they
    were, which reading one checks.
    """
    for note, source in zip(prepared.notes, config.sources, strict=True):
        noted = {place(path): (size, changed) for path, size, changed in note.tables}
        if any(_stamp(path) != noted.get(path) for path in {*noted, *tables_of(source)}):
            return False
    known: KnownSizes | None = None
    for number, (note, source) in enumerate(zip(prepared.notes, config.sources, strict=True)):
        if note.looked <= FEW and (note.looked or not tables_of(source)):
            marks, known = SourceMarks(), known or KnownSizes(prepared)
            findings = gather_source(config, number, marks, known)
            if not marks.note(findings).same_rows(note):
                return False
    return True


# -- reading ------------------------------------------------------------------------------------------


def asked_for(config: DataConfig) -> str:
    """Identifies what decides which rows a configuration has, whatever it does with them."""
    kept = {"sources", "min_side", "allow_missing_captions", "empty_caption", "on_unreadable"}
    told = config.model_dump(include=kept)
    for source in told["sources"]:
        for what_for in ("repeats", "prior", "validation", "stream"):
            del source[what_for]
    parts = (config.control, config.mask, config.image_prompt)
    beside = [part is not None and part.kind == "files" for part in parts]
    text = json.dumps([VERSION, told, beside], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def prepared_folder(config: DataConfig) -> Path:
    """Where the rows of this configuration are prepared: beside its caches, whichever of them it uses.

    Raises :class:`ConfigError` if there is no such place.
    """
    return (config.cache.dir or user_cache_folder()) / f"rows-{asked_for(config)[:16]}"


def find_prepared(config: DataConfig) -> MappedManifest | None:
    """What was prepared for such a configuration, whether or not its sources have changed."""
    try:
        manifest = newest(prepared_folder(config))
    except (ConfigError, DataError):
        return None
    fits = manifest.asked == asked_for(config) and len(manifest.notes) == len(config.sources)
    return manifest if fits else None


def prepare_again(
    config: DataConfig, progress: Progress | None = None, gathering: Gathering = gather_into
) -> tuple[MappedManifest, Changes | None]:
    """As :func:`prepare`, with what is known from the last time, and what has changed since."""
    before = find_prepared(config)
    if before is None:
        return prepare(config, progress=progress, gathering=gathering), None
    after = prepare(config, KnownSizes(before), progress, gathering)
    return after, Changes.between(before, after)


def open_many(
    config: DataConfig, progress: Progress | None = None, say: Callable[[str], None] | None = None
) -> MappedManifest:
    """The rows as they are prepared: anew if they were not, or if their sources have changed.

    Raises as :func:`prepare`.
    """
    found = find_prepared(config)
    if found is not None and unchanged(config, found):
        return found
    prepared, changes = prepare_again(config, progress)
    if say is not None:
        say(described(prepared, changes))
    return prepared


def described(manifest: MappedManifest, changes: Changes | None) -> str:
    """What was prepared, as a line for people."""
    compared = "" if changes is None else f" ({changes})"
    return f"prepared {len(manifest)} pictures{compared}, in {manifest.folder.parent}"


def gather_few(config: DataConfig) -> tuple[Manifest, Findings] | None:
    """The rows, gathered into memory; None if they are more than :data:`FEW`.

    Pictures that are prepared are not opened again. Raises as :func:`~.gathering.gather`.
    """
    found = find_prepared(config)
    rows = _Few()
    try:
        parts = gather_into(config, rows, None if found is None else KnownSizes(found))
    except _TooMany:
        return None
    return rows, Findings.together(parts)


class _TooMany(Exception):
    pass


class _Few(GatheredManifest):
    def append(self, entry: Entry, key: str, look: Look, source: int) -> None:
        if len(self) == FEW:
            raise _TooMany
        super().append(entry, key, look, source)


# -- layouts ------------------------------------------------------------------------------------------


def prepared_layout(config: DataConfig, manifest: MappedManifest) -> Layout:
    """What each row is for, mapped from beside the rows; written there first if that is possible.

    Raises :class:`DataError` if nothing is left to be learned.
    """
    sizes = bucket_sizes(config)
    shown = [(source.repeats, source.prior, source.validation) for source in config.sources]
    told = (str(sizes), str(shown), repr(config.validation))
    folder = manifest.folder / f"layout-{hash_int(VERSION, *told):016x}"
    with contextlib.suppress(OSError, EOFError, ValueError):
        mapped = Layout.mapped(folder)
        if len(mapped.bucket_of_row) == len(manifest):
            return mapped
    layout = Layout.of(config, manifest, sizes)
    try:
        layout.save(folder)
        return Layout.mapped(folder)
    except (OSError, ValueError):  # a folder that cannot be written to costs memory only
        return layout
