"""Where commands write: an existing file is replaced only on request, and an input never."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import ConfigError, WeightsError

StrPath = str | os.PathLike[str]


def check_output(
    out: StrPath,
    inputs: Iterable[StrPath] = (),
    *,
    overwrite: bool = False,
    folder: bool = False,
    form: str = "the output",
) -> None:
    """Refuse a place that must not be written to, before anything is computed.

    Files are compared by identity, so another spelling of an input, or a link to it, counts as the input.
    All files in a given folder are inputs too: shards, PEFT's files, the parts of a pipeline.

    Args:
        out: a ``.safetensors`` file or, with ``folder``, a folder that is new or empty.
        inputs: files and folders that are read.
        overwrite: an existing file may be replaced unless it is an input; a folder never is.
        form: what is written, for messages: "the layout diffusers".

    Raises:
        WeightsError: names ``out`` and what is in the way.
    """
    out = Path(out)
    _check_inputs(out, inputs)
    if folder:
        _check_folder(out, form)
    elif out.is_dir():
        raise WeightsError(f"{out} is a folder; {form} is written as one .safetensors file")
    elif out.suffix != ".safetensors":
        raise WeightsError(f"{out}: {form} is written as one .safetensors file; give it that suffix")
    else:
        check_free(out, overwrite=overwrite)


def check_free(out: StrPath, inputs: Iterable[StrPath] = (), *, overwrite: bool = False) -> None:
    """As :func:`check_output`, for a file of any kind (a picture)."""
    out = Path(out)
    _check_inputs(out, inputs)
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise WeightsError(f"{out} exists; choose another name, or replace it with --overwrite")
    if out.exists() and not out.is_file():
        raise WeightsError(f"{out} is not a regular file and cannot be replaced; choose another name")


def _check_inputs(out: Path, inputs: Iterable[StrPath]) -> None:
    if used := _use(out, inputs):
        raise WeightsError(f"{out} is {used}; choose another name for the output")


def _check_folder(out: Path, form: str) -> None:
    if out.suffix == ".safetensors":
        raise WeightsError(f"{out}: {form} is written as a folder; leave out .safetensors")
    if os.path.lexists(out) and not out.is_dir():
        raise WeightsError(f"{out} is a file; {form} is written as a folder")
    if out.is_dir() and not _is_empty(out):
        raise WeightsError(f"{out} exists and is not empty; choose another name for the folder")


def _is_empty(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError as error:
        raise WeightsError(f"cannot read {folder}: {error.strerror}") from error


def _use(out: Path, inputs: Iterable[StrPath]) -> str:
    """How an existing output is related to the inputs; empty if it is not."""
    own = _identity(out)
    if own is None:
        return ""
    for given in map(Path, inputs):
        if _identity(given) == own:
            return "the input itself"
        if given.is_dir() and own in _inside(given):
            return f"a part of the input {given}"
        if out.is_dir() and own in map(_identity, given.resolve().parents):
            return f"a folder that holds the input {given}"
    return ""


def _identity(path: StrPath) -> tuple[int, int] | None:
    """The identity that all names of a file or folder share; None if it does not exist."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _inside(folder: Path) -> Iterator[tuple[int, int] | None]:
    """The identities of all files and folders in a folder, through links too."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (own := _identity(place)) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(own)
        yield own
        yield from (_identity(os.path.join(place, name)) for name in files)


# -- the command lines ------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, what: str, *, positional: bool) -> None:
    """``-o OUT`` and ``--overwrite``.

    Args:
        what: the help of ``-o``.
        positional: OUT may still be a separate last argument; otherwise it may be the last of a list.
    """
    if positional:
        # For one more release; :func:`take_output` warns.
        parser.add_argument("last", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--out", metavar="OUT", help=what)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT if the file exists; an input is never replaced"
    )


def take_output(args: argparse.Namespace, among: list[str] | None = None) -> Path:
    """The output of a command line.

    Args:
        among: arguments whose last is the output if ``-o`` is missing; it is removed from them.

    Raises:
        ConfigError: if none or two are given, or the last argument stands for it and exists.
    """
    last = getattr(args, "last", None)
    if args.out is not None:
        if last is not None:
            raise ConfigError(f"two outputs: -o {args.out} and {last}")
        return Path(args.out)
    if last is None and among is not None and len(among) > 1:
        last = among.pop()
    if last is None:
        raise ConfigError("no output: name it with -o OUT")
    out = Path(last)
    if os.path.lexists(out) and not (out.is_dir() and _is_empty(out)):
        raise ConfigError(
            f"{out} exists, and without -o the last argument is the output: name the output with -o"
        )
    print(
        f"warning: naming the output without -o will not be understood in the next release; write -o {out}",
        file=sys.stderr,
    )
    return out
