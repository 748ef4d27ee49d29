"""``python -m hydit_core.train CONFIG``, ``... quick PICTURES``, ``... prepare | cache CONFIG``, and more."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, cli_main, program

if TYPE_CHECKING:
    from http.server import ThreadingHTTPServer

STOPPED = 3
"""The exit code of a run that ended before its last step and can be continued."""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {
        "quick": _quick,
        "import": _import,
        "prepare": _prepare,
        "cache": _cache,
        "export": _export,
        "report": _report,
    }
    command = commands[arguments.pop(0)] if arguments and arguments[0] in commands else _train
    return cli_main(lambda: command(arguments))


def _config_parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program(f"train{name}"), description=description)
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one value, for example --set run.steps=500 (may be repeated)",
    )
    return parser


def _train(arguments: list[str]) -> int:
    parser = _config_parser(
        "",
        "Train HunyuanDiT. Further commands: quick PICTURES, import FILE, prepare CONFIG.toml, "
        "cache CONFIG.toml, export RUN, report RUN.",
    )
    parser.add_argument(
        "--resume",
        metavar="RUN_DIR",
        help="continue a run: its folder, a checkpoint's folder, or 'auto' (run.output_dir if it holds one)",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be trained; write nothing")
    parser.add_argument(
        "--ranks", type=_count, metavar="N", help="--dry-run: plan for so many processes (default: as now)"
    )
    parser.add_argument(
        "--device-memory",
        type=_bytes,
        metavar="SIZE",
        help="--dry-run: plan for devices with so much memory, such as 80GiB (default: the one here)",
    )
    parser.add_argument(
        "--stop-after-micro",
        type=int,
        metavar="N",
        help="save everything and stop after N micro-batches, as an interruption would",
    )
    parser.add_argument(
        "--attended",
        action="store_true",
        help="save everything and stop when standard input ends: for programs that start trainings",
    )
    options = parser.parse_args(arguments)
    if options.attended:
        from .stopping import stop_with_input

        stop_with_input()

    from .config import load_config

    config = load_config(options.config, options.set)
    if options.dry_run:
        from .dryrun import describe

        lines = describe(config, ranks=options.ranks, device_memory=options.device_memory)
        print("\n".join(lines))
        return 0
    if options.ranks is not None or options.device_memory is not None:
        raise ConfigError("--ranks and --device-memory plan a run: use --dry-run (torchrun starts processes)")

    from .launch import train

    return _exit_code(lambda: train(config, resume=options.resume, stop_after_micro=options.stop_after_micro))


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 1 << 20:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of processes, such as 8")
    return int(text)


def _bytes(text: str) -> int:
    """80GiB, 80GB, 24.5G or a number of bytes."""
    units = {
        "": 1,
        "M": 2**20,
        "MIB": 2**20,
        "MB": 10**6,
        "G": 2**30,
        "GIB": 2**30,
        "GB": 10**9,
        "TIB": 2**40,
    }
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?) ?([A-Za-z]*)", text)
    if match is None or match[2].upper() not in units or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size, such as 80GiB or 80GB")
    return int(float(match[1]) * units[match[2].upper()])


def _exit_code(run: Callable[[], bool]) -> int:
    """That of a training; ``run`` says whether it came to its end."""
    from .stopping import TrainingStopped, tell

    try:
        return 0 if run() else STOPPED
    except TrainingStopped as error:
        tell(f"error: {error}")
        return STOPPED


def _quick(arguments: list[str]) -> int:
    from .quick.command import main

    return _exit_code(lambda: main(arguments))


def _import(arguments: list[str]) -> int:
    from .importing.command import main

    return main(arguments)


def _prepare(arguments: list[str]) -> int:
    parser = _config_parser(
        " prepare", "List the pictures and captions of a run in a file that trainings map; for large data."
    )
    parser.add_argument(
        "--features",
        action="store_true",
        help="then encode what data.cache keeps, so that trainings encode nothing, and count the tokens of "
        "all captions",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="work in this process, or in those that torchrun starts (local, default), or on a Ray cluster",
    )
    parser.add_argument(
        "--workers",
        type=_count,
        metavar="N",
        help="with --engine ray and --features: how many processes load the model (default: one a GPU, "
        "without any, one)",
    )
    options = parser.parse_args(arguments)
    if options.workers is not None and not (options.engine == "ray" and options.features):
        raise ConfigError("--workers needs --engine ray and --features: it says how many processes encode")

    from .config import load_config
    from .preparing import prepare

    prepare(
        load_config(options.config, options.set),
        features=options.features,
        engine=options.engine,
        workers=options.workers,
    )
    return 0


def _cache(arguments: list[str]) -> int:
    parser = _config_parser(" cache", "Encode the pictures (and captions) of a run ahead of training.")
    options = parser.parse_args(arguments)

    from .config import load_config
    from .launch import build_caches

    build_caches(load_config(options.config, options.set))
    return 0


def _export(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=program("train export"),
        description="Write the model file of a run from one of its checkpoints, as training does.",
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="a run's folder, or a checkpoint's")
    parser.add_argument("--step", type=int, metavar="N", help="of this step (default: the newest checkpoint)")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="the averages, or the weights as trained (default: the averages, if there are any)",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="FILE.safetensors",
        help="default: the file that training writes, with --step N one with its number",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    options = parser.parse_args(arguments)

    from .export import export

    print(
        export(
            options.run,
            step=options.step,
            ema=options.ema,
            out=options.out,
            overwrite=options.overwrite,
        )
    )
    return 0


def _report(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=program("train report"),
        description="Losses of a run as a table, and a page: curves, sample pictures, configuration.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help="several: one page of all")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the page, or, if it ends like a picture, the curves alone (default: RUN_DIR/report.html)",
    )
    parser.add_argument(
        "--live",
        type=int,
        nargs="?",
        const=0,
        metavar="PORT",
        help="serve the page on this machine while the run goes on, instead of writing it",
    )
    options = parser.parse_args(arguments)
    for run in options.runs:
        if not run.is_dir():
            raise ConfigError(f"{run}: no such folder; give the output_dir of a run")

    from .page import write
    from .report import is_picture, plot, table

    if options.live is not None:
        return _serve(write.server(options.runs, options.live))
    out = options.out or options.runs[0] / "report.html"
    for run in options.runs:
        print(table(run))
    if is_picture(out):
        plot(options.runs[0], out)
    else:
        write.write(options.runs, out)
    print(f"written to {out}")
    return 0


def _serve(server: ThreadingHTTPServer) -> int:
    print(f"http://{server.server_address[0]!s}:{server.server_address[1]} (Ctrl+C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 0
    finally:
        server.server_close()
    return 0


if __name__ == "__main__":
    code = main()
    from .stopping import ignore_signals

    ignore_signals()
    sys.exit(code)
