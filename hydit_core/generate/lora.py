"""The LoRA options of ``python -m hydit_core.generate``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..layer_weights import CURVES, LayerWeights, read_each, split_weight

if TYPE_CHECKING:
    from ..lora.adapter import Adapter
    from ..pipeline import Pipeline

MAX_STRENGTH = 10
"""HyDiTLoraLoader's limit, in both directions."""
_WEIGHTS = "--lora-block-weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group to a parser."""
    group = parser.add_argument_group("LoRA")
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="a LoRA in any common format, or a PEFT folder; may be given several times",
    )
    group.add_argument(
        _WEIGHTS,
        action="append",
        default=[],
        metavar="WEIGHTS",
        help="factors on the strength for each block of the DiT: a number, numbers with commas, a JSON file "
        f"with a list, or a curve: {', '.join(CURVES)}; once for all, or for each --lora in their order",
    )
    group.add_argument(
        "--partial",
        action="store_true",
        help="accept a LoRA if more than a tenth of it is for layers that the model does not have",
    )


def check(args: argparse.Namespace) -> None:
    """Refuse options that cannot work, before anything is loaded. Raises :class:`ConfigError`."""
    if args.lora_block_weights and not args.lora:
        raise ConfigError(f"{_WEIGHTS} needs --lora")
    _weights(args)
    for text in args.lora:
        strength = split_weight(text)[1]
        if not abs(strength) <= MAX_STRENGTH:
            raise ConfigError(f"--lora {text}: strength {strength:g}: use -{MAX_STRENGTH} to {MAX_STRENGTH}")


def _weights(args: argparse.Namespace) -> list[LayerWeights]:
    read = read_each(args.lora_block_weights, _WEIGHTS, len(args.lora), "--lora")
    return read or [LayerWeights.parse("uniform")] * len(args.lora)


def files(args: argparse.Namespace) -> list[Path]:
    """The LoRAs' files, in the order given."""
    return [split_weight(text)[0].expanduser() for text in args.lora]


def read(args: argparse.Namespace) -> list[Adapter]:
    """The LoRAs of a command line, read before the model is loaded, which takes longer and may be in vain.

    Raises :class:`HyditError` for files that cannot be read.
    """
    if not args.lora:
        return []
    from ..lora import reading

    return [reading.read(path) for path in files(args)]


def load(
    args: argparse.Namespace, adapters: list[Adapter], pipe: Pipeline, *, quiet: bool = False
) -> list[dict[str, Any]]:
    """Put LoRAs from :func:`read` into a pipeline; returns what is written about them into a picture.

    Prints on stderr what fits, each one's trigger words, and the settings that a distilled one recommends.

    Raises :class:`HyditError` for LoRAs that do not fit the model.
    """
    if not adapters:
        return []
    from ..lora.distilled import lora_notes

    facts = []
    given = zip(adapters, files(args), args.lora, _weights(args), strict=True)
    for adapter, path, text, weights in given:
        strength = split_weight(text)[1]
        before = pipe.info
        match = pipe.load_lora(adapter, strength, weights, partial=args.partial)
        words = f"; trigger words: {adapter.trigger()}" if adapter.trigger() else ""
        if not quiet:
            print(f"LoRA {path.name}: {match}{words}", file=sys.stderr)
            for note in lora_notes(before, pipe.info):
                print(note, file=sys.stderr)
        facts.append({"lora": path.name, "strength": strength, "block_weights": str(weights)})
    return facts
