"""The options of ``python -m hydit_core.generate`` for pictures by the million."""

from __future__ import annotations

import argparse

from ...errors import ConfigError

NAMES = ("shard_size", "together", "on_error", "engine", "workers")
TOGETHER = 4
_SINGLE = (
    "prompt", "batch", "overwrite", "captions", "init_image", "inpaint", "upscale", "controlnet",
    "control_image", "image_prompt",
)  # fmt: skip
"""What belongs to pictures that are files of their own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group to a parser."""
    group = parser.add_argument_group("by the million")
    group.add_argument(
        "--shard-size",
        type=int,
        metavar="N",
        help="draw the rows of --prompts into tar files of N pictures each; a rerun goes on and ends with "
        "the same bytes. --prompts may be a table then: .jsonl, .csv, .tsv, .parquet or .arrow",
    )
    group.add_argument(
        "--together",
        type=int,
        metavar="N",
        help=f"rows of one size that are drawn in one batch (default: {TOGETHER})",
    )
    group.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        help="what to do with a row that cannot be drawn: stop, before anything is drawn if the row says so "
        "itself (default), or leave it out and note it beside the shard",
    )
    group.add_argument(
        "--engine",
        choices=("local", "ray"),
        help="draw in this process, or in those that torchrun starts (local, default), or on a Ray cluster",
    )
    group.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="with --engine ray: how many processes load the model (default: one a GPU, without any, one)",
    )


def check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together. Raises :class:`ConfigError`."""
    from .table import TABLES

    if args.shard_size is None:
        if given := [name for name in NAMES if getattr(args, name) is not None]:
            raise ConfigError(f"{_option(given[0])} needs --shard-size N: how many pictures a tar file holds")
        if args.prompts is not None and args.prompts.suffix.lower() in TABLES:
            raise ConfigError(f"--prompts {args.prompts}: a table is drawn into tar files: add --shard-size")
        return
    for name in ("shard_size", "together", "workers"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ConfigError(f"{_option(name)} {value}: use 1 or more")
    if args.prompts is None:
        raise ConfigError("--shard-size needs --prompts FILE: a table of prompts, or a prompt a line")
    for name in _SINGLE:
        if getattr(args, name) and (name, args.batch) != ("batch", 1):
            raise ConfigError(f"{_option(name)} does not go with --shard-size: {_INSTEAD.get(name, _ALONE)}")
    if args.out.suffix.lower() == ".png":
        raise ConfigError(f"--out {args.out}: shards are written into a folder; name one")
    if args.workers is not None and args.engine != "ray":
        raise ConfigError("--workers needs --engine ray; without it, torchrun says how many processes draw")


_ALONE = "it belongs to pictures that are files of their own"
_INSTEAD = {
    "prompt": "write the prompts into the file of --prompts",
    "batch": "give a row several times, each with a seed of its own",
    "captions": "the prompts are in the tar files",
    "overwrite": "no shard is ever replaced; name another folder",
}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
