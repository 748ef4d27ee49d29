"""A folder (with its subfolders) of pictures, each with a same-named ``.txt`` beside it."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from ...errors import DataError
from ...images import PICTURE_SUFFIXES
from ...untrusted import decode, read_text
from ..config import SourceConfig
from ..remote import RemotePath
from .entry import Entry, PassedOver, PictureFile

_OTHER_PICTURES = frozenset(
    (
        *(".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpx", ".jpf", ".jpe", ".jif", ".jfi", ".apng"),
        *(".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".psd", ".psb", ".xcf", ".kra", ".svg", ".eps", ".pcx"),
        *(".ico", ".icns", ".dds", ".exr", ".hdr", ".qoi", ".wbmp", ".xbm", ".sgi", ".jxr", ".wdp", ".bpg"),
        *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw", ".raw"),
    )
)
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".arrow", ".parquet", ".tar")
_CAPTION_LIKE = (".caption", ".captions", ".txt", ".text", ".json", ".md", ".cap")


def read_folder(source: SourceConfig, passed_over: PassedOver) -> Iterator[Entry]:
    """Pictures in the order of their relative paths. Hidden files and folders are left out, and masks and
    control pictures that this run does not use.

    The whole ``.txt`` is one caption, its line breaks turned to spaces; with ``caption_lines`` each
    line is one alternative. ``passed_over`` gets pictures of other formats, and captions of no picture.
    """
    root = source.path
    if not root.is_dir():
        raise DataError(f"data source {root} is not a folder")
    beside = {
        "control": source.control_dir,
        "mask": source.mask_dir,
        "image_prompt": source.image_prompt_dir,
    }
    folders = {kind: folder for kind, folder in beside.items() if folder is not None}
    found = False
    for folder, names in _walk(root):
        if any(folder.is_relative_to(other) for other in folders.values()):
            continue
        present, composed = set(names), {_composed(name): name for name in names}
        pictures = [name for name in names if _suffix(name) in PICTURE_SUFFIXES]
        _note_others(folder.relative_to(root), names, pictures, passed_over)
        for file_name in pictures:
            found = True
            path = folder / file_name
            captions, hint = _captions(folder, path.stem, present, composed, source.caption_lines)
            name = path.relative_to(root)
            if not captions and _lies_beside(root, name):
                continue
            extra = {kind: PictureFile(_namesake(other, name)) for kind, other in folders.items()}
            if "image_prompt" in extra and not extra["image_prompt"].path.is_file():
                del extra["image_prompt"]  # the picture is its own
            yield Entry(name.as_posix(), path, captions, extra=extra, hint=hint)
    if not found:
        raise DataError(
            f"data source {root}: no pictures found ({', '.join(sorted(PICTURE_SUFFIXES))})",
            *passed_over.lines(),
            *passed_over.hint(),
        )


def _note_others(folder: Path, names: list[str], pictures: list[str], passed_over: PassedOver) -> None:
    """Note what ``folder`` (relative to the source) holds beside its ``pictures`` and their captions."""
    read = {_composed(Path(name).stem) for name in pictures}
    captions = {_composed(Path(name).stem): name for name in names if _suffix(name) == ".txt"}
    unread = set()
    for name in names:
        stem, suffix = _composed(Path(name).stem), _suffix(name)
        if suffix in TABLE_SUFFIXES:
            passed_over.tables.add((folder / name).as_posix())
            continue
        described = stem in captions and stem not in read and suffix not in _CAPTION_LIKE
        if suffix in _OTHER_PICTURES or (described and suffix not in PICTURE_SUFFIXES):
            unread.add(stem)
            passed_over.unread.add((folder / name).as_posix())
            passed_over.kinds[suffix or "without suffix"] += 1
    for stem in sorted(captions.keys() - read - unread):
        # name.png.txt is a caption too, if under another name than is expected
        if _composed(Path(stem).stem) not in read or not Path(stem).suffix:
            passed_over.alone.add((folder / captions[stem]).as_posix())


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _composed(name: str) -> str:
    """In the one of Unicode's two spellings that most systems write; some keep or make the other."""
    return unicodedata.normalize("NFC", name)


def _lies_beside(root: Path, name: Path) -> bool:
    """Whether a picture without caption is a mask or control picture: in their folder, named like another."""
    return (
        name.parts[0] in ("control", "mask", "image_prompt")
        and _namesake(root, Path(*name.parts[1:])).is_file()
    )


def _namesake(folder: Path, picture: Path) -> Path:
    """What belongs to ``picture`` in ``folder``: of the same relative name, with any suffix of a picture."""
    same = folder / picture
    spelled = (folder / unicodedata.normalize(form, str(picture)) for form in ("NFC", "NFD"))
    suffixes = [picture.suffix, *sorted(PICTURE_SUFFIXES)]
    others = (path.with_suffix(suffix) for path in dict.fromkeys([same, *spelled]) for suffix in suffixes)
    return next((path for path in others if path.is_file()), same)


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    def unreadable(error: OSError) -> None:
        raise DataError(f"cannot list {error.filename}: {error.strerror}") from error

    if isinstance(root, RemotePath):
        yield from root.walked()
        return
    for folder, subfolders, names in os.walk(root, onerror=unreadable, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield Path(folder), sorted(name for name in names if not name.startswith("."))


def _text(path: Path) -> str:
    if isinstance(path, RemotePath):
        return decode(path.read_bytes(), path.shown, DataError)
    return read_text(path, error=DataError)


def _captions(
    folder: Path, stem: str, present: set[str], composed: dict[str, str], lines: bool
) -> tuple[tuple[str, ...], str]:
    """(captions, hint): the hint names a file that looks like the caption when there is none.

    ``present`` are the names of the folder's files, ``composed`` the same by :func:`_composed`.
    """
    name = f"{stem}.txt"
    if (found := name if name in present else composed.get(_composed(name))) is not None:
        text = _text(folder / found)
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
