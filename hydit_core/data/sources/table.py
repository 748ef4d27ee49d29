"""What the formats with rows and named columns share: which column is the picture, which the caption."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..config import SourceConfig
from .entry import Entry, PictureFile

IMAGE_FIELDS = ("image", "file_name", "image_path", "img_path", "path", "file")
CAPTION_FIELDS = ("caption", "captions", "text", "prompt", "text_zh", "text_en")


def row_entry(row: Mapping[str, Any], source: SourceConfig, where: str) -> Entry:
    """One row as an :class:`Entry`; ``where`` ("data.jsonl, line 7") appears in errors."""
    image_field = source.image_field or next((f for f in IMAGE_FIELDS if row.get(f)), None)
    value = row.get(image_field) if image_field else None
    if not isinstance(value, str) or not value.strip():
        wanted = source.image_field or "one of " + ", ".join(IMAGE_FIELDS)
        raise DataError(
            f"{where}: no picture path; expected {wanted}, found {', '.join(map(str, row)) or 'nothing'}"
        )
    root = source.root or source.path.parent
    captions, hint = row_captions(row, source, where)
    return Entry(
        key=Path(value.strip()).as_posix(),
        path=root / value.strip(),
        captions=captions,
        width=row_side(row, "width", where),
        height=row_side(row, "height", where),
        extra=row_extra(row, source, where),
        hint=hint,
    )


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
            if not isinstance(text, str):
                raise DataError(
                    f"{where}: {name} holds {type(text).__name__}, expected text or a list of texts"
                )
            if text.strip():
                found.append(text.strip())
    return tuple(found), "" if found else f"no text in {', '.join(fields)}"


def row_extra(row: Mapping[str, Any], source: SourceConfig, where: str) -> dict[str, PictureFile]:
    """A row's control picture and mask, where the source has columns for them."""
    extra: dict[str, PictureFile] = {}
    root = source.root or source.path.parent
    if source.control_field:
        control = row.get(source.control_field)
        if not isinstance(control, str) or not control.strip():
            raise DataError(f"{where}: no control picture in {source.control_field!r}")
        extra["control"] = PictureFile(root / control.strip())
    mask = row.get(source.mask_field) if source.mask_field else None
    if not isinstance(mask, (str, type(None))):
        raise DataError(f"{where}: {source.mask_field} holds {type(mask).__name__}, expected a path")
    if mask and mask.strip():
        extra["mask"] = PictureFile(root / mask.strip())
    return extra


def row_side(row: Mapping[str, Any], name: str, where: str) -> int:
    """A width or height that a row may give; 0 if it does not."""
    value = row.get(name)
    if value in (None, ""):
        return 0
    try:
        side = int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {name} is {value!r}, expected a number of pixels") from error
    if side <= 0:
        raise DataError(f"{where}: {name} is {side}, expected a number of pixels")
    return side
