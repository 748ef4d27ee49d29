"""Tar files of samples as webdataset reads them, the same byte for byte however often they are written."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path

from ...errors import ConfigError
from ...new_files import replacing, unfinished
from ...untrusted import read_json
from .rows import BadRow

_BESIDE = ".skipped.json"
_END = 1024
"""Bytes of zeros that every tar file ends with."""


def shard_name(number: int, count: int) -> str:
    """The name of shard ``number`` of ``count``."""
    return f"{number:0{max(6, len(str(count - 1)))}d}.tar"


def write_tar(path: Path, mark: str, files: Iterable[tuple[str, bytes]]) -> None:
    """Write named contents, in their order, with ``mark`` in front: it says what was asked for.

    Times and owners are those of nobody. Readers of tar files pass over the mark, a comment; but one without
    any file many could not read, so it has none.
    """
    files = iter(files)
    first = list(islice(files, 1))
    headers = {"comment": mark} if first else {}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
        for name, content in chain(first, files):
            member = tarfile.TarInfo(name)  # time 0, owner 0
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def is_finished(path: Path, mark: str) -> bool:
    """Whether a shard is there.

    Raises :class:`ConfigError` if what is there was made for something else than ``mark``, or is not whole.
    """
    try:
        with open(path, "rb") as file:
            found = _mark(file) or _mark_beside(path)
            file.seek(-_END, io.SEEK_END)
            whole = not any(file.read())
    except FileNotFoundError:
        return False
    except (OSError, tarfile.TarError, ValueError) as error:
        raise ConfigError(f"{path} is no tar file of pictures ({error}); move it away") from error
    if found != mark:
        raise ConfigError(f"{path} was not drawn from these prompts with these settings; name another folder")
    if not whole:
        raise ConfigError(f"{path} is not whole: delete it, and it is drawn again")
    return True


def note_skipped(path: Path, mark: str, skipped: Sequence[BadRow]) -> None:
    """Write beside a shard which rows are not in it, and why."""
    beside = path.with_suffix(_BESIDE)
    for left in unfinished(path.parent, beside.name):  # of a process that was killed
        left.unlink(missing_ok=True)
    told = {"shard": mark, "rows": [{"row": row.number, "error": row.reason} for row in skipped]}
    with replacing(beside) as temporary:
        temporary.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _mark_beside(path: Path) -> object:
    """The mark of a shard without pictures."""
    beside = path.with_suffix(_BESIDE)
    return read_json(beside, error=ConfigError).get("shard") if beside.exists() else None


def _mark(file: io.BufferedReader) -> str | None:
    with tarfile.open(fileobj=file, mode="r:") as tar:
        return tar.pax_headers.get("comment")
