"""``python -m hydit_core.compare``: settings, files and folders of pictures side by side, with figures."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, cli_main, program
from ..generate.options import read_prompts, size
from ..presets import check_seed
from . import drawn_text, report
from .blind import KEY, SHEET, count_answers, verdict, write_blind
from .draw import draw_sides
from .figures import Result, measure, verdicts
from .folders import match
from .judge import load_judge
from .sides import FLOORS, Side, floor_of, parse_side, take_sides
from .store import Item, drawn_with

_USAGE = """%(prog)s --prompts FILE [--seeds N] [--size WxH ...] --a "OPTIONS" --b "OPTIONS" [--c ...] -o OUT
       %(prog)s --a FOLDER --b FOLDER -o OUT
       %(prog)s --answers FILE --key FILE"""
_SIDES = """\
sides:
  --a TEXT, --b TEXT, ...  options of `hydit generate` in quotes, "" for what the model
                        recommends; or folders of pictures, matched by name.
                        "--peer-steps b ..." takes the reference's options, with as many
                        plain steps as cost what side b costs"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code: 0, or 2 after an ``error: ...`` line on stderr."""
    given = list(sys.argv[1:] if argv is None else argv)

    def run() -> None:
        sides, others = take_sides(given)
        args = _parser().parse_args(others)
        if (args.answers is None) != (args.key is None):
            raise ConfigError("--answers FILE and --key FILE belong together")
        if args.answers is not None:
            print(verdict(*count_answers(args.answers, args.key)))
        else:
            _compare(args, sides)

    return cli_main(run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("compare"),
        usage=_USAGE,
        description="Draw the same prompts, seeds and sizes with several settings, or take folders of "
        "pictures, and write how far they differ: a page with pairs, a table of figures, JSON, a picture.",
        epilog=_SIDES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to draw")
    what.add_argument("--prompt", action="extend", nargs="+", default=[], metavar="TEXT", help="one or more")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="text file, UTF-8, one prompt per line")
    what.add_argument("--seeds", type=int, default=1, metavar="N", help="pictures per prompt (default: 1)")
    what.add_argument("--seed", type=int, default=0, help="of the first picture of each prompt (default: 0)")
    what.add_argument(
        "--size", type=size, nargs="+", metavar="WxH", help="one or more; default: the model's own"
    )
    what.add_argument(
        "--batch", type=int, default=1, help="seeds of a prompt that are drawn together (default: 1)"
    )
    how = parser.add_argument_group("how to compare")
    how.add_argument(
        "--reference", metavar="LETTER", help="the side that the others are compared with (default: a)"
    )
    how.add_argument(
        "--noise-floor",
        nargs="+",
        default=[],
        choices=FLOORS,
        metavar="KIND",
        help="also draw the reference in another dtype, or, with `batch`, one picture at a time: "
        "differences of that size mean nothing",
    )
    how.add_argument(
        "--judge",
        metavar="FILE.py:FUNCTION",
        help="FUNCTION(picture, prompt) in a Python file of yours: True if a picture shows what was asked "
        "for, None if it cannot tell; the share of right pictures is added",
    )
    how.add_argument(
        "--ocr",
        nargs="?",
        const="",
        metavar="TEXT",
        help="read the pictures, and compare the characters with TEXT or, without it, with what stands in "
        "quotation marks in each prompt; needs rapidocr",
    )
    out = parser.add_argument_group("results")
    out.add_argument(
        "-o", "--out", type=Path, help="folder; what was drawn there with the same settings is used"
    )
    out.add_argument(
        "--overwrite", action="store_true", help="replace an older report in OUT; its pictures are kept"
    )
    out.add_argument("--pages-of", type=int, default=24, metavar="N", help="pairs a page (default: 24)")
    blind = parser.add_argument_group("blind sheet")
    blind.add_argument(
        "--blind",
        metavar="LETTER",
        help=f"also write a sheet of pairs of the reference and this side, without names ({SHEET}), for a "
        f"person to judge, and its key ({KEY})",
    )
    blind.add_argument("--blind-pairs", type=int, default=40, metavar="N", help="up to (default: 40)")
    blind.add_argument(
        "--blind-seed", type=int, metavar="N", help="of pairs and their order (default: drawn by chance)"
    )
    blind.add_argument("--answers", type=Path, metavar="FILE", help="count the answers to a blind sheet")
    blind.add_argument("--key", type=Path, metavar="FILE", help="with --answers: the key of that sheet")
    return parser


