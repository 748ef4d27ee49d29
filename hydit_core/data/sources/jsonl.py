"""JSON Lines: one object per line with a picture's path and its caption or captions."""

from __future__ import annotations

from collections.abc import Iterator

from ...errors import DataError
from ...untrusted import parse_json
from ..config import SourceConfig
from .entry import Entry
from .table import row_entry


def read_jsonl(source: SourceConfig) -> Iterator[Entry]:
    """Rows in the order of the file; empty lines are passed over."""
    path = source.path
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                yield row_entry(parse_json(line, where, error=DataError), source, where)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}): save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
