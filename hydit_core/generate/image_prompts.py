"""The options of ``python -m hydit_core.generate`` for pictures as prompts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from PIL import Image

from ..embedded import embedded_ip_adapters
from ..errors import ConfigError
from ..image_prompts.run import (
    ImagePrompt,
    block_weights,
    check_adapter,
    check_encoder,
    check_mask,
    check_range,
)
from ..images import load_picture, probe
from ..layer_weights import CURVES, LayerWeights, check_count, read_each, split_weight
from .control import write_used

if TYPE_CHECKING:  # it brings transformers
    from ..facts import SamplingDefaults
    from ..image_prompts.encoder import ImageEncoder
    from ..model.ip_adapter import IPAdapter
    from ..pipeline import Pipeline

T = TypeVar("T")

MAX_WEIGHT = 10
"""HyDiTIPAdapterApply's limit, in both directions."""
_BLOCKS, _RANGE, _MASK = "--image-prompt-blocks", "--image-prompt-range", "--image-prompt-mask"


class Opened(NamedTuple):
    """Pictures and masks, and the networks: where they are, and themselves without weights."""

    adapter_place: Path
    load_key: str | None
    encoder_place: Path
    adapter: IPAdapter
    encoder: ImageEncoder
    pictures: list[Image.Image]
    masks: list[Image.Image]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group to a parser."""
    group = parser.add_argument_group("pictures as prompts")
    group.add_argument(
        "--image-prompt",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="a picture whose content and style the result takes up; may be given several times",
    )
    group.add_argument(
        "--ip-adapter",
        metavar="FILE",
        help="one of this model's size, as Tencent's ipa.pt; default: that of the embedded model",
    )
    group.add_argument(
        "--image-encoder",
        metavar="PATH",
        help="file or folder; default: the one in the IP-Adapter's file, or clip_img_encoder.pt beside it",
    )
    group.add_argument(
        _BLOCKS,
        action="append",
        default=[],
        metavar="WEIGHTS",
        help="factors on the weight for each block: a number, numbers with commas, a JSON file with a list, "
        f"or a curve: {', '.join(CURVES)}, each also with a number as in decay(0.9); once for all, or for "
        "each --image-prompt in their order",
    )
    group.add_argument(
        _RANGE,
        action="append",
        default=[],
        metavar="START:END",
        help="when it acts, from 0 (start) to 1 (end), as in 0:0.6; once for all, or for each",
    )
    group.add_argument(
        _MASK,
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="where it acts: a picture of the result's shape that is white there; once for all, or for each",
    )


def check(args: argparse.Namespace) -> None:
    """Refuse options that cannot work, before anything is opened. Raises :class:`ConfigError`."""
    count = len(args.image_prompt)
    if not count:
        names = (
            "ip_adapter",
            "image_encoder",
            "image_prompt_blocks",
            "image_prompt_range",
            "image_prompt_mask",
        )
        given = [name for name in names if getattr(args, name)]
        if given:
            raise ConfigError(f"--{given[0].replace('_', '-')} needs --image-prompt FILE")
        return
    args.ip_adapter = args.ip_adapter or _own_adapter(args)
    for text in args.image_prompt:
        path, weight = split_weight(text)
        if not abs(weight) <= MAX_WEIGHT:
            raise ConfigError(f"--image-prompt {path}: weight {weight:g}: use -{MAX_WEIGHT} to {MAX_WEIGHT}")
    _blocks(args)
    for option, values in ((_RANGE, args.image_prompt_range), (_MASK, args.image_prompt_mask)):
        check_count(len(values), option, count, "--image-prompt")
    for text in args.image_prompt_range:
        _range(text)


def _own_adapter(args: argparse.Namespace) -> str:
    """The IP-Adapter that comes with hydit, for the model that comes with it."""
    own = [] if args.model else embedded_ip_adapters()
    if not own:
        raise ConfigError("--image-prompt needs --ip-adapter FILE, such as Tencent's ipa.pt")
    return str(own[0])


def _blocks(args: argparse.Namespace) -> list[LayerWeights]:
    return read_each(args.image_prompt_blocks, _BLOCKS, len(args.image_prompt), "--image-prompt")


def _range(text: str) -> tuple[float, float]:
    start, colon, end = text.partition(":")
    try:
        values = float(start or 0), float(end or 1)
    except ValueError:
        colon = ""
    if not colon:
        raise ConfigError(f"{_RANGE} {text}: expected START:END, as in 0:0.6")
    check_range(*values)
    return values


def files(args: argparse.Namespace) -> list[Path]:
    """The pictures' files, in the order given."""
    return [split_weight(text)[0].expanduser() for text in args.image_prompt]


