"""Files and folders that appear whole or not at all, even if others write there at the same time.

Until it is complete, a file has a temporary name in its final folder. Nobody can guess that name and put a
link in its place. The content reaches the disk before it gets its final name.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path

from .errors import ConfigError, WeightsError, printable

_TEMPORARY = re.compile(r"\.(.*)\.(\d{1,9})-[0-9a-f]{16}\.tmp", re.DOTALL)
_KEPT_OF_NAME = 40
_GRACE_SECONDS = 600


class NotReplacedError(PermissionError):
    """The old content could not be replaced; the new content is complete, in the file ``filename``."""


# -- files that may replace older ones ----------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As :func:`replacing`, for output that a user asked for; an existing folder is not replaced.

    Warns of what a killed process left in the same folder.

    Raises:
        WeightsError: if the file cannot be written there. The temporary file is removed then, unless it is
            complete and only the old file cannot be replaced.
    """
    path = Path(path)
    try:
        with replacing(path) as temporary:
            _warn_of_abandoned(path.parent)
            yield temporary
    except OSError as error:
        where = ""
        if isinstance(error, NotReplacedError):
            where = f" (is it open in another program?); the new content is in {error.filename}"
        raise WeightsError(f"cannot write {path}: {error.strerror or error}{where}") from error


@contextlib.contextmanager
def replacing(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Give a temporary name in the folder of ``path``; rename it to ``path`` when the block succeeds.

    The block writes a file or makes a folder there. What it wrote reaches the disk before the rename, so
    ``path`` holds either its old content or the complete new one, also after a crash. Parent folders are
    made.

    Args:
        folder: an existing folder is replaced too. That takes two renames: after a crash between them, there
            is none.

    Raises:
        NotReplacedError: the new content is complete and stays, but the old file cannot be replaced.
        OSError: anything else went wrong; nothing of the new content is left.
    """
    temporary = temporary_beside(path)
    kept = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # so that an impossible name fails before hours of work
        yield temporary
        _sync(temporary)
        with _set_aside(path) if folder else contextlib.nullcontext():
            try:
                os.replace(temporary, path)
            except PermissionError as error:
                # Windows refuses to replace a file that is open somewhere; the new one may hold hours of
                # training.
                kept = not folder
                if not kept:
                    raise
                raise NotReplacedError(error.errno, error.strerror, str(temporary)) from error
            _sync_folder(path.parent)
    finally:
        if not kept:
            _delete(temporary)


@contextlib.contextmanager
def _set_aside(folder: Path) -> Iterator[None]:
    """Move an existing folder out of the way; it is restored if the block fails, and deleted if not."""
    if not folder.is_dir():
        yield
        return
    aside = temporary_beside(folder)
    os.replace(folder, aside)
    try:
        yield
    finally:  # after Ctrl-C too
        if folder.exists():
            _delete(aside)
        else:
            os.replace(aside, folder)


def remove_folder(folder: Path) -> None:
    """Delete a folder, renaming it first, so that a crash leaves no half of it under its name.

    What cannot be deleted stays, which costs only disk space.
    """
    dying = folder if _TEMPORARY.fullmatch(folder.name) else temporary_beside(folder)
    with contextlib.suppress(OSError):
        if dying != folder:
            os.replace(folder, dying)
        shutil.rmtree(dying)


def _delete(path: Path) -> None:
    if os.path.isdir(path):  # unlike Path.is_dir, never raises: the name may be too long, or out of reach
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file, or a folder with all its content, to the disk."""
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


# -- temporary names ----------------------------------------------------------------------------------------


def temporary_beside(path: Path) -> Path:
    """A temporary name for ``path``: in its folder, marked with this process, and impossible to guess."""
    # Only the start of the name, which may itself be as long as names can be.
    start = path.name[:_KEPT_OF_NAME]
    return path.parent / f".{start}.{os.getpid()}-{secrets.token_hex(8)}.tmp"


def unfinished(folder: Path, name: str | None = None) -> list[Path]:
    """What has a temporary name in a folder (for ``name``, if given), whether or not its process lives."""
    found = ((Path(entry.path), _TEMPORARY.fullmatch(entry.name)) for entry in os.scandir(folder))
    start = None if name is None else name[:_KEPT_OF_NAME]
    return sorted(path for path, match in found if match and start in (None, match[1]))


def abandoned(folder: Path) -> list[Path]:
    """Temporary files in a folder whose process has died without removing them."""
    # Recent files are spared: on a shared disk they may be those of a process on another machine.
    return [
        path
        for path in unfinished(folder)
        if not _runs(_process(path)) and time.time() - path.stat().st_mtime > _GRACE_SECONDS
    ]


def _process(path: Path) -> int:
    match = _TEMPORARY.fullmatch(path.name)
    assert match is not None  # unfinished() matched the same pattern
    return int(match[2])


def _warn_of_abandoned(folder: Path) -> None:
    with contextlib.suppress(OSError):
        if left := abandoned(folder):
            names = printable(", ".join(path.name for path in left[:5]))
            warnings.warn(
                f"{folder} has {len(left)} unfinished files of processes that died; delete them: {names}",
                stacklevel=4,
            )


def _runs(process: int) -> bool:
    if os.name == "nt":  # on Windows, os.kill would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


# -- new files, which by default replace nothing ------------------------------------------------------------


def write_new(
    path: Path,
    content: bytes,
    beside: Mapping[str, bytes] | None = None,
    *,
    overwrite: bool = False,
    keep_same: bool = False,
) -> Path:
    """Write a file, complete or not at all, under ``path``, with a number added if that name is taken.

    Args:
        beside: more files of the same name, by suffix (".txt"); the name is taken if one of theirs is.
        overwrite: replace what is there.
        keep_same: if a file already has the same content, leave it and return its name.

    Returns:
        the path that was written.

    Raises:
        ConfigError: if the folder cannot be written to.
    """
    contents = {path.suffix: content, **(beside or {})}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporaries(path, contents.values()) as temporaries:
            for number in count(1):
                stem = path.stem if number == 1 else f"{path.stem}-{number}"
                targets = [path.with_name(stem + suffix) for suffix in contents]
                if keep_same and all(map(_holds, targets, contents.values())):
                    return targets[0]
                if _place(temporaries, targets, overwrite):
                    return targets[0]
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
    raise AssertionError("unreachable")


def check_name(path: Path) -> None:
    """Raise :class:`ConfigError` if no file can have this name: it is too long, or cannot be accessed."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot write {path}: {reason}") from error


@contextlib.contextmanager
def _temporaries(path: Path, contents: Iterable[bytes]) -> Iterator[list[Path]]:
    """The contents, each flushed to its own temporary file beside ``path``; removed afterwards."""
    made: list[Path] = []
    try:
        for content in contents:
            made.append(temporary_beside(path))
            with open(made[-1], "xb") as file:
                file.write(content)
            _sync(made[-1])
        yield made
    finally:
        for temporary in made:
            _delete(temporary)


def _place(temporaries: list[Path], targets: list[Path], overwrite: bool) -> bool:
    """Give all temporary files their names, or none if one is taken; returns whether it did."""
    pairs = list(zip(temporaries, targets, strict=True))
    if overwrite:
        for temporary, target in pairs:
            os.replace(temporary, target)
        return True
    placed: list[Path] = []
    empty: list[tuple[Path, Path]] = []
    for temporary, target in pairs:
        try:
            if not _link(temporary, target):
                # The next best: create the name first, and replace it at once.
                open(target, "xb").close()
                empty.append((temporary, target))
        except FileExistsError:
            for other in placed:
                other.unlink()
            return False
        placed.append(target)
    for temporary, target in empty:
        os.replace(temporary, target)
    return True


def _link(temporary: Path, target: Path) -> bool:
    """Give a file a new name in one step; False if the file system has no hard links.

    Raises FileExistsError if the name is taken.
    """
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except (OSError, AttributeError):
        return False
    return True


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.stat().st_size == len(content) and path.read_bytes() == content
    except OSError:
        return False
