"""The ControlNet options of ``python -m hydit_core.generate``."""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..control import ControlInput, check_fit, picture_facts
from ..errors import ConfigError
from ..facts import SamplingDefaults
from ..images import CANNY_THRESHOLDS, Geometry, canny, load_control, load_picture
from ..layer_weights import CURVES, LayerWeights, read_each, split_weight
from ..new_files import write_new

if TYPE_CHECKING:
    from ..pipeline import Pipeline
    from ..weights.bundle import Bundle
    from ..weights.source import TensorSource

_WEIGHTS = "--control-weights"
MAX_STRENGTH = 10
"""HyDiTControlNetApply takes 0 to this; other weights are written as layer weights."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group to a parser."""
    group = parser.add_argument_group("ControlNet")
    group.add_argument(
        "--controlnet",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="a ControlNet of this model's size; may be given several times",
    )
    group.add_argument(
        "--control-image",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="the picture it follows; one for all, or one for each --controlnet in their order. What the "
        "ControlNet gets is written beside the results, as NAME-control-....png",
    )
    group.add_argument(
        "--control-preprocess",
        choices=("none", "canny"),
        default="none",
        help="none: --control-image is already a control picture; canny: extract its edges",
    )
    group.add_argument(
        _WEIGHTS,
        action="append",
        default=[],
        metavar="WEIGHTS",
        help=f"for each layer: a number, numbers with commas, a JSON file with a list, or a curve: "
        f"{', '.join(CURVES)}, each also with a number as in decay(0.9); once for all, or for each",
    )
    group.add_argument(
        "--control-start", type=float, default=0.0, metavar="X", help="when it begins, 0 (default) to 1"
    )
    group.add_argument(
        "--control-end", type=float, default=1.0, metavar="X", help="when it ends, up to 1 (default)"
    )


def check(args: argparse.Namespace) -> None:
    """Refuse options that cannot work, before anything is loaded. Raises :class:`ConfigError`."""
    count = len(args.controlnet)
    if not count:
        given = [name for name in ("control_image", "control_weights") if getattr(args, name)]
        if given:
            raise ConfigError(f"--{given[0].replace('_', '-')} needs --controlnet")
        return
    images = len(args.control_image)
    if images not in {1, count}:
        raise ConfigError(
            f"--control-image is given {images} times for {count} --controlnet: give 1 or {count}"
        )
    _weights(args)
    if not 0 <= args.control_start <= args.control_end <= 1:
        raise ConfigError(
            f"--control-start {args.control_start:g} and --control-end {args.control_end:g}: use 0 <= start "
            "<= end <= 1"
        )


def open_files(args: argparse.Namespace) -> list[Bundle]:
    """Open the ControlNets of a command line before the model is loaded, which takes longer.

    Raises :class:`HyditError` for files that are not ControlNets.
    """
    if not args.controlnet:
        return []
    from ..weights.bundle import bundle

    opened = [bundle(path, only=("controlnet",), kinds=("controlnet",)) for path in files(args)]
    for one in opened:
        _thresholds(one.source)
    return opened


def _weights(args: argparse.Namespace) -> list[LayerWeights]:
    count = len(args.controlnet)
    return read_each(args.control_weights, _WEIGHTS, count, "--controlnet") or [LayerWeights()] * count


def read(
    args: argparse.Namespace,
    opened: Sequence[Bundle],
    pipe: Pipeline,
    settings: SamplingDefaults,
    folder: Path,
) -> tuple[list[ControlInput], list[dict[str, Any]]]:
    """The ControlNets of a command line, already open, and what is written about them into a picture.

    Writes the control pictures into ``folder``: ComfyUI's own edges differ from ours, and its crop may.

    Raises :class:`HyditError` for files that cannot be read or do not fit the model.
    """
    from ..weights.load import load_controlnet

    controls, facts = [], []
    given = zip(args.controlnet, opened, _weights(args), strict=True)
    for index, (text, one, chosen) in enumerate(given):
        path, scale = split_weight(text)
        thresholds = _thresholds(one.source)
        net, _ = load_controlnet(one, dtype=pipe.dit.dtype, device=pipe.home, keep_quantised=True)
        check_fit(net.config, pipe.dit.config, str(path))
        picture_path = _one(args.control_image, index)
        edges = args.control_preprocess == "canny"
        picture = load_picture(picture_path) if edges else load_control(picture_path)
        size = (settings.width, settings.height)
        picture = Geometry.cover(picture.size, size).apply(picture)
        hint = canny(picture, thresholds) if edges else picture
        values = [scale * value for value in chosen.resolve(net.config.num_controls)]
        controls.append(_control(args, net, hint, LayerWeights.parse(values)))
        if not 0 <= scale <= MAX_STRENGTH:
            scale, chosen = 1.0, controls[-1].weights
        facts.append(
            {
                "controlnet": path.name,
                "scale": scale,
                "image": picture_path.name,
                "preprocess": args.control_preprocess,
                "weights": str(chosen),
                "start": args.control_start,
                "end": args.control_end,
            }
        )
    for control, fact in zip(controls, facts, strict=True):
        fact["picture"] = _write(control.image, folder, Path(fact["image"]).stem).name
    return controls, facts


def _control(args: argparse.Namespace, net: Any, hint: Image.Image, chosen: LayerWeights) -> ControlInput:
    return ControlInput(net.requires_grad_(False), hint, chosen, args.control_start, args.control_end)


def files(args: argparse.Namespace) -> list[Path]:
    """The ControlNets' files, in the order given."""
    return [split_weight(text)[0] for text in args.controlnet]


def _write(picture: Image.Image, folder: Path, stem: str) -> Path:
    """Write a control picture, which all pictures of a run share, under a name that is not yet taken."""
    content = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
    # A name may have 255 bytes, but only 143 on encrypted file systems.
    stem = stem.encode()[:100].decode(errors="ignore")
    path = folder / f"{stem}-control-{content[:8]}.png"
    if not path.exists():
        file = io.BytesIO()
        picture.save(file, format="PNG")
        path = write_new(path, file.getvalue(), keep_same=True)
        print(f"control picture: {path}", file=sys.stderr)
    return path


def _thresholds(source: TensorSource) -> tuple[int, int]:
    """Canny's: those that the ControlNet was trained with, if its file says so."""
    made = picture_facts(source)
    return (made["low"], made["high"]) if {"low", "high"} <= made.keys() else CANNY_THRESHOLDS


def _one(values: Sequence[Any], index: int) -> Any:
    return values[index] if len(values) > 1 else values[0]
