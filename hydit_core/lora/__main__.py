"""``python -m hydit_core.lora``: look into LoRAs, convert, merge, combine and extract them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..errors import cli_main
from . import combine_cli, convert_cli, extract_cli, inspect_cli, merge_cli


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hydit_core.lora", description="Look into HunyuanDiT LoRAs and make others of them."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (inspect_cli, convert_cli, merge_cli, combine_cli, extract_cli):
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    return cli_main(lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
