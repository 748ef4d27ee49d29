"""What the formats with rows and named columns share: which column is the picture, which the caption."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from ...errors import DataError
from ...untrusted import decode
from ..config import SourceConfig
from ..remote import RemotePath, is_url, place
from .entry import Entry, PictureFile

IMAGE_FIELDS = ("image", "file_name", "image_path", "img_path", "path", "file")
CAPTION_FIELDS = ("caption", "captions", "text", "prompt", "text_zh", "text_en")


_LONGEST_LINE = 64 << 20
_MOST_PIXELS = 1_000_000
"""Of a side; no format of pictures has more in practice."""


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a file in UTF-8, with their ends. Raises :class:`DataError` if it is no such file."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE + 1), b""), 1):
                if len(line) > _LONGEST_LINE:
                    raise DataError(f"{path}, line {number} is longer than {_LONGEST_LINE >> 20} MB")
                # Decoded line by line, so that the place is known; only the first may begin with a mark.
                yield decode(line, str(path) if number == 1 else f"{path}, line {number},", DataError)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def row_entry(row: Mapping[str, Any], source: SourceConfig, where: str) -> Entry:
    """One row as an :class:`Entry`; ``where`` ("data.jsonl, line 7") appears in errors.

    A picture is a path, or a :class:`PictureFile` inside the table.
    """
    image_field = source.image_field or next((f for f in IMAGE_FIELDS if row.get(f)), None)
    value = _named(row.get(image_field)) if image_field else None
    if not (isinstance(value, str) and value.strip()) and not isinstance(value, PictureFile):
        wanted = source.image_field or "one of " + ", ".join(IMAGE_FIELDS)
        raise DataError(
            f"{where}: no picture path; expected {wanted}, found {', '.join(map(str, row)) or 'nothing'}"
        )
    captions, hint = row_captions(row, source, where)
    picture = _file(value, source)
    if isinstance(value, PictureFile):
        key = f"{value.path.name}#{value.row}"
    else:
        key = PurePath(_slashes(value.strip())).as_posix()
    return Entry(
        key=key,
        path=picture.path,
        captions=captions,
        width=row_side(row, "width", where),
        height=row_side(row, "height", where),
        extra=row_extra(row, source, where),
        hint=hint,
        row=picture.row,
        column=picture.column,
    )


def _named(value: Any) -> Any:
    """A cell, or the path in it where it is an object as `datasets` writes them into JSON."""
    return value.get("path") if isinstance(value, dict) and not value.get("bytes") else value


def _file(value: str | PictureFile, source: SourceConfig) -> PictureFile:
    """The picture that a cell means.

    Tables travel: a path may be written with backslashes, or its accents with another of Unicode's two
    spellings than the file's name.
    """
    if isinstance(value, PictureFile):
        return value
    root, name = source.root or source.path.parent, value.strip()
    if isinstance(root, RemotePath):
        # What a table on this machine names is looked for on this machine, whatever it is called.
        return PictureFile(place(name) if is_url(name) else root / _slashes(name))
    path = root / name
    if ("\\" in name or not name.isascii()) and not os.path.lexists(path):
        straight = _slashes(name)
        spellings = (straight, *(unicodedata.normalize(form, straight) for form in ("NFC", "NFD")))
        others = (root / spelling for spelling in dict.fromkeys(spellings) if spelling != name)
        path = next((other for other in others if os.path.lexists(other)), path)
    return PictureFile(path)


def _slashes(name: str) -> str:
    return name.replace("\\", "/")


def row_captions(row: Mapping[str, Any], source: SourceConfig, where: str) -> tuple[tuple[str, ...], str]:
    """(captions, hint): all texts in the caption columns, and where there should have been one."""
    found: list[str] = []
    fields = source.caption_fields or CAPTION_FIELDS
    for name in fields:
        value = row.get(name)
        values = value if isinstance(value, list) else [value]
        for text in values:
            if text is None:
                continue
            if isinstance(text, bytes):
                text = decode(text, f"{where}: {name}", DataError)
            if not isinstance(text, str):
                raise DataError(
                    f"{where}: {name} holds {type(text).__name__}, expected text or a list of texts"
                )
            if text.strip():
                found.append(text.strip())
    return tuple(found), "" if found else f"no text in {', '.join(fields)}"


def row_extra(row: Mapping[str, Any], source: SourceConfig, where: str) -> dict[str, PictureFile]:
    """A row's control picture, mask and prompt picture, where the source has columns for them."""
    extra: dict[str, PictureFile] = {}
    fields = {
        "control": source.control_field,
        "mask": source.mask_field,
        "image_prompt": source.image_prompt_field,
    }
    for kind, field in fields.items():
        value = _named(row.get(field)) if field else None
        if not isinstance(value, (str, PictureFile, type(None))):
            raise DataError(f"{where}: {field} holds {type(value).__name__}, expected a path")
        if isinstance(value, PictureFile) or (value and value.strip()):
            extra[kind] = _file(value, source)
        elif field and kind == "control":
            raise DataError(f"{where}: no control picture in {field!r}")
    return extra


def row_side(row: Mapping[str, Any], name: str, where: str) -> int:
    """A width or height that a row may give, as a number or as text; 0 if it does not."""
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return 0
    try:
        if isinstance(value, bool):
            raise ValueError(value)
        if isinstance(value, np.generic):
            value = value.item()  # half floats of pyarrow's older releases
        side = Decimal(value)  # exact: "64.0" is 64, 64.5 is no number of pixels
        if side != side or side != int(side):
            raise ValueError(value)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise DataError(f"{where}: {name} is {_short(value)}, expected a number of pixels") from error
    if not 0 < side <= _MOST_PIXELS:
        raise DataError(f"{where}: {name} is {_short(value)}, expected a number of pixels")
    return int(side)


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
