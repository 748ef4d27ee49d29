"""What the training nodes may read and write: folders in ComfyUI's input, runs in its output, its LoRAs.

A workflow of a stranger says only names. A name never leads anywhere else, whatever it is made of.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import folder_paths

from ...hydit_core.embedded import embedded_pictures
from ...hydit_core.errors import ConfigError, printable
from ...hydit_core.images import PICTURE_SUFFIXES
from ...hydit_core.train import RECORDS

RUNS = "hydit_train"
"""The folder in ComfyUI's output that holds the runs of HyDiTTrainLoRA."""
_EMBEDDED = "[embedded] "
_DEEPEST = 4
_MOST = 500
_SHOWN = 10
# What no file can be called on one of the systems that ComfyUI runs on.
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*]')
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_LONGEST = 80


def dataset_names() -> list[str]:
    """The embedded pictures, and the folders in ComfyUI's input that hold some, ``/`` between their parts."""
    return [*_embedded(), *_own_names()]


def _embedded() -> dict[str, Path]:
    return {f"{_EMBEDDED}{path.name}": path for path in embedded_pictures()}


def _own_names() -> list[str]:
    return _folders_with(Path(folder_paths.get_input_directory()), _is_picture)


def run_names() -> list[str]:
    """The folders in ComfyUI's output that hold a run, the one that was written to last first."""
    root = Path(folder_paths.get_output_directory())
    names = _folders_with(root, lambda name: name == RECORDS)
    return sorted(names, key=lambda name: _changed(root / name / RECORDS), reverse=True)


def dataset(name: Any) -> Path:
    """The folder that ``name`` means, in ComfyUI's input or embedded; it holds nothing that lies elsewhere.

    Raises:
        ConfigError: it is not there, leads out of the input folder, or holds a link that does.
    """
    if isinstance(name, str) and name in (own := _embedded()):
        return own[name]
    root = Path(folder_paths.get_input_directory())
    path = _inside(root, name, "dataset", "input", dataset_names)
    for file in _walk(path):
        if file.is_symlink() and not _lies_in(file, root):
            raise ConfigError(
                f"dataset: {name}/{file.relative_to(path).as_posix()} is a link to a place outside ComfyUI's "
                "input folder: put the file itself there"
            )
    return path


def run_folder(name: Any) -> Path:
    """The folder of a run in ComfyUI's output.

    Raises:
        ConfigError: it is not there, or leads out of the output folder.
    """
    root = Path(folder_paths.get_output_directory())
    path = _inside(root, name, "run", "output", run_names)
    if not _lies_in(path / RECORDS, root) or not (path / RECORDS).is_file():
        raise ConfigError(f"run: {printable(str(name))} holds no run (it has no {RECORDS})")
    return path


def new_run(name: Any, number: int = 1) -> Path:
    """The folder of a run of that name: the first, second ... of several.

    Raises:
        ConfigError: no file can have this name, or the folder leads out of ComfyUI's output.
    """
    check_name(name)
    root = Path(folder_paths.get_output_directory())
    path = root / RUNS / (name if number == 1 else f"{name}-{number}")
    if not _lies_in(path, root):
        raise ConfigError(f"output_name: {path.name} in {RUNS} is a link to a place outside ComfyUI's output")
    return path


def check_name(name: Any) -> None:
    """Raise :class:`ConfigError` unless every system takes this as the name of one file."""
    if not isinstance(name, str) or not name.strip(" ."):
        raise ConfigError("output_name is empty: give the LoRA a name, such as my_lora")
    wrong = _FORBIDDEN.search(name)
    odd = name != name.strip() or name.startswith(".") or name.endswith(".") or _RESERVED.fullmatch(name)
    if wrong or odd or len(name.encode(errors="replace")) > _LONGEST:
        raise ConfigError(
            f"output_name {printable(name[:_LONGEST])!r}: use one name of at most {_LONGEST} bytes without "
            '/ \\ : * ? " < > | and without a dot at its ends, such as my_lora'
        )


def lora_folder() -> Path:
    """Where new LoRAs go: the first of ComfyUI's folders for them."""
    return Path(folder_paths.get_folder_paths("loras")[0])


def digest(folder: Path) -> str:
    """A text that changes whenever a file in the folder does (by name, time and size)."""
    found = sha256()
    for file in sorted(_walk(folder)):
        try:
            status = file.stat()
        except OSError:  # gone in between
            continue
        name = file.relative_to(folder).as_posix()
        found.update(f"{name}|{status.st_mtime_ns}|{status.st_size}\n".encode(errors="replace"))
    return found.hexdigest()


def _inside(root: Path, name: Any, widget: str, place: str, known: Any) -> Path:
    """The folder below ``root`` that ``name`` means, with either separator."""
    parts = re.split(r"[/\\]", name) if isinstance(name, str) else []
    shown = printable(str(name)[:200])
    if not parts or any(part in ("", ".", "..") or _FORBIDDEN.search(part) for part in parts):
        raise ConfigError(
            f"{widget} {shown!r}: choose a folder in ComfyUI's {place}; there is: {_told(known())}"
        )
    path = root.joinpath(*parts)
    if not _lies_in(path, root):
        raise ConfigError(f"{widget} {shown}: it leads out of ComfyUI's {place} folder")
    if not os.path.isdir(path):
        raise ConfigError(
            f"{widget} {shown}: no such folder in ComfyUI's {place} (any more); there is: {_told(known())}"
        )
    return path


def _told(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more if names else "none"


def _lies_in(path: Path, root: Path) -> bool:
    """Whether a path, links followed, is below ``root``; true of what does not exist below it either."""
    try:
        real, top = os.path.realpath(path), os.path.realpath(root)
        return real != top and os.path.commonpath([real, top]) == top
    except (OSError, ValueError):  # another drive, a link to itself
        return False


def _walk(folder: Path) -> Iterator[Path]:
    """Files and folders below a folder, through links too, each real folder once."""
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in sorted([*folders, *names]):
            yield Path(parent, name)


def _folders_with(root: Path, wanted: Any) -> list[str]:
    """Folders below ``root`` with a file of a wanted name; without hidden ones and links to elsewhere."""
    found: list[str] = []
    waiting = [(root, 0)]
    while waiting and len(found) < _MOST:
        folder, depth = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                inside = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError:
            continue
        if depth and any(wanted(entry.name) and not entry.is_dir() for entry in inside):
            found.append(Path(folder).relative_to(root).as_posix())
        if depth < _DEEPEST:
            below = [Path(entry.path) for entry in inside if entry.is_dir()]
            waiting += [(path, depth + 1) for path in below if not path.is_symlink() or _lies_in(path, root)]
    return sorted(found)


def _is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in PICTURE_SUFFIXES


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
