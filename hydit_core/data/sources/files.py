"""Of which files a source consists that is no folder of pictures: one, those of a pattern, or a folder's."""

from __future__ import annotations

import glob
from pathlib import Path

from ...errors import DataError
from ...untrusted import read_json
from ..config import SourceConfig
from ..remote import RemotePath

SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "arrow": (".arrow",),
    "parquet": (".parquet",),
    "tar": (".tar",),
    "index": (".json",),
}
"""What the names of each kind end in."""


def source_kind(source: SourceConfig) -> str:
    """The format of a source: as configured, or told from its path. Raises DataError."""
    path = source.path
    if not path.exists() and not _is_pattern(path):
        raise DataError(f"data source {path} does not exist")
    if source.kind != "auto":
        return _readable(path, source.kind)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            raise DataError(f"data source {path} holds several data sets; name the folder of one of them")
        return "arrow" if _is_saved(path) else "folder"
    for kind, suffixes in SUFFIXES.items():
        if path.suffix.lower() in suffixes:
            return _readable(path, kind)
    known = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
    raise DataError(
        f"data source {path}: expected a folder of pictures, or a file that ends in {known}; set kind if the "
        "name is another"
    )


def _readable(path: Path, kind: str) -> str:
    """``kind``, if such files can be read where they are."""
    if kind in ("arrow", "index") and isinstance(path, RemotePath):
        raise DataError(
            f"data source {path}: Arrow files are mapped into memory and have to be on a disk; copy them, "
            "or use Parquet or tar files"
        )
    return kind


def base_of(source: SourceConfig) -> Path:
    """The folder in which all files of a source lie: of a pattern, the part without wildcards."""
    path = source.path
    if path.is_dir():
        return path
    if path.exists():
        return path.parent
    return next(folder for folder in path.parents if folder.exists() or not _is_pattern(folder))


def tables_of(source: SourceConfig) -> list[Path]:
    """The files that decide which rows a source has, in their order; none for a folder of pictures.

    Raises :class:`DataError` if there are none.
    """
    kind, path = source_kind(source), source.path
    if kind == "folder":
        return []
    if path.is_dir():
        found = _saved(path) if _is_saved(path) else [p for p in path.iterdir() if _ends(p, kind)]
    elif path.exists():
        return [path]
    else:
        found = _matching(path)
    found = sorted(place for place in found if place.is_file())
    if not found:
        raise DataError(f"data source {path}: there is no such file")
    return found


def _is_pattern(path: Path) -> bool:
    # In a URL a question mark is none.
    return glob.has_magic(str(path).partition("?")[0] if isinstance(path, RemotePath) else str(path))


def _matching(pattern: Path) -> list[Path]:
    if isinstance(pattern, RemotePath):
        return pattern.found()
    return [Path(name) for name in glob.glob(str(pattern), recursive=True)]


def _ends(path: Path, kind: str) -> bool:
    return path.suffix.lower() in SUFFIXES[kind] and not path.name.startswith(".")


def _is_saved(folder: Path) -> bool:
    """Whether Hugging Face's ``datasets`` saved a data set there, with ``save_to_disk``."""
    return all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))


def _saved(folder: Path) -> list[Path]:
    """The Arrow files of a saved data set. Raises DataError if it is not whole, or only a selection of it."""
    state = read_json(folder / "state.json", error=DataError)
    if state.get("_indices_data_files"):
        raise DataError(f"{folder} is a selection of rows; save it with its indices flattened")
    listed = state.get("_data_files")
    found: list[Path] = []
    for file in listed if isinstance(listed, list) else []:
        name = file.get("filename") if isinstance(file, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise DataError(f"{folder / 'state.json'} names what is no file: {str(name)[:100]!r}")
        if not (folder / name).is_file():
            raise DataError(f"{folder} lacks {name}, which its state.json names")
        found.append(folder / name)
    return found
