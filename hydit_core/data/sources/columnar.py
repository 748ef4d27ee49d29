"""Arrow and Parquet tables: captions and sizes column by column, pictures as cells or as paths.

Tencent's training data are Arrow files (columns ``image``: the encoded picture, ``text_zh``, ``md5``,
``width``, ``height``), with an index JSON that lists the files and the rows that a training uses
(Tencent/HunyuanDiT, IndexKits). Hugging Face's ``datasets`` write ``image`` as a struct of bytes and path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError
from ...untrusted import read_json
from ..config import SourceConfig
from .arrow_table import Table, check_tables, open_table
from .entry import Entry, PictureFile
from .table import CAPTION_FIELDS, IMAGE_FIELDS, row_entry

_ROWS_AT_ONCE = 1024


def read_columnar(source: SourceConfig) -> Iterator[Entry]:
    """All rows of one Arrow (``.arrow``) or Parquet file, in its order."""
    check_tables([source.path])
    return _entries(source, source.path)


def read_index(source: SourceConfig) -> Iterator[Entry]:
    """The rows of an index JSON, with or without resolution groups, in the order of its files.

    The groups themselves are not used: rows go to this run's own buckets. A path in the JSON is
    relative to ``root`` if that is set, else to the JSON's folder or the nearest folder above in
    which the file exists, so that a copied project tree works from anywhere.
    """
    path = source.path
    # A million pictures are a million numbers here.
    content = read_json(path, error=DataError, max_bytes=1 << 30, max_values=100_000_000)
    try:
        files = [str(name) for name in content["arrow_files"]]
        ends = [int(end) for end in content["cum_length"]]
        rows = _index_rows(path, content)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"cannot read what {path} lists: {error}") from error
    except Exception as error:  # numpy's reader raises what zip, zlib and its own parser raise
        raise DataError(f"{path} is not an index of Arrow files: {error!r}") from error
    ascending = ends == sorted(ends)
    if len(files) != len(ends) or not ascending or not 0 <= rows[0] <= rows[-1] < (ends or [0])[-1]:
        raise DataError(
            f"{path}: arrow_files, cum_length and indices do not fit together; build the index again"
        )
    parts: list[tuple[Path, np.ndarray]] = []
    start = 0
    for name, end in zip(files, ends, strict=True):
        first, last = np.searchsorted(rows, [start, end])
        if last > first:
            parts.append((_find(path, name, source.root), rows[first:last] - start))
        start = end
    check_tables([file for file, _ in parts])
    for file, own in parts:
        yield from _entries(source, file, own)


def _index_rows(path: Path, content: dict[str, Any]) -> np.ndarray:
    """Global row numbers, ascending, of all groups."""
    parts: list[Any] = [content["indices"]] if isinstance(content.get("indices"), list) else []
    if content.get("indices_file"):
        with np.load(path.parent / content["indices_file"], allow_pickle=False) as arrays:
            parts += [arrays[name] for name in arrays.files]
    arrays_of_rows = [np.asarray(part) for part in parts if len(part)]
    if not arrays_of_rows:
        raise DataError(f"{path} selects no rows")
    if any(array.dtype.kind not in "iu" or array.ndim != 1 for array in arrays_of_rows):
        raise DataError(f"{path}: indices that are no list of whole numbers; build the index again")
    return np.sort(np.concatenate(arrays_of_rows).astype(np.int64))


def _find(index: Path, name: str, root: Path | None) -> Path:
    if root is not None or Path(name).is_absolute():
        found = (root or Path()) / name
        if os.path.isfile(found):  # not Path.is_file, which raises for names too long
            return found
    else:
        for folder in index.resolve().parents:
            if os.path.isfile(folder / name):
                return folder / name
    where = f"in {root}" if root is not None else "beside it and in the folders above"
    shown = name if len(name) <= 300 else f"{name[:300]}..."
    raise DataError(f"{index} lists {shown}, which was not found {where}; set the source's root")


def _entries(source: SourceConfig, path: Path, rows: np.ndarray | None = None) -> Iterator[Entry]:
    table = open_table(path)
    names = table.names()
    image_field = source.image_field or next((f for f in IMAGE_FIELDS if f in names), None)
    if image_field not in names:
        wanted = source.image_field or "one of " + ", ".join(IMAGE_FIELDS)
        raise DataError(f"{path}: no column for pictures; expected {wanted}, found {', '.join(names)}")
    assert image_field is not None
    beside = [source.control_field, source.mask_field, source.image_prompt_field]
    pictures = _columns(table, [image_field, *beside], _PICTURE)
    captions = _columns(table, source.caption_fields or CAPTION_FIELDS, _CAPTION)
    sides = _columns(table, ("width", "height"), _SIDE)
    embedded = [name for name in pictures if table.kind(name) == "picture"]
    plain = list(dict.fromkeys([*pictures, *captions, *sides]))
    source = source.model_copy(update={"image_field": image_field})
    numbers = range(len(table)) if rows is None else rows
    for start in range(0, len(numbers), _ROWS_AT_ONCE):
        chunk = numbers[start : start + _ROWS_AT_ONCE]
        found = table.values([name for name in plain if name not in embedded], chunk)
        for name in embedded:
            for row, picture in zip(found, table.pictures(name, chunk), strict=True):
                row[name] = PictureFile(path, picture, name) if isinstance(picture, int) else picture
        for number, row in zip(chunk, found, strict=True):
            if row[image_field] is None and image_field in embedded:
                # Unreadable, which may be allowed: reading it will say that it is empty.
                row[image_field] = PictureFile(path, int(number), image_field)
            yield row_entry(row, source, f"{path}, row {number}")


_PICTURE = ("text", "picture", "empty"), "pictures or their paths"
_CAPTION = ("text", "texts", "picture", "empty"), "texts or lists of texts"
_SIDE = ("number", "text", "empty"), "numbers of pixels"


def _columns(table: Table, wanted: Sequence[str | None], expected: tuple[tuple[str, ...], str]) -> list[str]:
    """Those of the columns that the table has. DataError for one that cannot be what it should be."""
    kinds, what = expected
    present = [name for name in wanted if name is not None and name in table.names()]
    for name in present:
        if table.kind(name) not in kinds:
            raise DataError(
                f"{table.path}: column {name!r} is of type {table.type_name(name)}, expected {what}; name "
                "another column, or convert it"
            )
    return present
