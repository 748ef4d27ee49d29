"""``python -m hydit_core.lora inspect FILE``."""

from __future__ import annotations

import argparse

from ..weights.output import check_free
from .reading import read
from .summary import describe, plot


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command."""
    parser = commands.add_parser("inspect", help="say what a LoRA is, what it changes and how much")
    parser.add_argument("file", help="a LoRA file, or a folder of PEFT's")
    parser.add_argument(
        "--base", help="a checkpoint: which modules it has (default: compare with known ones)"
    )
    parser.add_argument("--plot", metavar="PICTURE", help="draw the norms by block and module (.png)")
    parser.add_argument("--overwrite", action="store_true", help="replace PICTURE if it is there")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.plot:
        check_free(args.plot, (args.file, *([args.base] if args.base else [])), overwrite=args.overwrite)
    adapter = read(args.file)
    print(describe(adapter, args.base))
    if args.plot:
        plot(adapter, args.plot)
        print(f"\n{args.plot}: norms by block and module")
