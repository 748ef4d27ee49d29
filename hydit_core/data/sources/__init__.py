"""Where pictures and captions come from: one module per format, all yielding :class:`Entry` rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ...errors import DataError
from ..config import SourceConfig
from .entry import Entry, PassedOver, PictureFile, Tally
from .files import base_of, source_kind, tables_of

__all__ = [
    "Entry",
    "PassedOver",
    "PictureFile",
    "Tally",
    "base_of",
    "one_column",
    "read_part",
    "read_source",
    "source_kind",
    "tables_of",
]


def read_source(source: SourceConfig, passed_over: PassedOver) -> Iterator[Entry]:
    """All rows of a source, in a fixed order. Raises DataError where the source is malformed.

    ``passed_over`` gets what lies there and is no row.
    """
    files = tables_of(source)
    if source_kind(source) in ("arrow", "parquet"):
        from .arrow_table import check_tables

        check_tables(files)
    column = ""
    tables: list[Path | None] = [*files] or [None]
    for table in tables:
        for entry in read_part(source, table, passed_over):
            column = one_column(column, entry.column, entry.path)
            yield entry


def read_part(source: SourceConfig, table: Path | None, passed_over: PassedOver) -> Iterator[Entry]:
    """The rows of one of a source's tables; without one, those of its folder of pictures.

    Those of all parts, one after the other, are what :func:`read_source` gives.
    """
    if table is None:
        from .folder import read_folder

        yield from read_folder(source, passed_over)
        return
    kind, base = source_kind(source), base_of(source)
    inside = table.parent.relative_to(base).as_posix() if table.is_relative_to(base) else "."
    for entry in _read_file(source.model_copy(update={"path": table}), kind, passed_over):
        # Shards of several folders may have one name.
        yield entry if inside == "." else replace(entry, key=f"{inside}/{entry.key}")


def one_column(before: str, found: str, path: Path) -> str:
    """The column of a source's pictures, if they are in tables. Raises DataError where there are two."""
    if found and before and found != before:
        raise DataError(
            f"{path}: its pictures are in {found!r}, those of the files before in {before!r}; "
            "set image_field, or make two sources of them"
        )
    return found or before


def _read_file(source: SourceConfig, kind: str, passed_over: PassedOver) -> Iterator[Entry]:
    if kind == "jsonl":
        from .jsonl import read_jsonl

        return read_jsonl(source)
    if kind in ("arrow", "parquet"):
        from .columnar import read_columnar

        return read_columnar(source)
    if kind == "tar":
        from .tar import read_tar

        return read_tar(source, passed_over)
    if kind == "index":
        from .columnar import read_index

        return read_index(source)
    from .csv import read_csv

    return read_csv(source)
