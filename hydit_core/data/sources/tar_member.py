"""A file inside a tar file, by where it is."""

from __future__ import annotations

import tarfile
from pathlib import Path

from ...errors import DataError

BLOCK = 512
"""Bytes of a header."""


def read_member(path: Path, place: int) -> bytes:
    """The content of the member whose header is at byte ``place``. Raises :class:`DataError`."""
    try:
        with path.open("rb") as file:
            file.seek(place)
            member = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
            if not 0 <= member.size <= path.stat().st_size - place - BLOCK:
                raise DataError(f"{path} ends within {member.name}; it is not whole")
            return file.read(member.size)
    except (tarfile.TarError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path} at byte {place}: {reason}; has it changed?") from error
