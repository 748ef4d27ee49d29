"""What the sub-commands that write a LoRA have in common."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from ..weights.dtypes import DTYPES
from .adapter import Adapter
from .formats import FORMATS, write


def add_arguments(parser: argparse.ArgumentParser, *, dtype: str | None) -> None:
    """``--format`` and ``--dtype``, whose default is ``dtype``."""
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="comfy, kohya: one .safetensors file; peft: a folder (default: by the name of OUT)",
    )
    shown = dtype or "as they are"
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), default=dtype, help=f"(default: {shown})"
    )


def save(adapter: Adapter, args: argparse.Namespace) -> None:
    """Write to ``args.out`` and say what was written."""
    out = Path(args.out)
    format = args.format or ("comfy" if out.suffix == ".safetensors" else "peft")
    notes = write(adapter, out, format=format, dtype=DTYPES[args.dtype] if args.dtype else None)
    for note in notes:
        print(note)
    print(f"{out}: {adapter.describe()}, written as {format}")


def lowest(energies: Mapping[str, float], count: int = 3) -> str:
    """The modules that lose most, as text."""
    worst = sorted(energies.items(), key=lambda item: item[1])[:count]
    return ", ".join(f"{module} {share:.1%}" for module, share in worst)
