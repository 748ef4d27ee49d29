"""Masks of the loss: which places of a picture count, after the same crop and flip as the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import DataError
from .config import SIZE_MULTIPLE, MaskConfig, Size
from .images import Geometry, load_alpha, load_picture
from .manifest import Manifest
from .sources import PictureFile

_ASPECT = 0.02
"""How far the aspect ratios of a mask and its picture may differ: rounding of a smaller mask's sides."""


class MaskImages:
    """Makes the masks of a run, as configured. Can be pickled to worker processes."""

    def __init__(self, config: MaskConfig) -> None:
        self.config = config

    def make(self, manifest: Manifest, row: int, geometry: Geometry, content: bytes | None) -> torch.Tensor:
        """What each latent of a picture counts: (1, H/8, W/8) float32 in [``outside``, 1].

        ``content`` is the picture's file, if it has been read already. Raises :class:`DataError` naming the
        mask that cannot be read.
        """
        mask = self._picture(manifest, row, content)
        width, height = (side // SIZE_MULTIPLE for side in geometry.size)
        if mask is None:
            return torch.ones(1, height, width)
        small = geometry.apply(mask).reduce(SIZE_MULTIPLE)
        inside = torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)[None]
        return self.config.outside + (1 - self.config.outside) * inside

    def _picture(self, manifest: Manifest, row: int, content: bytes | None) -> Image.Image | None:
        if self.config.kind == "alpha":
            file = manifest.picture(row)
            return load_alpha(file.read() if content is None else content, name=str(file))
        path = manifest.extra(row).get("mask")
        if path is None:
            return None
        # What is transparent in a mask is outside, as what is black.
        mask = load_picture(PictureFile(Path(path)).read(), "black", name=path).convert("L")
        _check_shape(mask.size, manifest.size(row), path)
        return mask


def _check_shape(mask: Size, picture: Size, path: str) -> None:
    """A mask may be smaller or larger than its picture, but a stretched one is another picture's."""
    if abs(mask[0] * picture[1] - mask[1] * picture[0]) > _ASPECT * mask[0] * picture[1]:
        raise DataError(
            f"mask {path} is {mask[0]}x{mask[1]}, its picture {picture[0]}x{picture[1]}: "
            "they must have the same shape"
        )
