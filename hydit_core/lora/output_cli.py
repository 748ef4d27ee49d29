"""What the sub-commands that write a LoRA have in common."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ..dtypes import dtype_of, short_name
from ..weights import output
from .adapter import Adapter
from .writing import FORMATS, write


class Target(NamedTuple):
    """Where a command writes, and how; see :func:`~.writing.write`."""

    path: Path
    format: str
    dtype: torch.dtype | None
    overwrite: bool


def add_arguments(parser: argparse.ArgumentParser, *, dtype: str | None, positional: bool = True) -> None:
    """``-o``, ``--overwrite``, ``--format``, and ``--dtype``, whose default is ``dtype``.

    ``positional``: see :func:`~..weights.output.add_arguments`.
    """
    output.add_arguments(parser, "a .safetensors file; a folder for --format peft", positional=positional)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="comfy, kohya: one .safetensors file; peft: a folder (default: by the name of OUT)",
    )
    shown = dtype or "as they are"
    parser.add_argument(
        "--dtype",
        type=short_name,
        choices=("fp32", "fp16", "bf16"),
        default=dtype,
        help=f"(default: {shown})",
    )


def target(args: argparse.Namespace, out: Path, inputs: Iterable[str | Path]) -> Target:
    """The output of a command line, checked before anything is read.

    Raises :class:`HyditError` if it must not be written to; an input is never replaced.
    """
    format = args.format or ("comfy" if out.suffix == ".safetensors" else "peft")
    form = f"the format {format}"
    output.check_output(out, inputs, overwrite=args.overwrite, folder=format == "peft", form=form)
    return Target(out, format, dtype_of(args.dtype) if args.dtype else None, args.overwrite)


def save(adapter: Adapter, to: Target) -> None:
    """Write it and say what was written. Raises :class:`HyditError` for numbers that are not finite."""
    adapter.require_finite()
    notes = write(adapter, to.path, format=to.format, dtype=to.dtype, overwrite=to.overwrite)
    for note in notes:
        print(note)
    print(f"{to.path}: {adapter.describe()}, written as {to.format}")


def lowest(energies: Mapping[str, float], count: int = 3) -> str:
    """The modules that lose most, as text."""
    worst = sorted(energies.items(), key=lambda item: item[1])[:count]
    return ", ".join(f"{module} {share:.1%}" for module, share in worst)
