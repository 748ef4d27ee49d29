"""``python -m hydit_core.weights``: ``inspect``, ``convert`` and ``quantize``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..dtypes import STORED, dtype_of, short_name
from ..errors import cli_main, program
from . import output
from .convert import convert
from .describe import describe
from .layouts import LAYOUTS
from .quantise import FORMATS, quantise


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("weights"), description="Inspect, convert and quantise HunyuanDiT weights."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    key_help = "which weights of a torch file with several sets: ema, module, distill ... (default: ema)"

    inspect = commands.add_parser("inspect", help="say what a file is, from its header alone")
    inspect.add_argument("file", help="a weights file, or a diffusers or Tencent folder")
    inspect.add_argument("--load-key", help=key_help)
    inspect.set_defaults(run=_inspect)

    change = commands.add_parser("convert", help="write a DiT or ControlNet in another layout or dtype")
    change.add_argument("input", metavar="IN", help="a weights file, or a diffusers or Tencent folder")
    output.add_arguments(change, "a .safetensors file; a folder for --layout diffusers", positional=True)
    change.add_argument(
        "--layout",
        choices=LAYOUTS,
        required=True,
        help="tencent: the DiT alone; comfy: all-in-one for ComfyUI; diffusers: a folder",
    )
    change.add_argument(
        "--dtype",
        type=short_name,
        choices=STORED,
        help="of the DiT (default: unchanged); fp8: only the blocks' matrices, the rest keeps 16 bits",
    )
    change.add_argument("--load-key", help=key_help)
    change.set_defaults(run=_convert)

    small = commands.add_parser("quantize", help="write a model with its large matrices in 8 bits")
    small.add_argument("input", metavar="IN", help="a DiT, ControlNet, all-in-one file or text encoder")
    output.add_arguments(small, "a .safetensors file", positional=False)
    small.add_argument(
        "--format",
        choices=tuple(FORMATS),
        required=True,
        help="; ".join(f"{name}: {what}" for name, what in FORMATS.items()),
    )
    small.add_argument(
        "--keep",
        action="extend",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="layers that stay as they are, such as mlp.fc2 or 'dit.blocks.0.*'",
    )
    small.add_argument(
        "--text-encoders",
        action="store_true",
        help="quantise those of an all-in-one file too; ComfyUI's own loaders do not read that",
    )
    small.add_argument("--load-key", help=key_help)
    small.set_defaults(run=_quantise)
    return parser


def _inspect(args: argparse.Namespace) -> None:
    print(describe(args.file, load_key=args.load_key))


def _convert(args: argparse.Namespace) -> None:
    dtype = dtype_of(args.dtype) if args.dtype else None
    done = convert(
        args.input,
        output.take_output(args),
        layout=args.layout,
        dtype=dtype,
        load_key=args.load_key,
        overwrite=args.overwrite,
    )
    for note in done.notes:
        print(note)
    print(f"{done.path}: {done.kind.name.removeprefix('a ')} in layout {args.layout}")


def _quantise(args: argparse.Namespace) -> None:
    out = output.take_output(args)
    done = quantise(
        args.input,
        out,
        format=args.format,
        keep=args.keep,
        text_encoders=args.text_encoders,
        load_key=args.load_key,
        overwrite=args.overwrite,
    )
    for note in done.notes:
        print(note)
    print(f"{done.path}: {done.kind.name.removeprefix('a ')}, {done.path.stat().st_size:,} bytes")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    return cli_main(lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
