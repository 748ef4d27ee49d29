"""Sources that are read on a Ray cluster: what :func:`~.gathering.gather_into` finds, in the same order.

Ray Data lists each table in a task of its own, and a folder in one; entries by the thousand are looked at in
further tasks, as they come. This process only takes the rows, which it writes, in their order.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

from ..errors import ConfigError, HyditError
from ..ray_cluster import cluster, in_words, raised, told
from .config import DataConfig
from .gathering import THREADS, Findings, SourcePart, require_usable
from .manifest import Look
from .mapped import arrow
from .prepared import KnownSizes, ManifestWriter, Row, find_prepared
from .remote import place
from .sources import Entry, PictureFile, one_column, tables_of

RETRIES = 3
"""How often Ray tries a task again whose process dies; it does so without being asked."""
_BLOCK_BYTES = 1 << 20
"""Of what a task hands on at once, so that those who look begin before a listing has ended."""
_TASKS = 4096
"""At most so many list; each keeps an object of Ray's."""
_LISTS, _LOOKS = 1.0, 0.5
"""Cores of a task. Ray makes one task of two that take the same; and who looks waits for disks."""

Batch = Any
"""A table of Arrow, with a message in JSON a row: a list that begins with its kind."""


def ray_data(module: Any) -> Any:
    """Ray Data, silent and in the order of what it is given. Raises :class:`ConfigError` where it is missing.

    ``module`` is Ray, connected.
    """
    try:
        import ray.data as data
    except ImportError as error:
        raise ConfigError("--engine ray needs Ray Data: pip install 'hydit[scale]'") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = _BLOCK_BYTES
    return data


def gather_on_ray(
    config: DataConfig, rows: ManifestWriter, known: KnownSizes | None = None
) -> list[Findings]:
    """As :func:`~.gathering.gather_into`; the sources have to lie where every machine finds them.

    Raises :class:`~..errors.HyditError` too, if workers die again and again.
    """
    with cluster() as module, in_words(RETRIES, "one part of the data"):
        data = ray_data(module)
        pieces = pieces_of(config)
        work = Work(config, known=known is not None)
        how = {"batch_size": 1, "batch_format": "pyarrow"}
        looked = (
            data.from_items(pieces, override_num_blocks=min(len(pieces), _TASKS))
            .map_batches(work.listed, num_cpus=_LISTS, **how)
            .map_batches(work.looked_at, num_cpus=_LOOKS, **how)
        )
        batches = looked.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        return take(config, rows, (message for batch in batches for message in unpacked(batch)))


def pieces_of(config: DataConfig) -> list[dict[str, bytes]]:
    """What is listed by itself: every table of every source, and folders."""
    return [
        {"message": _json(["piece", number, table])}
        for number, source in enumerate(config.sources)
        for table in ([str(path) for path in tables_of(source)] or [""])
    ]


def _packed(message: list[Any]) -> Batch:
    pa = arrow()
    return pa.table({"message": pa.array([_json(message)], pa.binary())})


def unpacked(batch: Batch) -> Iterator[list[Any]]:
    """The messages in a table."""
    return (json.loads(content.as_py()) for content in batch["message"])


def _json(message: list[Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode()  # in ASCII: names may hold lone surrogates


def take(config: DataConfig, rows: ManifestWriter, messages: Iterable[list[Any]]) -> list[Findings]:
    """Write what tasks found, and put together what it tells of the sources."""
    parts = [Findings() for _ in config.sources]
    columns = ["" for _ in config.sources]
    current = 0
    for kind, *told_of in messages:
        if kind == "error":
            raise raised(*told_of)
        number, table, column, found, findings = told_of
        while current < number:
            SourcePart(config, current).require_beside(parts[current])
            current += 1
        columns[number] = one_column(columns[number], column, place(table))
        parts[number] = Findings.together([parts[number], Findings.from_dict(findings)])
        for key, path, extra, captions, *others in found:
            rows.add(Row(key, path, extra, tuple(captions), *others))
    for number in range(current, len(config.sources)):
        SourcePart(config, number).require_beside(parts[number])
    require_usable(config, parts, len(rows))
    return parts


# -- in tasks -----------------------------------------------------------------------------------------


class _Rows(list[Row]):
    """Rows, as a :class:`~.gathering.RowSink`."""

    def append(self, entry: Entry, key: str, look: Look, source: int) -> None:  # type: ignore[override]
        super().append(Row.of(entry, key, look, source))


class Work:
    """What tasks do; it travels to them."""

    def __init__(self, config: DataConfig, *, known: bool) -> None:
        self._config, self._knows = config, known
        self._folder, self._name = os.getcwd(), secrets.token_hex(8)

    def listed(self, batch: Batch) -> Iterator[Batch]:
        """A table, or an empty text for a folder -> its entries, in parts, and then what else lies there."""
        ((_, number, table),) = unpacked(batch)
        column, findings = "", Findings()
        try:
            part = self._part(number)
            for entries in part.listed(place(table) if table else None, findings.passed_over):
                for entry in entries:
                    column = one_column(column, entry.column, entry.path)
                # Cells are looked at here: another process would decode their row groups once more.
                if any(entry.row >= 0 and not entry.picture.in_tar for entry in entries):
                    yield _packed(self._looked(number, table, column, entries))
                else:
                    told_of = [_plain_entry(entry) for entry in entries]
                    yield _packed(["entries", number, table, column, told_of])
        except HyditError as error:
            yield _packed(["error", *told(error)])
        yield _packed(["rows", number, table, column, [], findings.to_dict()])

    def looked_at(self, batch: Batch) -> Batch:
        """Entries -> rows; anything else as it is."""
        ((kind, *told_of),) = unpacked(batch)
        if kind != "entries":
            return batch
        number, table, column, entries = told_of
        try:
            return _packed(self._looked(number, table, column, [_entry(*values) for values in entries]))
        except HyditError as error:
            return _packed(["error", *told(error)])

    def _looked(self, number: int, table: str, column: str, entries: list[Entry]) -> list[Any]:
        rows, findings = _Rows(), Findings()
        with ThreadPoolExecutor(max_workers=THREADS) as pool:
            self._part(number).look_at(entries, rows, findings, self._known(), pool)
        return ["rows", number, table, column, list(rows), findings.to_dict()]

    def _part(self, number: int) -> SourcePart:
        os.chdir(self._folder)
        kept = (self._name, number)
        if kept not in _parts:
            _parts[kept] = SourcePart(self._config, number)
        return _parts[kept]

    def _known(self) -> KnownSizes | None:
        """What was prepared before, if this machine sees it."""
        if self._knows and self._name not in _sizes:
            found = find_prepared(self._config)
            _sizes[self._name] = None if found is None else KnownSizes(found)
        return _sizes.get(self._name)


_parts: dict[tuple[str, int], SourcePart] = {}
_sizes: dict[str, KnownSizes | None] = {}
"""What a process of Ray keeps from one task to the next, by the name of the work."""


def _plain_entry(entry: Entry) -> list[Any]:
    beside = {kind: (str(file.path), file.row, file.column) for kind, file in entry.extra.items()}
    values = vars(entry) | {"path": str(entry.path), "extra": beside}
    return [values[name.name] for name in fields(Entry)]


def _entry(*values: Any) -> Entry:
    told_of = dict(zip((name.name for name in fields(Entry)), values, strict=True))
    beside = {
        kind: PictureFile(place(path), row, column) for kind, (path, row, column) in told_of["extra"].items()
    }
    return Entry(
        **told_of | {"path": place(told_of["path"]), "captions": tuple(told_of["captions"]), "extra": beside}
    )
