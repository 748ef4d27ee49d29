"""Where pictures and captions come from: one module per format, all yielding :class:`Entry` rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

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
    "read_source",
    "source_kind",
    "tables_of",
]


def read_source(source: SourceConfig, passed_over: PassedOver) -> Iterator[Entry]:
    """All rows of a source, in a fixed order. Raises DataError where the source is malformed.

    ``passed_over`` gets what lies there and is no row.
    """
    kind = source_kind(source)
    if kind == "folder":
        from .folder import read_folder

        yield from read_folder(source, passed_over)
        return
    files = tables_of(source)
    if kind in ("arrow", "parquet"):
        from .arrow_table import check_tables

        check_tables(files)
    column, base = "", base_of(source)
    for path in files:
        inside = path.parent.relative_to(base).as_posix() if path.is_relative_to(base) else "."
        for entry in _read_file(source.model_copy(update={"path": path}), kind, passed_over):
            if entry.column and column and entry.column != column:
                raise DataError(
                    f"{path}: its pictures are in {entry.column!r}, those of the files before in {column!r}; "
                    "set image_field, or make two sources of them"
                )
            column = entry.column or column
            # Shards of several folders may have one name.
            yield entry if inside == "." else replace(entry, key=f"{inside}/{entry.key}")


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
