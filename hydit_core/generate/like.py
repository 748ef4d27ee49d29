"""``--like PICTURE``: the settings that a picture remembers, in place of options that are not given."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from ..embedded import embedded_model
from ..errors import ConfigError, DataError
from ..images import parse_size
from ..pictures.png import read_parameters
from .options import parser

_TAKEN = (
    "negative", "steps", "cfg", "guidance_rescale", "sampler", "spacing", "forecast", "cfg_end", "seed",
    "dtype", "load_key",
)  # fmt: skip
# What else a picture can be made with, and the options that say so: its files are not in the picture.
_BESIDE = {
    "init_image": "--init-image",
    "inpaint": "--inpaint",
    "upscale": "--upscale",
    "loras": "--lora",
    "controls": "--controlnet",
    "image_prompts": "--image-prompt",
}
FIRST_EDITION = "hydit icons 128, first edition"
"""What the model that came with hydit is called in pictures that tell no title."""


def add_argument(options: argparse.ArgumentParser) -> None:
    options.add_argument(
        "--like",
        type=Path,
        metavar="PICTURE",
        help="draw what this PNG of ours remembers, in so far as no other option says otherwise",
    )


class Like:
    """The facts of the picture that ``--like`` names.

    Raises :class:`DataError` if it is no picture of ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts = read_parameters(path)

    def filled(self, args: argparse.Namespace, argv: Sequence[str]) -> argparse.Namespace:
        """``args``, which ``argv`` gave, and the picture's settings for what ``argv`` does not say.

        Raises:
            DataError: a setting of the picture is impossible.
            ConfigError: it was drawn with another model than the embedded one, and none is given; or a table
                of prompts is drawn.
        """
        if args.shard_size is not None:
            raise ConfigError("--like: not with --shard-size, whose prompts and settings are its own")
        if args.model is None and self.facts.get("model") not in (embedded_model().name, None):
            raise ConfigError(
                f"{self.path}: drawn with {self.facts['model']}, which is not the model that comes with "
                "hydit: give it with --model PATH"
            )
        remembered = [
            f"--{name.replace('_', '-')}={self.facts[name]}" for name in _TAKEN if name in self.facts
        ]
        if {"width", "height"} <= self.facts.keys():
            remembered.append(f"--size={self._size()}")
        if not args.prompt and args.prompts is None:
            remembered.append(f"--prompt={self.facts.get('prompt', '')}")
        if args.init_image is not None and "strength" in self.facts:
            remembered.append(f"--strength={self.facts['strength']}")
        self._strict().parse_args(remembered)
        options = parser()
        add_argument(options)
        return options.parse_args([*remembered, *argv])

    def _size(self) -> str:
        """What is drawn is never larger than the picture, which no text can make larger than it is."""
        said = f"{self.facts['width']}x{self.facts['height']}"
        with Image.open(self.path) as picture:
            width, height = picture.size
        try:
            fits = all(side <= there for side, there in zip(parse_size(said), (width, height), strict=True))
        except ValueError as error:
            raise DataError(f"{self.path}: its settings are impossible: {error}") from None
        if not fits:
            raise DataError(f"{self.path}: its settings say {said}, but the picture is {width}x{height}")
        return said

    def _strict(self) -> argparse.ArgumentParser:
        """The options of ``generate`` for what the picture says: any fault is the picture's."""
        path = self.path

        class Strict(argparse.ArgumentParser):
            def error(self, message: str) -> NoReturn:
                raise DataError(f"{path}: its settings are impossible: {message}")

        return parser(Strict)

    def notes(self, args: argparse.Namespace, title: str) -> list[str]:
        """Why the result can be another picture; ``title`` is that of the model which draws now."""
        said = []
        then = self.facts.get("title") or (FIRST_EDITION if args.model is None else "")
        if then and then != title:
            said.append(
                f"{self.path} was drawn with {then}; the model is {title or 'another one'} now, "
                "which draws another picture"
            )
        missing = [
            option for fact, option in _BESIDE.items() if fact in self.facts and not _given(args, option)
        ]
        if missing:
            said.append(
                f"{self.path} was drawn with more than settings: give {', '.join(missing)} "
                "for the same picture"
            )
        return said


def _given(args: argparse.Namespace, option: str) -> bool:
    value: Any = getattr(args, option.removeprefix("--").replace("-", "_"), None)
    return value is not None and value != []
