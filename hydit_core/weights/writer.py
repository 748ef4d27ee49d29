"""Atomic, streaming writing of safetensors files."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..dtypes import SAFETENSORS_NAMES
from ..errors import WeightsError, printable
from .source import TensorSource, as_source

_ALIGNMENT = 64
_TEMPORARY = re.compile(r"\..*\.(\d{1,9})-[0-9a-f]{16}\.tmp", re.DOTALL)
_GRACE_SECONDS = 600

Progress = Callable[[int, int], object]
"""``(bytes written, bytes in all)``, called after each tensor."""


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary name in the folder of ``path``; rename it to ``path`` when the block succeeds.

    The block writes a file or makes a folder there. What it wrote reaches the disk before the rename, so
    ``path`` holds either its old content or the complete new one, also after a crash. An existing file is
    replaced, an existing folder is not. Parent folders are made. Nobody can guess the temporary name, and so
    put a link in its place; what a killed process left under such a name is warned of.

    Raises:
        WeightsError: if the place cannot be written to. The temporary file is gone then, unless it is
            complete and only the old file cannot be replaced.
    """
    path = Path(path)
    # Short: the name itself may be as long as a name can be.
    temporary = path.parent / f".{path.name[:40]}.{os.getpid()}-{secrets.token_hex(8)}.tmp"
    complete = kept = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # a name that cannot be, before hours of work
        _warn_of_abandoned(path.parent)
        yield temporary
        _sync(temporary)
        complete = True
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        # Windows refuses to replace a file that is open somewhere; hours of training may be in the new one.
        kept = complete and isinstance(error, PermissionError)
        where = f" (is it open in another program?); the new content is in {temporary}" if kept else ""
        raise WeightsError(f"cannot write {path}: {error.strerror or error}{where}") from error
    finally:
        if not kept:
            _remove(temporary)


def abandoned(folder: Path) -> list[Path]:
    """Temporary files in a folder whose process has died without removing them."""
    found = []
    for entry in os.scandir(folder):
        match = _TEMPORARY.fullmatch(entry.name)
        # A moment's grace: processes of another machine, on a shared disk, cannot be asked.
        if match and not _runs(int(match[1])) and time.time() - entry.stat().st_mtime > _GRACE_SECONDS:
            found.append(Path(entry.path))
    return sorted(found)


def _warn_of_abandoned(folder: Path) -> None:
    with contextlib.suppress(OSError):
        if left := abandoned(folder):
            names = printable(", ".join(path.name for path in left[:5]))
            warnings.warn(
                f"{folder} has {len(left)} unfinished files of processes that died; delete them: {names}",
                stacklevel=4,
            )


def _runs(process: int) -> bool:
    if os.name == "nt":  # there, asking would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _remove(path: Path) -> None:
    if os.path.isdir(path):  # unlike Path.is_dir, no error for a name that is too long or out of reach
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Force a file, or a folder with all that is in it, onto the disk."""
    for place in [path, *sorted(path.rglob("*"))] if path.is_dir() else [path]:
        if place.is_dir():
            _sync_folder(place)
        elif place.is_file():
            with open(place, "rb+") as handle:
                os.fsync(handle.fileno())


def _sync_folder(path: Path) -> None:
    # Windows cannot open folders, and there the rename itself is journaled.
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_safetensors(
    path: str | os.PathLike[str],
    tensors: TensorSource | Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    progress: Progress | None = None,
) -> None:
    """Write a safetensors file atomically, one tensor after another.

    At most one tensor of a lazy source is in memory at a time. Widest dtypes come first, then names in
    order, so that every tensor is aligned to its element size and equal content gives equal bytes.

    Raises:
        WeightsError: if a dtype has no place in the format or the file cannot be written.
    """
    source = as_source(tensors)
    order = sorted(source.keys(), key=lambda key: (-source.dtype(key).itemsize, key))
    header = _header(source, order, dict(metadata or {}))
    done, total = 0, sum(source.nbytes(key) for key in order)
    with atomic_path(path) as temporary, open(temporary, "xb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for key in order:
            _write_tensor(file, key, source)
            done += source.nbytes(key)
            if progress is not None:
                progress(done, total)


def _header(source: TensorSource, order: list[str], metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for key in order:
        dtype = source.dtype(key)
        if dtype not in SAFETENSORS_NAMES:
            raise WeightsError(f"{source.path}: {key} has dtype {dtype}, which safetensors cannot hold")
        end = offset + source.nbytes(key)
        shape = list(source.shape(key))
        entries[key] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-(len(text) + 8) % _ALIGNMENT)


def _write_tensor(file: BinaryIO, key: str, source: TensorSource) -> None:
    tensor = source.get(key)
    if tuple(tensor.shape) != source.shape(key) or tensor.dtype != source.dtype(key):
        raise WeightsError(
            f"{source.path}: {key} is {tensor.dtype} {tuple(tensor.shape)},"
            f" its header says {source.dtype(key)} {source.shape(key)}"
        )
    if tensor.numel():
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        file.write(flat.numpy().data)
