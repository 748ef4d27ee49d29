"""The options of ``python -m hydit_core.generate`` that redraw a part of a picture, or a larger one."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..errors import ConfigError
from ..images import SIZE_MULTIPLE, Size, parse_size
from ..inpaint import Inpainting, check_feather, load_mask, own_size
from ..presets import TILE_LEAST, TILE_MULTIPLE, RunSettings, check_settings, check_tile

if TYPE_CHECKING:
    from ..facts import SamplingDefaults
    from ..pipeline import Pipeline

MAX_FACTOR = 4
STRENGTH = 0.35
"""Of enlarging: a tile is drawn without sight of the others, and much noise would make it a whole picture."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group to a parser."""
    group = parser.add_argument_group("a part of a picture, or a larger one")
    group.add_argument(
        "--inpaint",
        metavar="MASK",
        help="redraw only this part of --init-image: a picture that is white there; or `alpha`: what is "
        "transparent in --init-image itself. All other pixels stay as they are",
    )
    group.add_argument(
        "--feather", type=float, metavar="PIXELS", help="make the edge of the mask soft (default: 0)"
    )
    group.add_argument(
        "--upscale",
        type=float,
        metavar="FACTOR",
        help=f"enlarge what is drawn, or --init-image, up to {MAX_FACTOR} times, and redraw it in tiles",
    )
    group.add_argument("--tile", type=_size, metavar="WxH", help="of --upscale; default: the model's size")


def _size(text: str) -> Size:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def check(args: argparse.Namespace) -> None:
    """Refuse options that cannot work, before anything is opened. Raises :class:`ConfigError`."""
    if args.strength is not None and args.init_image is None and args.upscale is None:
        raise ConfigError("--strength needs --init-image or --upscale")
    if args.feather is not None:
        if args.inpaint is None:
            raise ConfigError("--feather needs --inpaint")
        check_feather(args.feather)
    if args.inpaint is not None and args.init_image is None:
        raise ConfigError("--inpaint needs the picture that it is a part of: --init-image FILE")
    if args.tile is not None:
        if args.upscale is None:
            raise ConfigError("--tile needs --upscale")
        check_tile(args.tile)
    if args.upscale is not None:
        if not 1 <= args.upscale <= MAX_FACTOR:
            raise ConfigError(f"--upscale {args.upscale:g}: use 1 to {MAX_FACTOR}")
        if args.inpaint is not None:
            raise ConfigError(
                "--inpaint and --upscale are two runs: inpaint first, then enlarge the result with "
                "--init-image RESULT --upscale"
            )


def read_mask(args: argparse.Namespace) -> Image.Image | None:
    """The mask of a command line; raises :class:`DataError` if it cannot be read."""
    return None if args.inpaint is None else load_mask(args.inpaint, args.init_image)


def inpainting(
    args: argparse.Namespace, init: Image.Image | None, mask: Image.Image | None, settings: SamplingDefaults
) -> Inpainting | None:
    """What of the picture is redrawn; None if it is all. Raises :class:`DataError`."""
    if init is None or mask is None:
        return None
    name = "the mask" if args.inpaint == "alpha" else args.inpaint
    size = settings.width, settings.height
    return Inpainting(init, mask, size, feather=args.feather or 0, name=name)


def start_size(args: argparse.Namespace, init: Image.Image) -> Size | None:
    """The size of a run from a picture that keeps its own; None if it is to be chosen otherwise.

    With ``--upscale``, the enlarged one.
    """
    if args.inpaint is None and args.upscale is None:
        return None
    own = args.size or own_size(init.size)
    return own if args.upscale is None else _enlarged(own, args.upscale)


def _enlarged(size: Size, factor: float) -> Size:
    width, height = (max(TILE_LEAST, round(side * factor / SIZE_MULTIPLE) * SIZE_MULTIPLE) for side in size)
    return width, height


def tile_of(args: argparse.Namespace, pipe: Pipeline) -> Size | None:
    """The tiles' size: what is asked for, else the size that the model is made for."""
    if args.upscale is None or args.tile is not None:
        return args.tile
    best = pipe.info.defaults
    width, height = (
        max(TILE_LEAST, side // TILE_MULTIPLE * TILE_MULTIPLE) for side in (best.width, best.height)
    )
    return width, height


def second_run(args: argparse.Namespace, run: RunSettings, pipe: Pipeline) -> RunSettings | None:
    """The run that enlarges what ``run`` draws; None if there is none, or ``run`` itself is it.

    Raises :class:`ConfigError` for a strength that leaves no step.
    """
    if args.upscale is None or args.init_image is not None:
        return None
    width, height = _enlarged((run.sampling.width, run.sampling.height), args.upscale)
    sampling = replace(run.sampling, width=width, height=height)
    check_settings(sampling, pipe.vae.downscale, pipe.info)
    strength = STRENGTH if args.strength is None else args.strength
    pipe.schedule.sigmas_for(sampling.spacing, sampling.steps, strength)
    return replace(run, sampling=sampling, batch=1, strength=strength, tile=tile_of(args, pipe))


def facts(args: argparse.Namespace, run: RunSettings, second: RunSettings | None) -> dict[str, Any]:
    """What is written about enlarging into a picture."""
    tiled = second or run
    if tiled.tile is None:
        return {}
    upscale: dict[str, Any] = {"factor": args.upscale, "tile": list(tiled.tile)}
    if second is not None:
        upscale |= {"width": run.sampling.width, "height": run.sampling.height}
    return {
        "width": tiled.sampling.width,
        "height": tiled.sampling.height,
        "strength": tiled.strength,
        "upscale": upscale,
    }
