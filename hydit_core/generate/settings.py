"""The settings of a run, from the options of ``python -m hydit_core.generate`` and a model."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from PIL import Image

from ..facts import NEGATIVE_PROMPT
from ..presets import RunSettings, check_settings
from . import retouch

if TYPE_CHECKING:
    from ..pipeline import Pipeline


def settings_of(pipe: Pipeline, args: argparse.Namespace, init: Image.Image | None) -> RunSettings:
    """A command line's settings, where it says nothing those that the model recommends.

    Raises :class:`ConfigError` for a value that is out of range.
    """
    negative = NEGATIVE_PROMPT if args.negative == "tencent" else args.negative
    settings = pipe.settings(
        args.preset,
        negative=negative,
        steps=args.steps,
        cfg=args.cfg,
        guidance_rescale=args.guidance_rescale,
        sampler=args.sampler,
        spacing=args.spacing,
        width=args.size and args.size[0],
        height=args.size and args.size[1],
    )
    size = None if init is None else retouch.start_size(args, init)
    if init is not None and (args.size is None or size is not None):
        width, height = size or _size_like(init.size, settings.width * settings.height)
        settings = replace(settings, width=width, height=height)
        check_settings(settings, pipe.vae.downscale, pipe.info)
    run = RunSettings(settings, args.seed, args.batch, forecast=args.forecast, cfg_end=args.cfg_end)
    if init is None:
        return run
    usual = 1.0 if args.inpaint is not None else 0.6 if args.upscale is None else retouch.STRENGTH
    strength = usual if args.strength is None else args.strength
    return replace(run, strength=strength, tile=retouch.tile_of(args, pipe))


def _size_like(size: tuple[int, int], area: int) -> tuple[int, int]:
    """Multiples of 16 with the proportions of ``size`` and about ``area`` pixels."""
    scale = (area / (size[0] * size[1])) ** 0.5
    width, height = (max(16, round(side * scale / 16) * 16) for side in size)
    return width, height