def inputs(args: argparse.Namespace) -> list[Path]:
    """All files that are read, but those of the networks."""
    return [*files(args), *args.image_prompt_mask]


def open_files(args: argparse.Namespace) -> Opened | None:
    """Open what the options name before the model is loaded, which takes longer.

    Raises :class:`HyditError` for files that are not what they should be.
    """
    if not args.image_prompt:
        return None
    from ..image_prompts.encoder import encoder_beside, load_image_encoder
    from ..weights import hub
    from ..weights.load import load_ip_adapter

    pictures = [load_picture(path) for path in files(args)]
    # What is transparent in a mask counts as black, as in --inpaint
    masks = [load_picture(path.expanduser(), "black").convert("L") for path in args.image_prompt_mask]
    given = Path(args.ip_adapter).expanduser()
    place = hub.local(given, ("ip_adapter",))
    # One that is in the model's file is taken from the same set of weights
    shared = args.model is not None and Path(args.model).expanduser() == given
    key = args.load_key if shared else None
    adapter = load_ip_adapter(place, device="meta", load_key=key)
    if args.image_encoder:
        eyes = hub.local(Path(args.image_encoder).expanduser(), ("vision",))
    else:
        eyes = encoder_beside(given)
    encoder = load_image_encoder(eyes, device="meta")
    check_encoder(encoder.config.embed_dim, adapter)
    return Opened(place, key, eyes, adapter, encoder, pictures, masks)


def read(
    args: argparse.Namespace,
    opened: Opened | None,
    pipe: Pipeline,
    settings: SamplingDefaults,
    folder: Path,
) -> tuple[list[ImagePrompt], list[dict[str, Any]]]:
    """The image prompts of a command line, and what is written about them into a picture.

    Writes masks, and pictures of which parts are transparent, into ``folder`` as they are used: ComfyUI reads
    them otherwise.

    Raises :class:`HyditError` for files that cannot be read or do not fit the model or the size.
    """
    if opened is None:
        return [], []
    from ..image_prompts.encoder import load_image_encoder
    from ..weights.load import load_ip_adapter

    check_adapter(opened.adapter, pipe.dit.config, str(opened.adapter_place))
    for path, mask in zip(args.image_prompt_mask, opened.masks, strict=True):
        check_mask(mask, (settings.width, settings.height), f"{_MASK} {path}")
    blocks = _blocks(args) or [LayerWeights()]
    for one in blocks:
        block_weights(one, pipe.dit.config.depth)
    adapter = load_ip_adapter(
        opened.adapter_place, dtype=pipe.dit.dtype, device=pipe.home, load_key=opened.load_key
    )
    encoder = load_image_encoder(opened.encoder_place, dtype=encoder_dtype(pipe.device), device=pipe.home)
    prompts, facts = [], []
    for index, text in enumerate(args.image_prompt):
        path = split_weight(text)[0].expanduser()
        start, end = _range(_of(args.image_prompt_range or ["0:1"], index))
        prompt = ImagePrompt(
            adapter.requires_grad_(False),
            encoder,
            opened.pictures[index],
            split_weight(text)[1],
            _of(blocks, index),
            start,
            end,
            _of(opened.masks or [None], index),
        )
        fact: dict[str, Any] = {
            "ip_adapter": opened.adapter_place.name,
            "image_encoder": opened.encoder_place.name,
            "image": path.name,
            "weight": prompt.weight,
            "blocks": str(prompt.blocks),
            "start": start,
            "end": end,
        }
        if probe(path).transparent:
            fact["picture"] = write_used(prompt.image, folder, path.stem, "prompt").name
        if prompt.mask is not None:
            mask = _of(args.image_prompt_mask, index)
            fact["mask"] = mask.name
            fact["mask_picture"] = write_used(prompt.mask, folder, mask.stem, "mask").name
        prompts.append(prompt)
        facts.append(fact)
    return prompts, facts


def networks(opened: Opened | None) -> dict[str, Path]:
    """Where the networks are, for :func:`~..pictures.redraw.redraw`."""
    if opened is None:
        return {}
    return {"ip_adapter": opened.adapter_place, "image_encoder": opened.encoder_place}


def encoder_dtype(device: torch.device) -> torch.dtype:
    """Half as much memory on GPUs; everywhere else float32, in which Tencent encodes pictures."""
    return torch.float16 if device.type == "cuda" else torch.float32


def _of(values: Sequence[T], index: int) -> T:
    """What is given for each, or once for all."""
    return values[index if len(values) > 1 else 0]
