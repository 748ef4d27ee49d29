"""``python -m hydit_core.lora convert IN OUT --format FORMAT``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from ..errors import LoraError
from .formats import read
from .output_cli import add_arguments, save


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command."""
    parser = commands.add_parser("convert", help="write a LoRA in another format or dtype")
    parser.add_argument("file", metavar="IN", help="a LoRA file of any layout, or a folder of PEFT's")
    parser.add_argument("out", metavar="OUT", help="a .safetensors file; a folder for --format peft")
    add_arguments(parser, dtype=None)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    source, out = Path(args.file), Path(args.out)
    if out.exists() and source.exists() and out.samefile(source):
        raise LoraError(f"{out} is the input itself; choose another name for the output")
    adapter = read(source)
    metadata = {**adapter.metadata, "hydit.source": source.name}
    save(replace(adapter, metadata=metadata), args)
