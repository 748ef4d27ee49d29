"""Which latents a run trains on: drawn from the VAE's posterior, or its mean.

Where the posterior is narrow that makes no difference. Where it is wide, sampling adds noise that no DiT can
predict, and ruins one that was trained on the means. So ``data.posterior = "auto"`` follows the base's file;
if that says nothing, the VAE is measured on the run's own pictures.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..data.dataset import TrainData
from ..facts import ModelInfo
from ..vae import VAE
from ..weights.bundle import bundle
from .config import TrainConfig

WIDE = 0.1
"""Fraction of a channel's spread above which a posterior counts as wide: noise of 1 % of its variance."""

_PICTURES = 4
_SIDE = 128
"""Pixels. The result hardly depends on the size; the time does."""


class Choice(NamedTuple):
    """``kind`` of latents, and why."""

    kind: Literal["sample", "mode"]
    reason: str

    @property
    def line(self) -> str:
        """For the terminal."""
        what = "drawn from" if self.kind == "sample" else "the mean of"
        return f"latents: {what} the VAE's posterior, {self.reason}"


def choose(config: TrainConfig, info: ModelInfo, data: TrainData, vae: VAE) -> Choice:
    """What ``data.posterior`` means for this run; ``info`` is what the base's file says.

    The same on every process, and with and without cached latents up to a hair's breadth. Moves ``vae``
    nowhere.
    """
    wanted = config.data.posterior
    said: Literal["", "sample", "mode"] = info.posterior if _same_vae(config) else ""
    if wanted != "auto":
        other = f", though the base was trained with {said!r}" if said not in ("", wanted) else ""
        return Choice(wanted, f"as configured{other}")
    if said == "sample" or said == "mode":
        return Choice(said, "as the base was trained")
    moments = list(data.some_moments(lambda pixels: _encode(vae, pixels), _PICTURES, _SIDE))
    if not moments:
        return Choice("sample", "no picture could be measured")
    widths = posterior_widths(moments)
    channel = int(widths.argmax())
    width = float(widths[channel])
    kind: Literal["sample", "mode"] = "mode" if width > WIDE else "sample"
    which = "wide" if kind == "mode" else "narrow"
    return Choice(
        kind,
        f"which is {which}: up to {width:.2g} times the latents' spread (channel {channel}; limit {WIDE:g})",
    )


def posterior_widths(moments: list[Tensor]) -> Tensor:
    """(C,) the posterior's deviation over that of its means; ``moments`` are (2 C, h, w), of any sizes."""
    values = torch.cat([one.double().flatten(1) for one in moments], dim=1)  # (2 C, pixels)
    means, log_variances = values.chunk(2)
    deviation = log_variances.clamp(-30.0, 20.0).exp().mean(1).sqrt()
    return deviation / means.std(1).clamp_min(1e-12)


@torch.no_grad()
def _encode(vae: VAE, pixels: Tensor) -> Tensor:
    return vae.encode_moments(pixels[None])[0].cpu()


def _same_vae(config: TrainConfig) -> bool:
    """Whether the VAE is the one that the base was trained with, as far as its file can know."""
    model = config.model
    if model.init_from is None:
        return False
    if model.vae is None:
        return True
    return bundle(model.init_from, only=("dit", "vae"), load_key=model.load_key).vae is None
