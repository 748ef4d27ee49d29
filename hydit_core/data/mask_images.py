"""Masks of the loss: which places of a picture count, after the same crop and flip as the picture."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from ..images import SIZE_MULTIPLE, Geometry, check_shape, load_alpha, load_picture
from .config import MaskConfig
from .manifest import Manifest


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
            own = manifest.picture(row)
            return load_alpha(own.read() if content is None else content, name=str(own))
        file = manifest.extra(row).get("mask")
        if file is None:
            return None
        # What is transparent in a mask is outside, as what is black.
        mask = load_picture(file.read(), "black", name=str(file)).convert("L")
        check_shape(f"mask {file}", mask.size, manifest.size(row))
        return mask
