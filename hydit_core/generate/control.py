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
from ..images import CANNY_THRESHOLDS, Geometry, canny, load_control, load_picture, softened
from ..inpaint import ALPHA, Inpainting
from ..layer_weights import CURVES, LayerWeights, check_count, read_each, split_weight
from ..new_files import write_new

if TYPE_CHECKING:
    from ..pipeline import Pipeline
    from ..weights.bundle import Bundle
    from ..weights.source import TensorSource

_WEIGHTS = "--control-weights"
_MADE = {"tile": "--upscale", "inpaint": "--inpaint"}
"""Control pictures that follow from other options, and from which."""
KINDS = ("none", "canny", *_MADE)
_USED = {"control": "control picture", "mask": "mask", "prompt": "image prompt"}
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
        "--control-load-key",
        action="append",
        default=[],
        metavar="KEY",
        help="which weights of a torch file with several: ema, module ...; once for all, or for each",
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
        action="append",
        choices=KINDS,
        default=[],
        help="none (default): --control-image is already a control picture; canny: extract its edges. Two "
        "need no --control-image. tile: the picture that --upscale enlarges, softened; inpaint: "
        "--init-image, black where --inpaint redraws it. Once for all, or for each --controlnet",
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
        named = ("control_image", "control_weights", "control_preprocess", "control_load_key")
        given = [name for name in named if getattr(args, name)]
        if given:
            raise ConfigError(f"--{given[0].replace('_', '-')} needs --controlnet")
        return
    check_count(len(args.control_preprocess), "--control-preprocess", count, "--controlnet")
    check_count(len(args.control_load_key), "--control-load-key", count, "--controlnet")
    kinds = _kinds(args)
    for kind, option in _MADE.items():
        if kind in kinds and getattr(args, option.removeprefix("--")) is None:
            raise ConfigError(f"--control-preprocess {kind} needs {option}")
    images, wanted = len(args.control_image), sum(kind not in _MADE for kind in kinds)
    if images not in {min(1, wanted), wanted}:
        raise ConfigError(
            f"--control-image is given {images} times for {wanted} --controlnet: "
            + (f"give 1 or {wanted}" if wanted else "those that it is preprocessed for need none")
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

    opened = [
        bundle(path, only=("controlnet",), kinds=("controlnet",), load_key=key)
        for path, key in zip(files(args), _load_keys(args), strict=True)
    ]
    for one in opened:
        _thresholds(one.source)
    return opened


def _weights(args: argparse.Namespace) -> list[LayerWeights]:
    count = len(args.controlnet)
    return read_each(args.control_weights, _WEIGHTS, count, "--controlnet") or [LayerWeights()] * count


def _load_keys(args: argparse.Namespace) -> list[str | None]:
    given = args.control_load_key or [None]
    return given if len(given) > 1 else given * len(args.controlnet)


def _kinds(args: argparse.Namespace) -> list[str]:
    """How each ControlNet's picture is made."""
    given = args.control_preprocess or ["none"]
    return given if len(given) > 1 else given * len(args.controlnet)


def read(
    args: argparse.Namespace,
    opened: Sequence[Bundle],
    init: Image.Image | None,
    pipe: Pipeline,
    settings: SamplingDefaults,
    part: Inpainting | None,
    folder: Path,
) -> tuple[list[ControlInput], list[dict[str, Any]]]:
    """The ControlNets of a command line, already open, and what is written about them into a picture.

    Writes the control pictures into ``folder``: ComfyUI's own edges differ from ours, and its crop may. That
    of ``tile`` is the picture that is enlarged, for now --init-image or nothing.

    Raises :class:`HyditError` for files that cannot be read or do not fit the model.
    """
    from ..weights.load import load_controlnet

    controls, facts = [], []
    given = zip(args.controlnet, opened, _weights(args), _kinds(args), strict=True)
    paths = iter(args.control_image * (len(args.controlnet) if len(args.control_image) == 1 else 1))
    for text, one, chosen, kind in given:
        path, scale = split_weight(text)
        net, _ = load_controlnet(one, dtype=pipe.dit.dtype, device=pipe.home, keep_quantised=True)
        check_fit(net.config, pipe.dit.config, str(path))
        fact: dict[str, Any] = {"controlnet": path.name, "scale": scale}
        if one.load_key is not None:
            fact["load_key"] = one.load_key
        if kind == "tile":
            hint = Image.new("RGB", (1, 1)) if init is None else enlarged(init, settings)
        elif part is not None and kind == "inpaint":
            hint, fact["image"] = part.control_picture(), args.init_image.name
        else:
            picture = next(paths)
            hint, fact["image"] = _picture(picture, kind, one, settings), picture.name
        values = [scale * value for value in chosen.resolve(net.config.num_controls)]
        controls.append(_control(args, net, hint, LayerWeights.parse(values)))
        if not 0 <= scale <= MAX_STRENGTH:
            fact["scale"], chosen = 1.0, controls[-1].weights
        fact |= {
            "preprocess": kind,
            "weights": str(chosen),
            "start": args.control_start,
            "end": args.control_end,
        }
        facts.append(fact)
    for control, fact in zip(controls, facts, strict=True):
        if "image" in fact:
            fact["picture"] = write_used(control.image, folder, Path(fact["image"]).stem, "control").name
    return controls, facts


def enlarged(picture: Image.Image, settings: SamplingDefaults) -> Image.Image:
    """The control picture of ``tile``: a picture in the size that is drawn, without detail."""
    return softened(Geometry.cover(picture.size, (settings.width, settings.height)).apply(picture))


def _picture(path: Path, kind: str, net: Bundle, settings: SamplingDefaults) -> Image.Image:
    """A control picture from a file, in the size that is drawn."""
    edges = kind == "canny"
    picture = load_picture(path) if edges else load_control(path)
    picture = Geometry.cover(picture.size, (settings.width, settings.height)).apply(picture)
    return canny(picture, _thresholds(net.source)) if edges else picture


def write_mask(mask: Image.Image, args: argparse.Namespace, folder: Path) -> Path:
    """Write the mask of ``--inpaint`` as it is used, for the workflow in the pictures."""
    source = args.init_image if args.inpaint == ALPHA else Path(args.inpaint)
    return write_used(mask, folder, source.stem, "mask")


def _control(args: argparse.Namespace, net: Any, hint: Image.Image, chosen: LayerWeights) -> ControlInput:
    return ControlInput(net.requires_grad_(False), hint, chosen, args.control_start, args.control_end)


def files(args: argparse.Namespace) -> list[Path]:
    """The ControlNets' files, in the order given."""
    return [split_weight(text)[0] for text in args.controlnet]


def write_used(picture: Image.Image, folder: Path, stem: str, what: str) -> Path:
    """Write what all of a run's pictures share as it was used, under a name not yet taken.

    ``what`` is a key of :data:`_USED`.
    """
    content = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
    # A name may have 255 bytes, but only 143 on encrypted file systems.
    stem = stem.encode()[:100].decode(errors="ignore")
    path = folder / f"{stem}-{what}-{content[:8]}.png"
    if not path.exists():
        file = io.BytesIO()
        picture.save(file, format="PNG")
        path = write_new(path, file.getvalue(), keep_same=True)
        print(f"{_USED[what]}: {path}", file=sys.stderr)
    return path


def _thresholds(source: TensorSource) -> tuple[int, int]:
    """Canny's: those that the ControlNet was trained with, if its file says so."""
    made = picture_facts(source)
    return (made["low"], made["high"]) if {"low", "high"} <= made.keys() else CANNY_THRESHOLDS
