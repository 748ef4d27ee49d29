"""Drawing a part of a picture: at every step the rest is what it was, with as much noise as the step has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Known:
    """The part of a picture that stays, as in ComfyUI's inpainting and blended latent diffusion (Avrahami et
    al. 2022).

    The network is shown ``latents + sigma * noise`` there, with one noise for the whole run, and its answer
    there is replaced by ``latents``. So any sampler ends with them, whatever it does to x between.

    Args:
        latents: clean and scaled, (1 or B, C, h, w).
        noise: that the run starts from, (B, C, h, w), unit variance.
        mask: (1 or B, 1, h, w), 1 where the picture is drawn, 0 where it stays.
    """

    latents: Tensor
    noise: Tensor
    mask: Tensor

    def kept(self, model: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A denoiser that draws with ``model`` where the mask is, and answers ``latents`` elsewhere."""

        def denoise(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
            # One number for all rows: reading it must not make the host wait, as sigma is there.
            level = float(sigma.flatten()[0])
            noised = self.latents + level * self.noise
            denoised = model(x * self.mask + noised * (1 - self.mask), sigma, **extra)
            return denoised * self.mask + self.latents * (1 - self.mask)

        return denoise
