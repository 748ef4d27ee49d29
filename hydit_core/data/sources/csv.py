"""CSV with a header line, as Tencent's scripts take it: ``img_path`` (or ``image_path``) and ``text_zh``."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from ...errors import DataError
from ..config import SourceConfig
from .entry import Entry
from .table import row_entry

_LONGEST_CELL = 1 << 24


def read_csv(source: SourceConfig) -> Iterator[Entry]:
    """Rows in the order of the file; a name that ends in ``.tsv`` is separated by tabs."""
    path = source.path
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row:  # DictReader keeps surplus cells under None
                    raise DataError(
                        f"{where}: more cells than the header has columns; quote texts with commas"
                    )
                yield row_entry(row, source, where)
    except csv.Error as error:
        raise DataError(f"{path} is not valid CSV: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}): save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    finally:
        csv.field_size_limit(limit)
