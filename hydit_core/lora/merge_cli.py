"""``python -m hydit_core.lora merge BASE LORA[:strength] ... -o OUT``."""

from __future__ import annotations

import argparse
from typing import Any

from tqdm import tqdm

from ..dtypes import STORED, dtype_of, short_name
from ..layer_weights import split_weight
from ..weights import output
from ..weights.layouts import LAYOUTS
from . import weights_cli
from .adapter import PARTIAL_HELP
from .merge import merge_files


def add(commands: Any) -> None:
    """Add the sub-command to a parser's."""
    parser = commands.add_parser("merge", help="write a checkpoint with LoRAs merged into it")
    parser.add_argument("base", metavar="BASE", help="a DiT or an all-in-one checkpoint, file or folder")
    parser.add_argument(
        "loras", metavar="LORA[:STRENGTH]", nargs="+", help="a LoRA of any format, strength 1 if not given"
    )
    output.add_arguments(parser, "a .safetensors file; a folder for --layout diffusers", positional=False)
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="tencent: the DiT alone; comfy: all-in-one; diffusers: a folder (default: as BASE)",
    )
    parser.add_argument(
        "--dtype",
        type=short_name,
        choices=STORED,
        help="of the DiT (default: as it is); fp8: matrices of the blocks only, the rest keeps 16 bits",
    )
    weights_cli.add_arguments(parser)
    parser.add_argument("--partial", action="store_true", help=PARTIAL_HELP)
    parser.add_argument(
        "--load-key", help="which weights of a torch file that holds several: ema, module ..."
    )
    parser.set_defaults(run=_merge)


def _merge(args: argparse.Namespace) -> None:
    out = output.take_output(args, args.loras)
    weights = weights_cli.weights(args)
    # None: no bar where stderr is not a terminal.
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        done = merge_files(
            args.base,
            [split_weight(text) for text in args.loras],
            out,
            layout=args.layout,
            dtype=dtype_of(args.dtype) if args.dtype else None,
            block_weights=weights,
            load_key=args.load_key,
            overwrite=args.overwrite,
            partial=args.partial,
            progress=progress,
        )
    for note in done.notes:
        print(note)
    print(f"{done.path}: {done.kind.name.removeprefix('a ')} in layout {done.layout}")
