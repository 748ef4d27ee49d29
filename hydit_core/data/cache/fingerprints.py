"""What cache keys are made of: the hash of a module's weights, and the hashes of picture files."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ...errors import DataError
from ...untrusted import parse_json
from ..sources import PictureFile

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

_HASH = re.compile(r"[0-9a-f]{64}")
_RACY_SECONDS = 2.0
_SAVED_AT_ONCE = 1000


def module_hash(module: torch.nn.Module) -> str:
    """SHA-256, hexadecimal, of all weights and buffers with their names, shapes and dtypes.

    The groups and the epsilon of norms are included: they change the outputs and are not weights.
    """
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        for attribute in ("num_groups", "eps"):
            if (value := getattr(part, attribute, None)) is not None:
                digest.update(f"{name}.{attribute}={value};".encode())
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()


def file_hash(data: bytes) -> str:
    """SHA-256, hexadecimal, of a picture file's bytes."""
    return hashlib.sha256(data).hexdigest()


class PictureHashes:
    """SHA-256 of picture files, remembered by (path, size, time of change).

    So an unchanged picture is not read again, and an edited one always is: what was hashed within
    two seconds of its change is not remembered, because a second change might have left the same time.
    """

    def __init__(self, folder: Path, *, rank: int = 0) -> None:
        self._file = folder / f"pictures-{rank}.jsonl"
        self._known: dict[str, tuple[int, int, str]] = {}
        self._new: list[str] = []
        for path in sorted(folder.glob("pictures-*.jsonl")):
            for name, status in _read_hashes(path):
                self._known[name] = status

    def of(self, picture: PictureFile) -> str:
        """The hash of a picture's bytes. Raises :class:`DataError` if it cannot be read."""
        path = picture.path
        try:
            status = path.stat()
        except (OSError, ValueError) as error:  # ValueError: a zero character in the name
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"cannot read picture {path}: {reason}") from error
        name = str(path.resolve()) + (f"#{picture.row}" if picture.row >= 0 else "")
        known = self._known.get(name)
        if known is not None and known[:2] == (status.st_size, status.st_mtime_ns):
            return known[2]
        digest = file_hash(picture.read())
        if time.time() - status.st_mtime > _RACY_SECONDS:
            self._known[name] = (status.st_size, status.st_mtime_ns, digest)
            self._new.append(json.dumps([name, *self._known[name]]))
            if len(self._new) >= _SAVED_AT_ONCE:
                self.save()
        return digest

    def save(self) -> None:
        """Append the hashes computed since the last call to the file."""
        if not self._new:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "a", encoding="utf-8") as file:
                # A leading newline ends a line that a killed process may have left open.
                file.write("\n" + "\n".join(self._new) + "\n")
        except OSError as error:
            raise DataError(f"cannot write {self._file}: {error.strerror}") from error
        self._new.clear()


def _read_hashes(path: Path) -> Iterator[tuple[str, tuple[int, int, str]]]:
    """(name, (size, time of change, hash)) of a file's lines. Others are passed over: a killed process may
    have left one, and what is not known is hashed again.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    for line in filter(None, lines):
        try:
            values = parse_json(line, str(path), kind=list, error=DataError)
        except DataError:
            continue
        if [type(value) for value in values] == [str, int, int, str] and _HASH.fullmatch(values[3]):
            yield values[0], (values[1], values[2], values[3])
