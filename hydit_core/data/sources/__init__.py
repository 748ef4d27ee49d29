"""Where pictures and captions come from: one module per format, all yielding :class:`Entry` rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...errors import DataError
from ..config import SourceConfig
from .entry import Entry, PassedOver, PictureFile, Tally

__all__ = ["Entry", "PassedOver", "PictureFile", "Tally", "read_source", "source_kind", "tables_of"]


def source_kind(source: SourceConfig) -> str:
    """The format of a source: as configured, or told from its path. Raises DataError."""
    path = source.path
    if not path.exists():
        raise DataError(f"data source {path} does not exist")
    if source.kind != "auto":
        return source.kind
    if path.is_dir():
        return "folder"
    kinds = {
        ".jsonl": "jsonl",
        ".ndjson": "jsonl",
        ".csv": "csv",
        ".tsv": "csv",
        ".arrow": "arrow",
        ".parquet": "parquet",
        ".json": "index",
    }
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise DataError(
            f"data source {path}: expected a folder of pictures, or a file that ends in {', '.join(kinds)}; "
            "set kind if the name is another"
        )
    return kind


def tables_of(source: SourceConfig) -> list[Path]:
    """The files that decide which rows a source has; none for a folder of pictures. Raises DataError."""
    return [] if source_kind(source) == "folder" else [source.path]


def read_source(source: SourceConfig, passed_over: PassedOver) -> Iterator[Entry]:
    """All rows of a source, in a fixed order. Raises DataError where the source is malformed.

    ``passed_over`` gets what lies there and is no row.
    """
    kind = source_kind(source)
    if kind == "folder":
        from .folder import read_folder

        return read_folder(source, passed_over)
    if kind == "jsonl":
        from .jsonl import read_jsonl

        return read_jsonl(source)
    if kind in ("arrow", "parquet"):
        from .columnar import read_columnar

        return read_columnar(source)
    if kind == "index":
        from .columnar import read_index

        return read_index(source)
    from .csv import read_csv

    return read_csv(source)
