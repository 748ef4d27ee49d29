"""``python -m hydit_core.lora extract TUNED BASE --rank R -o OUT``."""

from __future__ import annotations

import argparse
from typing import Any

from tqdm import tqdm

from ..weights import output
from . import output_cli
from .extract import extract


def add(commands: Any) -> None:
    """Add the sub-command to a parser's."""
    parser = commands.add_parser("extract", help="make a LoRA of the difference of two checkpoints")
    parser.add_argument(
        "tuned", metavar="TUNED", help="the trained checkpoint, a file or folder of any layout"
    )
    parser.add_argument("base", metavar="BASE", help="what it was trained from")
    parser.add_argument("--rank", type=int, required=True, help="of each module")
    parser.add_argument(
        "--load-key", help="which weights of a torch file that holds several: ema, module ..."
    )
    output_cli.add_arguments(parser, dtype="fp16")
    parser.set_defaults(run=_extract)


def _extract(args: argparse.Namespace) -> None:
    target = output_cli.target(args, output.take_output(args), (args.tuned, args.base))
    with tqdm(unit="tensor", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        done = extract(args.tuned, args.base, args.rank, load_key=args.load_key, progress=progress)
    output_cli.save(done.adapter, target)
    print(f"energy kept at rank {args.rank}: {done.energy:.4%}; least: {output_cli.lowest(done.modules)}")
    if done.left_out:
        largest = sorted(done.left_out, key=lambda name: -done.left_out[name])[:3]
        print(
            f"left out: {len(done.left_out)} tensors that differ but have no place in a LoRA (biases, norms, "
            f"tables), largest: {', '.join(largest)}"
        )
