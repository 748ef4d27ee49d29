"""The latent format of a HunyuanDiT: the latents' scale, and previews before they are decoded."""

from __future__ import annotations

import logging

import comfy.latent_formats
import torch

from ...hydit_core.facts import ModelInfo

log = logging.getLogger(__name__)


class HyDiTLatentFormat(comfy.latent_formats.SDXL):
    """SDXL's latents, which HunyuanDiT was trained on, except where the model's file says otherwise.

    A model with its own VAE has its own preview colors, and no TAESD fits it.
    """

    def __init__(self, info: ModelInfo) -> None:
        super().__init__()
        self.scale_factor: float = info.vae.get("scaling_factor", comfy.latent_formats.SDXL.scale_factor)
        self.shift_factor: float = info.vae.get("shift_factor", 0.0)
        rows = info.vae.get("preview_rgb")
        if rows is None:
            return
        self.taesd_decoder_name = None
        channels = self.latent_channels
        if len(rows) not in (channels, channels + 1) or any(len(row) != 3 for row in rows):
            log.warning(
                "the model's preview_rgb is not %d or %d rows of 3: no preview colors", channels, channels + 1
            )
            self.latent_rgb_factors = self.latent_rgb_factors_bias = None
            return
        self.latent_rgb_factors = rows[:channels]
        self.latent_rgb_factors_bias = rows[channels] if len(rows) > channels else None

    def process_in(self, latent: torch.Tensor) -> torch.Tensor:
        return (latent - self.shift_factor) * self.scale_factor

    def process_out(self, latent: torch.Tensor) -> torch.Tensor:
        return latent / self.scale_factor + self.shift_factor


def latent_format(info: ModelInfo) -> HyDiTLatentFormat:
    """The format of ``info``'s latents: scale, shift, and the colors of previews."""
    return HyDiTLatentFormat(info)
