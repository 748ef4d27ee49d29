"""The sub-commands of ``python -m hydit_core.lora``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ..dtypes import STORED, dtype_of, short_name
from ..errors import cli_main, program
from ..layer_weights import CURVES, read_each, split_weight
from ..weights import output
from ..weights.layouts import LAYOUTS
from .adapter import PARTIAL_HELP, Adapter
from .blocks import BlockWeights
from .extract import combine, extract
from .merge import merge_files
from .reading import read
from .summary import describe, plot
from .writing import FORMATS, write

_BLOCK_WEIGHTS = "--block-weights"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    return cli_main(lambda: args.run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("lora"), description="Inspect, convert, merge, combine and extract HunyuanDiT LoRAs."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_inspect, _add_convert, _add_merge, _add_combine, _add_extract):
        add(commands)
    return parser


# -- inspect -----------------------------------------------------------------------------------------------


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="say what a LoRA is, what it changes and how much")
    parser.add_argument("file", help="a LoRA file, or a folder of PEFT's")
    parser.add_argument(
        "--base", help="a checkpoint: which modules it has (default: compare with known ones)"
    )
    parser.add_argument("--plot", metavar="PICTURE", help="draw the norms by block and module (.png)")
    parser.add_argument("--overwrite", action="store_true", help="replace PICTURE if it is there")
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> None:
    if args.plot:
        inputs = (args.file, *([args.base] if args.base else []))
        output.check_free(args.plot, inputs, overwrite=args.overwrite)
    adapter = read(args.file)
    print(describe(adapter, args.base))
    if args.plot:
        plot(adapter, args.plot)
        print(f"\n{args.plot}: norms by block and module")


# -- convert -----------------------------------------------------------------------------------------------


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser("convert", help="write a LoRA in another format or dtype")
    parser.add_argument("file", metavar="IN", help="a LoRA file of any layout, or a folder of PEFT's")
    _add_output(parser, dtype=None)
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> None:
    source = Path(args.file)
    target = _target(args, output.take_output(args), (source,))
    adapter = read(source)
    _save(replace(adapter, metadata={**adapter.metadata, "hydit.source": source.name}), target)


# -- merge -------------------------------------------------------------------------------------------------


def _add_merge(commands: Any) -> None:
    parser = commands.add_parser("merge", help="write a checkpoint with LoRAs merged into it")
    parser.add_argument("base", metavar="BASE", help="a DiT or an all-in-one checkpoint, file or folder")
    _add_loras(parser)
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
    _add_block_weights(parser)
    parser.add_argument("--partial", action="store_true", help=PARTIAL_HELP)
    _add_load_key(parser)
    parser.set_defaults(run=_merge)


def _merge(args: argparse.Namespace) -> None:
    out = output.take_output(args, args.loras)
    weights = _block_weights(args)
    with _bar("B", unit_scale=True, unit_divisor=1024) as progress:
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


# -- combine -----------------------------------------------------------------------------------------------


def _add_combine(commands: Any) -> None:
    parser = commands.add_parser("combine", help="make one LoRA out of several, or cut one to a lower rank")
    _add_loras(parser)
    parser.add_argument(
        "--rank",
        type=int,
        help="cut modules of a higher rank to this one, with the least error (default: exact, ranks add up)",
    )
    _add_block_weights(parser)
    parser.add_argument(
        "--blocks",
        type=int,
        metavar="N",
        help="of the model, for curves (default: those of the known model that a LoRA fits; DiT-g/2 has 40)",
    )
    _add_output(parser, dtype=None, positional=False)
    parser.set_defaults(run=_combine)


def _combine(args: argparse.Namespace) -> None:
    out = output.take_output(args, args.loras)
    weights = _block_weights(args)
    given = [split_weight(text) for text in args.loras]
    target = _target(args, out, [path for path, _ in given])
    adapters = [(read(path), strength) for path, strength in given]
    with _bar("module") as progress:
        done = combine(adapters, args.rank, block_weights=weights, depth=args.blocks, progress=progress)
    _save(done.adapter, target)
    if args.rank is None:
        print("exact: the ranks are added up")
    else:
        print(_kept(args.rank, done.energy, done.modules))


# -- extract -----------------------------------------------------------------------------------------------


def _add_extract(commands: Any) -> None:
    parser = commands.add_parser("extract", help="make a LoRA from the difference of two checkpoints")
    parser.add_argument(
        "tuned", metavar="TUNED", help="the trained checkpoint, a file or folder of any layout"
    )
    parser.add_argument("base", metavar="BASE", help="what it was trained from")
    parser.add_argument("--rank", type=int, required=True, help="of each module")
    _add_load_key(parser)
    _add_output(parser, dtype="fp16")
    parser.set_defaults(run=_extract)


def _extract(args: argparse.Namespace) -> None:
    target = _target(args, output.take_output(args), (args.tuned, args.base))
    with _bar("tensor") as progress:
        done = extract(args.tuned, args.base, args.rank, load_key=args.load_key, progress=progress)
    _save(done.adapter, target)
    print(_kept(args.rank, done.energy, done.modules))
    if done.left_out:
        largest = sorted(done.left_out, key=lambda name: -done.left_out[name])[:3]
        print(
            f"left out: {len(done.left_out)} tensors that differ but have no place in a LoRA (biases, norms, "
            f"tables), largest: {', '.join(largest)}"
        )


# -- what several have in common ---------------------------------------------------------------------------


def _add_loras(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "loras", metavar="LORA[:STRENGTH]", nargs="+", help="a LoRA of any format, strength 1 if not given"
    )


def _add_load_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--load-key", help="which weights of a torch file that holds several: ema, module ..."
    )


def _add_block_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        _BLOCK_WEIGHTS,
        action="append",
        default=[],
        metavar="WEIGHTS",
        help="over the strength, for each block: a number, numbers with commas (40 for DiT-g/2), a JSON file "
        f"with a list, or a curve: {', '.join(CURVES)}; once for all, or for each LoRA in their order",
    )


def _block_weights(args: argparse.Namespace) -> list[BlockWeights]:
    """Those of each of ``args.loras``.

    Raises:
        ConfigError: if they cannot be read, or are neither one for all nor one for each.
    """
    count = len(args.loras)
    given = read_each(args.block_weights, _BLOCK_WEIGHTS, count, "LoRAs")
    return [BlockWeights.parse(one) for one in given] or [BlockWeights()] * count


class _Target(NamedTuple):
    """Where a command writes a LoRA, and how; see :func:`~.writing.write`."""

    path: Path
    format: str
    dtype: torch.dtype | None
    overwrite: bool


def _add_output(parser: argparse.ArgumentParser, *, dtype: str | None, positional: bool = True) -> None:
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


def _target(args: argparse.Namespace, out: Path, inputs: Iterable[str | Path]) -> _Target:
    """The output that a command line asks for, checked before anything is read.

    Raises :class:`HyditError` if it must not be written to; an input is never replaced.
    """
    format = args.format or ("comfy" if out.suffix == ".safetensors" else "peft")
    form = f"the format {format}"
    output.check_output(out, inputs, overwrite=args.overwrite, folder=format == "peft", form=form)
    return _Target(out, format, dtype_of(args.dtype) if args.dtype else None, args.overwrite)


def _save(adapter: Adapter, to: _Target) -> None:
    """Write it and say what was written. Raises :class:`HyditError` for numbers that are not finite."""
    adapter.require_finite()
    notes = write(adapter, to.path, format=to.format, dtype=to.dtype, overwrite=to.overwrite)
    for note in notes:
        print(note)
    print(f"{to.path}: {adapter.describe()}, written as {to.format}")


def _kept(rank: int, energy: float, modules: Mapping[str, float]) -> str:
    return f"energy kept at rank {rank}: {energy:.4%}; least: {lowest(modules)}"


def lowest(energies: Mapping[str, float], count: int = 3) -> str:
    """The modules that lose most, as text."""
    worst = sorted(energies.items(), key=lambda item: item[1])[:count]
    return ", ".join(f"{module} {share:.1%}" for module, share in worst)


@contextmanager
def _bar(unit: str, **options: Any) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, as the callback ``(done, total)`` that moves it."""
    with tqdm(unit=unit, disable=None, **options) as bar:  # None: no bar where stderr is not a terminal

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
