"""Tar files of pictures as webdataset and img2dataset write them: files of one name are one sample.

``0001.jpg``, ``0001.txt`` (the caption) and ``0001.json`` (its keys are columns) belong together, if they
follow each other. A picture is found again by its place in the file, so nothing is unpacked.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import DataError
from ...images import PICTURE_SUFFIXES
from ...untrusted import decode, parse_json
from ..config import SourceConfig
from .entry import TAR, Entry, PassedOver, PictureFile
from .table import CAPTION_FIELDS, IMAGE_FIELDS, row_entry
from .tar_member import BLOCK

_LONGEST_TEXT = 1 << 20


def read_tar(source: SourceConfig, passed_over: PassedOver) -> Iterator[Entry]:
    """The samples of one tar file, in its order.

    Names are those of columns: ``mask_field = "mask.png"`` takes ``0001.mask.png``. ``passed_over`` gets
    samples without a picture. Raises :class:`DataError` for a damaged or compressed file.
    """
    path = source.path
    name, sample = "", dict[str, Any]()
    for member, content in _members(path):
        start, _, suffix = _split(member.name)
        if start != name and sample:
            yield from _entry(source, path, name, sample, passed_over)
            sample = {}
        name = start
        sample[suffix] = content
    if sample:
        yield from _entry(source, path, name, sample, passed_over)


def _split(member: str) -> tuple[str, str, str]:
    """A member's name up to the first dot of its last part, the dot, and the rest."""
    folder, slash, last = member.rpartition("/")
    start, dot, suffix = last.partition(".")
    return folder + slash + start, dot, suffix.lower()


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, Any]]:
    """The files of a tar file: texts as they are, of others the place."""
    try:
        size = path.stat().st_size
        with path.open("rb") as opened, tarfile.open(fileobj=opened, mode="r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep all
                hidden = any(part.startswith(".") for part in PurePosixPath(member.name).parts)
                if not member.isreg() or member.issparse() or hidden:
                    continue
                if member.offset_data + member.size > size:
                    raise DataError(f"{path} ends within {member.name}; it is not whole")
                suffix = _split(member.name)[2]
                if suffix in ("txt", "caption", "json"):
                    if member.size > _LONGEST_TEXT:
                        raise DataError(
                            f"{path}: {member.name} has {member.size:,} bytes, too many for a text"
                        )
                    file = archive.extractfile(member)
                    yield member, b"" if file is None else file.read()
                else:
                    yield member, PictureFile(path, member.offset_data - BLOCK, TAR)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"cannot read {path}: {reason}; expected a tar file that is not compressed"
        ) from error


def _entry(
    source: SourceConfig, path: Path, name: str, sample: dict[str, Any], passed_over: PassedOver
) -> Iterator[Entry]:
    where = f"{path}, {name}"
    row = parse_json(sample["json"], f"{where}.json", error=DataError) if sample.get("json") else {}
    for suffix in IMAGE_FIELDS:
        row.pop(suffix, None)  # where it was before
    for suffix, content in sample.items():
        if suffix in ("txt", "caption"):
            row = {key: value for key, value in row.items() if key not in CAPTION_FIELDS}
            row["caption"] = decode(content, f"{where}.{suffix}", DataError)
        elif isinstance(content, PictureFile):
            row[suffix] = content
    beside = {source.control_field, source.mask_field, source.image_prompt_field}
    pictures = [s for s in sample if f".{s}" in PICTURE_SUFFIXES and s not in beside]
    field = source.image_field or (pictures[0] if pictures else "")
    if not isinstance(row.get(field), PictureFile):
        passed_over.alone.add(where)
        return
    entry = row_entry(row, source.model_copy(update={"image_field": field}), where)
    yield replace(entry, key=f"{path.name}/{name}.{field}")
