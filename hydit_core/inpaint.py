"""Redrawing a part of a picture: the mask for pixels and for latents, and what stays as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from .errors import ConfigError, DataError
from .images import SIZE_MULTIPLE, Geometry, Size, check_shape, load_alpha, load_picture, to_tensor

ALPHA = "alpha"
"""Instead of a mask's file: what is transparent in the picture itself is redrawn."""
MAX_FEATHER = 256
"""Pixels."""


class Inpainting:
    """A picture and what of it is redrawn, both fitted to the size that is drawn.

    A pixel of which the mask says anything but 0 may change; a latent is redrawn as a whole if any of its
    pixels may. All other pixels of a result are the fitted picture's, bit for bit.

    Args:
        picture: RGB.
        mask: 8-bit gray, of any size with the picture's proportions: white is redrawn, black stays, gray
            blends the two.
        size: (width, height) of the result, in pixels.
        feather: about so many pixels, to both sides, over which the mask's edge is made soft.
        multiple: side of a picture divided by the side of its latents.
        name: of the mask, for errors.

    Attributes:
        picture, mask: fitted to ``size``.
        latents: (1, 1, h, w), 1 where a latent is redrawn, else 0.

    Raises:
        DataError: the mask is of another shape, or nothing of it is white.
        ConfigError: ``feather`` is out of range.
    """

    def __init__(
        self,
        picture: Image.Image,
        mask: Image.Image,
        size: Size,
        *,
        feather: float = 0,
        multiple: int = SIZE_MULTIPLE,
        name: str = "the mask",
    ) -> None:
        check_feather(feather)
        check_shape(name, mask.size, picture.size)
        geometry = Geometry.cut(picture.size, size)
        self.picture = geometry.apply(picture)
        # Not resampled as pictures are: that would leave ripples beside an edge.
        mask = mask.convert("L").resize(geometry.resized, Image.Resampling.BILINEAR)
        mask = geometry.apply(mask)
        self.mask = mask.filter(ImageFilter.GaussianBlur(feather / 2)) if feather else mask
        values = torch.from_numpy(np.array(self.mask))[None, None]
        if not values.any():
            raise DataError(f"{name}: nothing of it is white, so nothing would be redrawn")
        self.latents = torch.nn.functional.max_pool2d((values > 0).float(), multiple)
        self._share = values[0].float() / 255

    @property
    def covers_all(self) -> bool:
        """Whether nothing of the picture stays."""
        return bool(self.latents.all())

    def composed(self, pixels: Tensor) -> Tensor:
        """A drawn picture (3, H, W) in 0..1, with the original where the mask is black."""
        original = (to_tensor(self.picture) + 1) / 2
        return torch.where(self._share > 0, pixels * self._share + original * (1 - self._share), original)

    def control_picture(self) -> Image.Image:
        """The picture with black where it is redrawn: what inpaint ControlNets for HunyuanDiT follow.

        So TTPlanet's preprocessor for them makes it (TTPlanetPig/Comfyui_TTP_CN_Preprocessor).
        """
        return Image.composite(Image.new("RGB", self.picture.size), self.picture, self.mask)


def own_size(original: Size) -> Size:
    """The largest size that can be drawn without scaling a picture."""
    width, height = (max(2, side // SIZE_MULTIPLE) * SIZE_MULTIPLE for side in original)
    return width, height


def load_mask(source: str | Path, picture: Path) -> Image.Image:
    """A mask as 8-bit gray: of a file, or with :data:`ALPHA` what is transparent in ``picture``.

    What is transparent in a mask's file counts as black. Raises :class:`DataError` for a file that cannot be
    read, or a picture without transparent parts.
    """
    if str(source) != ALPHA:
        return load_picture(Path(source), "black").convert("L")
    alpha = load_alpha(picture)
    if alpha is None:
        raise DataError(
            f"{picture} has no transparent part to redraw: erase a part of it, or give a mask as a file"
        )
    return alpha.point(lambda value: 255 - value)


def check_feather(feather: float) -> None:
    """Raise ConfigError unless ``feather`` is a possible number of pixels."""
    if not 0 <= feather <= MAX_FEATHER:
        raise ConfigError(f"feather {feather:g}: use 0 (a hard edge) to {MAX_FEATHER} pixels")
