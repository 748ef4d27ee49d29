"""``--block-weights``, in the sub-commands that have it."""

from __future__ import annotations

import argparse

from ..layer_weights import CURVES, read_each
from .blocks import BlockWeights

_WEIGHTS = "--block-weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option."""
    parser.add_argument(
        _WEIGHTS,
        action="append",
        default=[],
        metavar="WEIGHTS",
        help="over the strength, for each block: a number, numbers with commas (40 for DiT-g/2), a JSON file "
        f"with a list, or a curve: {', '.join(CURVES)}; once for all, or for each LoRA in their order",
    )


def weights(args: argparse.Namespace) -> list[BlockWeights]:
    """Those of each of ``args.loras``.

    Raises:
        ConfigError: if they cannot be read, or are neither one for all nor one for each.
    """
    count = len(args.loras)
    read = read_each(args.block_weights, _WEIGHTS, count, "LoRAs")
    return [BlockWeights.parse(one) for one in read] or [BlockWeights()] * count
