"""Prompt pictures of an IP-Adapter in training: which picture, and in which of several views."""

from __future__ import annotations

from PIL import Image, ImageOps
from torch import Tensor

from ..image_prompts.pixels import encoder_pixels
from ..images import load_picture
from .config import ImagePromptConfig
from .manifest import Manifest
from .order import uniform
from .sources import PictureFile


class PromptImages:
    """Makes the pictures that an image encoder sees. Can be pickled to worker processes.

    ``side`` is that of the encoder's square pictures, in pixels.
    """

    def __init__(self, config: ImagePromptConfig, side: int, *, alpha_color: str = "white") -> None:
        self.config = config
        self.side = side
        self.alpha_color = alpha_color

    @property
    def recipe(self) -> str:
        """Part of the key of cached embeddings: everything but the file and the number of its view."""
        config = self.config
        return f"prompt 1: {self.side} {config.views} {config.least} {config.flip} {self.alpha_color}"

    def file(self, manifest: Manifest, row: int) -> PictureFile:
        """The file of a row's prompt picture: its own, or the picture itself."""
        return manifest.extra(row).get("image_prompt") or manifest.picture(row)

    def make(self, file: PictureFile, view: int, *, loaded: Image.Image | None = None) -> Tensor:
        """(3, side, side) of one view, as the encoder takes it; ``loaded`` is the picture, if it was read.

        Raises :class:`DataError` naming the file if it cannot be read.
        """
        picture = loaded or load_picture(file.read(), self.alpha_color, name=str(file))
        return encoder_pixels(self.view(picture, view), self.side)

    def view(self, picture: Image.Image, number: int) -> Image.Image:
        """View 0 is the whole picture; the others show a part of it, some of them mirrored."""
        if number == 0:
            return picture
        config = self.config
        shares = [config.least + (1 - config.least) * uniform(number, f"share {i}") for i in range(2)]
        sizes = [max(1, round(share * side)) for share, side in zip(shares, picture.size, strict=True)]
        left, top = (
            int(uniform(number, f"place {i}") * (side - size + 1))
            for i, (side, size) in enumerate(zip(picture.size, sizes, strict=True))
        )
        part = picture.crop((left, top, left + sizes[0], top + sizes[1]))
        mirrored = number * config.flip % 1 + config.flip >= 1  # evenly spread over the numbers
        return ImageOps.mirror(part) if mirrored else part
