"""``python -m hydit_core.lora convert IN --format FORMAT -o OUT``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from ..weights.output import take_output
from .output_cli import add_arguments, save, target
from .reading import read


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command."""
    parser = commands.add_parser("convert", help="write a LoRA in another format or dtype")
    parser.add_argument("file", metavar="IN", help="a LoRA file of any layout, or a folder of PEFT's")
    add_arguments(parser, dtype=None)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    source = Path(args.file)
    to = target(args, take_output(args), (source,))
    adapter = read(source)
    metadata = {**adapter.metadata, "hydit.source": source.name}
    save(replace(adapter, metadata=metadata), to)
