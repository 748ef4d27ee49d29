"""The sides of a comparison: options of ``generate`` in one text each, or folders of pictures."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..dtypes import COMPUTE
from ..embedded import embedded_model
from ..errors import ConfigError
from ..generate.bulk.options import NAMES as BULK
from ..generate.options import parser as generate_parser

_FLAG = re.compile(r"--([a-z])(?:=(.*))?", re.DOTALL)
# Said once for all sides, or not at all.
_SHARED = ("prompt", "prompts", "seed", "size")
_FOREIGN = ("batch", "out", "overwrite", "captions", "plan", *BULK)
FLOORS = (*(name for name in COMPUTE if name != "auto"), "batch")
_WEIGHTS = ("model", "text_encoders", "vae", "lora", "ip_adapter", "image_encoder")
_MODEL = "the embedded model"
_PEER = "--peer-steps"
_EDGE = 1 << 16


@dataclass(frozen=True)
class Side:
    """One side.

    Attributes:
        name: its letter, or what stands for it in tables: "noise floor (bfloat16)".
        text: what the user wrote.
        args: the options of ``generate``; None for a folder.
        folder: of pictures; None for options.
        peer: the side whose work this one may do in plain steps, see :func:`with_steps`.
        alone: pictures are drawn one at a time, whatever the batch.
    """

    name: str
    text: str
    args: argparse.Namespace | None = None
    folder: Path | None = None
    peer: str | None = None
    alone: bool = False

    @property
    def key(self) -> str:
        """A name for its folder."""
        return re.sub(r"\W+", "-", self.name).strip("-")


def take_sides(argv: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Split a command line into ``(letter, text)`` of ``--a TEXT``, ``--b TEXT``, ..., and all others.

    argparse would take a text that begins with a dash for an option. Raises :class:`ConfigError`.
    """
    sides: dict[str, str] = {}
    others: list[str] = []
    words = iter(argv)
    for word in words:
        if not (match := _FLAG.fullmatch(word)):
            others.append(word)
            continue
        letter, text = match[1], match[2] if match[2] is not None else next(words, None)
        if text is None:
            raise ConfigError(f'--{letter} needs the options of `hydit generate` in quotes: --{letter} "..."')
        if letter in sides:
            raise ConfigError(f"--{letter} is given twice")
        sides[letter] = text
    return list(sides.items()), others


def parse_side(letter: str, text: str, reference: str = "") -> Side:
    """Read one side; ``reference`` is the text of the side that a peer takes its options from.

    Raises :class:`ConfigError` for options that cannot be understood, or that all sides share.
    """
    folder = Path(text).expanduser()
    if text.strip() and not text.lstrip().startswith("-"):
        if folder.is_dir():
            return Side(letter, text, folder=folder)
        raise ConfigError(
            f"--{letter} {text}: no such folder; give a folder of pictures, or options of `hydit generate` "
            f'in quotes: --{letter} "--steps 20"'
        )
    words, peer = _split(letter, text), None
    if _PEER in words:
        at = words.index(_PEER)
        peer = words[at + 1] if at + 1 < len(words) else ""
        if not re.fullmatch("[a-z]", peer) or peer == letter:
            raise ConfigError(f"--{letter}: {_PEER} needs the letter of another side: {_PEER} b")
        words = _split(letter, reference) + words[:at] + words[at + 2 :]
    return Side(letter, text, args=_options(letter, words), peer=peer)


def _split(letter: str, text: str) -> list[str]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split = True
    lexer.commenters = ""
    if os.name == "nt":
        lexer.escape = ""  # there, a backslash is a part of paths
    try:
        return list(lexer)
    except ValueError as error:
        raise ConfigError(f"--{letter} {text}: {error}") from error


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print before it ends the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _options(letter: str, words: list[str]) -> argparse.Namespace:
    parser = generate_parser(_Parser)
    if shown := [word for word in words if word in ("-h", "--help")]:
        raise ConfigError(f"--{letter}: {shown[0]} does not belong there; see `hydit generate --help`")
    try:
        args = parser.parse_args(words)
    except ConfigError as error:
        raise ConfigError(f"--{letter}: {error}") from None
    given = [name for name in (*_SHARED, *_FOREIGN) if getattr(args, name) != parser.get_default(name)]
    if given:
        raise ConfigError(
            f"--{letter}: --{given[0]} is the same for all sides; give it outside of the quotes"
            if given[0] in _SHARED
            else f"--{letter}: --{given[0]} does not belong to a side"
        )
    return args


def with_steps(side: Side, steps: int) -> Side:
    """A peer that draws with so many plain steps."""
    args = argparse.Namespace(**vars(side.args))
    args.steps = steps
    return Side(side.name, side.text, args, peer=side.peer)


def floor_of(reference: Side, kind: str) -> Side:
    """The reference's settings in another dtype, or with pictures drawn one at a time ("batch")."""
    if reference.args is None:
        raise ConfigError("--noise-floor draws the reference again, but that is a folder")
    args = argparse.Namespace(**vars(reference.args))
    if kind != "batch":
        args.dtype = kind
    return Side(f"noise floor ({kind})", reference.text, args, alone=kind == "batch")


def settings_of(side: Side) -> dict[str, Any]:
    """What a side's pictures follow from beside prompt, seed and size, with a mark of each file's content.

    Only what was given: options that later releases add do not make it another side.
    """
    assert side.args is not None
    usual = generate_parser()
    options = {
        name: _plain(value)
        for name, value in sorted(vars(side.args).items())
        if name not in (*_SHARED, *_FOREIGN) and value != usual.get_default(name)
    }
    files = {_MODEL: embedded_model()} if side.args.model is None else {}
    for name, value in vars(side.args).items():
        for one in value if isinstance(value, list) else [value]:
            files |= dict(_places(name, one))
    return {"options": options, "files": {text: _mark(path) for text, path in sorted(files.items())}}


def _places(option: str, value: Any) -> Iterator[tuple[str, Path]]:
    """The file, or folder of weights, that an option names, alone or as in ``FILE:STRENGTH``."""
    if not isinstance(value, (str, Path)):
        return
    for text in (str(value), str(value).rpartition(":")[0]):
        path = Path(text).expanduser()
        try:
            if text and (path.is_file() or (option in _WEIGHTS and path.is_dir())):
                yield text, path
        except (OSError, ValueError):
            continue


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _mark(path: Path) -> str:
    """Tells one content from another, without reading gigabytes: the size and both ends of each file."""
    if path.is_dir():
        inside = sorted(one for one in path.rglob("*") if one.is_file())
        return hashlib.sha256("".join(map(_mark, inside)).encode()).hexdigest()[:16]
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            ends = file.read(_EDGE)
            file.seek(max(0, size - _EDGE))
            ends += file.read()
    except OSError:
        return "missing"
    return hashlib.sha256(f"{size} ".encode() + ends).hexdigest()[:16]
