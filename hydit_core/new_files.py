"""Files that are made and never replace others, whoever else writes into the folder at that moment."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path

from .errors import ConfigError


def write_new(
    path: Path,
    content: bytes,
    beside: Mapping[str, bytes] | None = None,
    *,
    overwrite: bool = False,
    keep_same: bool = False,
) -> Path:
    """Write a file, complete or not at all, under ``path``, or where that is taken with a number behind it.

    Args:
        beside: more files of the same name, by suffix (".txt"); the name is taken if one of them is.
        overwrite: replace what is there.
        keep_same: leave a file that holds the same already, and give its name.

    Returns:
        the path that was written.

    Raises:
        ConfigError: if the folder cannot be written to.
    """
    contents = {path.suffix: content, **(beside or {})}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporaries(path.parent, contents.values()) as temporaries:
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
    """Raise :class:`ConfigError` if no file can have this name: it is too long, or out of reach."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # ValueError: a zero character
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot write {path}: {reason}") from error


@contextlib.contextmanager
def _temporaries(folder: Path, contents: Iterable[bytes]) -> Iterator[list[Path]]:
    """The contents, each in a file of its own in ``folder``, on the disk; gone afterwards."""
    made: list[Path] = []
    try:
        for content in contents:
            # A short name: the one that is asked for may be as long as a name can be.
            made.append(folder / f".hydit-{secrets.token_hex(8)}.tmp")
            with open(made[-1], "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        yield made
    finally:
        for temporary in made:
            temporary.unlink(missing_ok=True)


def _place(temporaries: list[Path], targets: list[Path], overwrite: bool) -> bool:
    """Give all temporary files their names, or none where one is taken; say whether it was done."""
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
                # The next best: the name is taken first, and filled at once.
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
    """Give a file a name that no other has, in one step; False where the file system has no hard links."""
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
