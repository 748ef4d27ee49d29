"""CSV with a header line, as Tencent's scripts take it: ``img_path`` (or ``image_path``) and ``text_zh``."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from ...errors import DataError
from ..config import SourceConfig
from .entry import Entry
from .table import row_entry, text_lines

_LONGEST_CELL = 1 << 24


def read_csv(source: SourceConfig) -> Iterator[Entry]:
    """Rows in the order of the file; a name that ends in ``.tsv`` is separated by tabs."""
    path = source.path
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        reader = csv.DictReader(text_lines(path), delimiter=delimiter)
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row:  # DictReader keeps surplus cells under None
                raise DataError(f"{where}: more cells than the header has columns; quote texts with commas")
            yield row_entry(row, source, where)
    except csv.Error as error:
        raise DataError(f"{path} is not valid CSV: {error}") from error
    finally:
        csv.field_size_limit(limit)
