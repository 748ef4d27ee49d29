"""Folders of pictures as sides: the same names in all."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import ConfigError, DataError
from ..pictures.png import read_parameters
from .sides import Side
from .store import SUFFIXES


class Found(NamedTuple):
    """One name that all folders have: its prompt and seed, if the reference's file tells, and the files."""

    name: str
    prompt: str
    seed: int | None
    files: dict[str, Path]


def match(sides: Sequence[Side], reference: Side) -> list[Found]:
    """The pictures that all folders have under one name, whatever the suffix.

    Says on stderr which are left out. Raises :class:`ConfigError` if there are none.
    """
    listed = {side.name: _pictures(side) for side in sides}
    common = set.intersection(*(set(files) for files in listed.values()))
    if not common:
        example = {name: next(iter(sorted(files)), "no pictures") for name, files in listed.items()}
        shown = ", ".join(f"--{name}: {one}" for name, one in example.items())
        raise ConfigError(f"the folders have no picture of the same name ({shown})")
    for side in sides:
        if left := sorted(set(listed[side.name]) - common):
            print(
                f"warning: --{side.name} {side.folder}: {len(left)} pictures have no partner in the other "
                f"folders and are left out: {', '.join(left[:3])}{', ...' if len(left) > 3 else ''}",
                file=sys.stderr,
            )
    found = []
    for name in sorted(common):
        facts = {}
        with contextlib.suppress(DataError):  # pictures of others carry no prompt
            facts = read_parameters(listed[reference.name][name])
        prompt, seed = facts.get("prompt"), facts.get("seed")
        files = {side.name: listed[side.name][name] for side in sides}
        prompt = prompt if isinstance(prompt, str) else name
        found.append(Found(name, prompt, seed if isinstance(seed, int) else None, files))
    return found


def _pictures(side: Side) -> dict[str, Path]:
    assert side.folder is not None
    try:
        files = sorted(path for path in side.folder.iterdir() if path.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise ConfigError(f"--{side.name} {side.folder}: {error.strerror or error}") from error
    found: dict[str, Path] = {}
    for path in files:
        if path.stem in found:
            raise ConfigError(f"{path} and {found[path.stem].name}: two pictures of one name")
        found[path.stem] = path
    return found