def _compare(args: argparse.Namespace, given: Sequence[tuple[str, str]]) -> None:
    for name in ("seeds", "batch", "pages_of", "blind_pairs"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: use 1 or more")
    if args.out is None:
        raise ConfigError("no output: name a folder with -o OUT")
    sides, reference = _sides(args, given)
    judge = None if args.judge is None else load_judge(args.judge)
    read = None if args.ocr is None else drawn_text.reader()
    if args.ocr is not None and read is None:
        print(f"warning: {drawn_text.MISSING}", file=sys.stderr)
    report.check(args.out, overwrite=args.overwrite)
    results = _folders(sides, reference) if reference.folder else _drawn(args, sides, reference)
    if judge is not None:
        for result, files in results:
            result.right, result.judged = verdicts(judge, files)
    if read is not None:
        for result, files in results:
            result.text_accuracy, result.read = drawn_text.mean_accuracy(read, args.ocr, files)
    found = [result for result, _ in results]
    written = report.write(args.out, found, reference.name, args.pages_of)
    if args.blind is not None:
        seed = secrets.randbelow(1 << 32) if args.blind_seed is None else args.blind_seed
        chosen = next(result for result in found if result.name == args.blind)
        written += write_blind(args.out, reference.name, chosen, args.blind_pairs, seed)
    for path in written:
        print(path)
    print(report.table(found, reference.name))


def _sides(args: argparse.Namespace, given: Sequence[tuple[str, str]]) -> tuple[list[Side], Side]:
    texts = dict(given)
    if len(texts) < (1 if args.noise_floor else 2):
        raise ConfigError('give two sides or more: --a "OPTIONS" --b "OPTIONS", or --a FOLDER --b FOLDER')
    letter = args.reference or next(iter(texts))
    if letter not in texts:
        raise ConfigError(f"--reference {letter}: there is no such side, only: {', '.join(texts)}")
    sides = [parse_side(name, text, texts[letter]) for name, text in given]
    by_name = {side.name: side for side in sides}
    reference = by_name[letter]
    for side in sides:
        if (side.folder is None) != (reference.folder is None):
            raise ConfigError("some sides are folders and some are options: give one or the other")
        if side.peer is not None and (side.peer not in by_name or by_name[side.peer].peer is not None):
            raise ConfigError(f"--{side.name}: --peer-steps {side.peer}: name a side that is no peer itself")
    if reference.peer is not None:
        raise ConfigError(f"--{letter} is the reference and cannot be a peer")
    if args.blind is not None and (args.blind not in by_name or args.blind == letter):
        raise ConfigError(f"--blind {args.blind}: name a side that is not the reference")
    sides += [floor_of(reference, kind) for kind in dict.fromkeys(args.noise_floor)]
    return sides, reference


Results = list[tuple[Result, list[tuple[str, Path]]]]
"""Each side, with its pictures and their prompts."""


def _drawn(args: argparse.Namespace, sides: Sequence[Side], reference: Side) -> Results:
    prompts = list(dict.fromkeys(read_prompts(args)))
    check_seed(args.seed, args.seeds)
    seeds = range(args.seed, args.seed + args.seeds)
    sizes = list(dict.fromkeys(args.size or [None]))
    stores = draw_sides(sides, reference, prompts, seeds, sizes, args.batch, args.out / "pictures")
    items = [Item(prompt, seed, one) for one in sizes for prompt in prompts for seed in seeds]
    results: Results = []
    for side in sides:
        store = stores[side.name]
        settings = {**store.settings, "drawn": drawn_with(store.path(items[0]))}
        result = Result(side.name, side.text, settings, costs=[store.cost(item) for item in items])
        if side is not reference:
            first = stores[reference.name]
            result.pairs = [
                measure(item.name, item.prompt, item.seed, first.path(item), store.path(item))
                for item in items
            ]
        results.append((result, [(item.prompt, store.path(item)) for item in items]))
    return results


def _folders(sides: Sequence[Side], reference: Side) -> Results:
    found = match(sides, reference)
    results: Results = []
    for side in sides:
        result = Result(side.name, side.text, {"folder": os.fspath(side.folder or "")})
        if side is not reference:
            result.pairs = [
                measure(one.name, one.prompt, one.seed, one.files[reference.name], one.files[side.name])
                for one in found
            ]
        results.append((result, [(one.prompt, one.files[side.name]) for one in found]))
    return results


if __name__ == "__main__":
    raise SystemExit(main())
