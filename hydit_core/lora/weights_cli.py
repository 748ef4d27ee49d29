"""``--block-weights``, in the sub-commands that have it."""

from __future__ import annotations

import argparse

from ..errors import ConfigError
from ..model.layer_weights import CURVES, read_weights
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
    given, count = args.block_weights, len(args.loras)
    if len(given) not in {0, 1, count}:
        raise ConfigError(f"{_WEIGHTS} is given {len(given)} times for {count} LoRAs: give 1 or {count}")
    read = [BlockWeights.parse(read_weights(text, _WEIGHTS)) for text in given] or [BlockWeights()]
    return read if len(read) == count else read * count
