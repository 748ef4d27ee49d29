"""The options of ``python -m hydit_core.generate`` for the device's memory: ``--offload`` and ``--plan``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..devices import choose_device
from ..dtypes import choose_dtype, dtype_name
from ..facts import SamplingDefaults
from ..loading import outline
from ..offload.placement import MODES
from ..plan import Choice, Pictures, Requirements, choose, for_pipeline, free_memory, size_text
from . import image_prompts as image_cli
from .settings import settings_of

if TYPE_CHECKING:
    from PIL import Image

    from ..weights.bundle import Bundle

    Opened = tuple[Image.Image | None, Sequence[Bundle], image_cli.Opened | None]
    """The picture that a run starts from, its ControlNets, and its image prompts."""

CARDS = (4, 6, 8, 12, 16, 24)
"""The GPUs that ``--plan`` looks at where there is none, by their memory in GB."""

_LEFT = 0.92
"""Of a card's memory, what is left beside a screen and the driver."""


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the options to a group of a parser."""
    group.add_argument(
        "--offload",
        choices=("auto", *MODES),
        default="auto",
        help="for small GPUs: what is on the device only when it is needed: text encoders, DiT and VAE as a "
        "whole (encoders), or block by block (blocks; the least memory); auto: as little as possible "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--plan",
        action="store_true",
        help="print how much memory these options need with each --offload, and draw nothing",
    )


def choice(args: argparse.Namespace, opened: Opened, *, quiet: bool = False) -> str | Choice:
    """What ``--offload auto`` means on the device of a command line; says so where it is not "off".

    Raises :class:`HyditError` for files that cannot be read.
    """
    device = choose_device(args.device)
    free = free_memory(device)
    if free is None:
        return "off"
    chosen = choose(_needed(args, opened)[0], free)
    if not quiet and (chosen.mode != "off" or chosen.tile):
        print(f"offload: {chosen}; {device} has {size_text(free)} free", file=sys.stderr)
    if not quiet and not chosen.fits:
        print("warning: that may be more than fits; try a smaller --size, or --dtype", file=sys.stderr)
    return chosen


def plan(args: argparse.Namespace, opened: Opened) -> list[str]:
    """The lines of ``--plan``.

    Raises :class:`HyditError` for files that cannot be read.
    """
    needed, settings, dtype = _needed(args, opened)
    lines = [f"{settings.width}x{settings.height}, batch {args.batch}, {dtype}"]
    lines += [f"  {name}: {size_text(size)}" for name, size in needed.weights.items()]
    lines += [
        f"  a step beside the weights: {size_text(needed.sampling)}",
        f"  a picture in the VAE: {size_text(needed.decoding)}; in tiles: {size_text(needed.in_tiles)}",
        "at once:",
    ]
    for mode in MODES:
        whole, tiled = (size_text(needed.of(mode, tiles=tiles)) for tiles in (False, True))
        lines.append(f"  --offload {mode}: {whole}" + (f"; VAE in tiles: {tiled}" if tiled != whole else ""))
    return [*lines, "--offload auto:", *_cards(args, needed)]


def _cards(args: argparse.Namespace, needed: Requirements) -> list[str]:
    device = choose_device(args.device)
    free = free_memory(device)
    cards = {f"a GPU of {size} GB": int(_LEFT * size * 2**30) for size in CARDS}
    if free is not None:
        cards = {f"{device}, {size_text(free)} free": free}
    lines = []
    for name, bytes_ in cards.items():
        chosen = choose(needed, bytes_)
        lines.append(f"  {name}: {chosen if chosen.fits else 'too small'}")
    return lines


def _needed(args: argparse.Namespace, opened: Opened) -> tuple[Requirements, SamplingDefaults, str]:
    from ..weights.bundle import bundle
    from ..weights.load import load_controlnet

    device = choose_device(args.device)
    # A GPU's dtype, where there is none to be asked: what fits is asked about GPUs.
    plain = args.plan and args.dtype == "auto" and device.type == "cpu"
    dtype = choose_dtype("bf16" if plain else args.dtype, device)
    pipe = outline(args.model, dtype, text_encoders=args.text_encoders, vae=args.vae, load_key=args.load_key)
    run = settings_of(pipe, args, opened[0])
    settings = run.sampling
    if run.tile is not None:  # all that is on the device at once
        width, height = (min(pair) for pair in zip(run.tile, (settings.width, settings.height), strict=True))
        settings = replace(settings, width=width, height=height)
    nets = [
        # Opened again: what was opened gives its tensors away once.
        load_controlnet(
            bundle(one.place, only=("controlnet",), kinds=("controlnet",), load_key=one.load_key),
            dtype=dtype,
            device="meta",
        )[0]
        for one in opened[1]
    ]
    pictures = None
    if opened[2] is not None:
        seeing = torch.float16 if plain else image_cli.encoder_dtype(device)
        adapter, encoder = opened[2].adapter.to(dtype), opened[2].encoder.to(seeing)
        pictures = Pictures(adapter, encoder, len(args.image_prompt))
    return for_pipeline(pipe, settings, run.batch, nets, pictures), run.sampling, dtype_name(dtype)
