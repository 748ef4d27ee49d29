"""A folder (with its subfolders) of pictures, each with a same-named ``.txt`` beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ...errors import DataError
from ..config import SourceConfig
from .entry import Entry, PictureFile

PICTURE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
)
_CAPTION_LIKE = (".caption", ".captions", ".txt", ".text", ".json", ".md", ".cap")


def read_folder(source: SourceConfig) -> Iterator[Entry]:
    """Pictures in the order of their relative paths. Hidden files and folders are left out, and masks and
    control pictures that this run does not use.

    The whole ``.txt`` is one caption, its line breaks turned to spaces; with ``caption_lines`` each
    line is one alternative.
    """
    root = source.path
    if not root.is_dir():
        raise DataError(f"data source {root} is not a folder")
    beside = {"control": source.control_dir, "mask": source.mask_dir}
    folders = {kind: folder for kind, folder in beside.items() if folder is not None}
    found = False
    for folder, names in _walk(root):
        if any(folder.is_relative_to(other) for other in folders.values()):
            continue
        present = set(names)
        for file_name in names:
            if Path(file_name).suffix.lower() not in PICTURE_SUFFIXES:
                continue
            found = True
            path = folder / file_name
            captions, hint = _captions(folder, path.stem, present, source.caption_lines)
            name = path.relative_to(root)
            if not captions and _lies_beside(root, name):
                continue
            extra = {kind: PictureFile(_namesake(other, name)) for kind, other in folders.items()}
            yield Entry(name.as_posix(), path, captions, extra=extra, hint=hint)
    if not found:
        raise DataError(f"data source {root}: no pictures found ({', '.join(sorted(PICTURE_SUFFIXES))})")


def _lies_beside(root: Path, name: Path) -> bool:
    """Whether a picture without caption is a mask or control picture: in their folder, named like another."""
    return name.parts[0] in ("control", "mask") and _namesake(root, Path(*name.parts[1:])).is_file()


def _namesake(folder: Path, picture: Path) -> Path:
    """What belongs to ``picture`` in ``folder``: of the same relative name, with any suffix of a picture."""
    same = folder / picture
    others = (same.with_suffix(suffix) for suffix in sorted(PICTURE_SUFFIXES))
    return next((path for path in (same, *others) if path.is_file()), same)


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    def unreadable(error: OSError) -> None:
        raise DataError(f"cannot list {error.filename}: {error.strerror}") from error

    for folder, subfolders, names in os.walk(root, onerror=unreadable, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield Path(folder), sorted(name for name in names if not name.startswith("."))


def _captions(folder: Path, stem: str, present: set[str], lines: bool) -> tuple[tuple[str, ...], str]:
    """(captions, hint): the hint names a file that looks like the caption when there is none."""
    name = f"{stem}.txt"
    if name in present:
        text = read_text(folder / name)
        parts = text.splitlines() if lines else [" ".join(text.split("\n"))]
        captions = tuple(part.strip() for part in parts if part.strip())
        return captions, "" if captions else f"{name} is empty"
    for other in sorted(present):
        start, suffix = os.path.splitext(other)
        if suffix.lower() in _CAPTION_LIKE and Path(start).stem.lower() in (
            stem.lower(),
            Path(stem).stem.lower(),
        ):
            return (), f"found {other}, expected {name}"
    return (), ""


def read_text(path: Path) -> str:
    """A UTF-8 text file, with or without a byte order mark. Raises DataError naming it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
