"""JSON Lines: one object per line with a picture's path and its caption or captions."""

from __future__ import annotations

from collections.abc import Iterator

from ...errors import DataError
from ...untrusted import parse_json
from ..config import SourceConfig
from .entry import Entry
from .table import row_entry, text_lines


def read_jsonl(source: SourceConfig) -> Iterator[Entry]:
    """Rows in the order of the file; empty lines are passed over."""
    path = source.path
    for number, line in enumerate(text_lines(path), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield row_entry(parse_json(line, where, error=DataError), source, where)
