"""``python -m hydit_core.lora combine LORA[:strength] ... -o OUT``."""

from __future__ import annotations

import argparse
from typing import Any

from tqdm import tqdm

from ..layer_weights import split_weight
from ..weights import output
from . import output_cli, weights_cli
from .extract import combine
from .reading import read


def add(commands: Any) -> None:
    """Add the sub-command to a parser's."""
    parser = commands.add_parser("combine", help="make one LoRA of several, or cut one to a lower rank")
    parser.add_argument(
        "loras", metavar="LORA[:STRENGTH]", nargs="+", help="a LoRA of any format, strength 1 if not given"
    )
    parser.add_argument(
        "--rank",
        type=int,
        help="cut modules of a higher rank to this one, with the least error (default: exact, ranks add up)",
    )
    weights_cli.add_arguments(parser)
    parser.add_argument(
        "--blocks",
        type=int,
        metavar="N",
        help="of the model, for curves (default: those of the known model that a LoRA fits; DiT-g/2 has 40)",
    )
    output_cli.add_arguments(parser, dtype=None, positional=False)
    parser.set_defaults(run=_combine)


def _combine(args: argparse.Namespace) -> None:
    out = output.take_output(args, args.loras)
    weights = weights_cli.weights(args)
    given = [split_weight(text) for text in args.loras]
    target = output_cli.target(args, out, [path for path, _ in given])
    adapters = [(read(path), strength) for path, strength in given]
    with tqdm(unit="module", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        done = combine(adapters, args.rank, block_weights=weights, depth=args.blocks, progress=progress)
    output_cli.save(done.adapter, target)
    if args.rank is None:
        print("exact: the ranks are added up")
    else:
        print(f"energy kept at rank {args.rank}: {done.energy:.4%}; least: {output_cli.lowest(done.modules)}")
