"""What is trained and how a batch becomes a loss. One class an objective; the loop knows none of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..data import Batch
from ..diffusion.losses import LossTerms, diffusion_loss
from ..diffusion.schedule import Schedule
from ..model.dit import DiT
from ..text import TextEncoders, TextFeatures
from .conditioning import TextSource
from .config import ObjectiveSection
from .draws import Draws
from .parts import ModelParts


class Objective(Protocol):
    """What the training loop needs to know.

    ``module`` is the one module that is wrapped for several processes: everything that receives
    gradients is used inside its forward, which takes :meth:`inputs` and returns the losses.
    """

    module: nn.Module
    parts: ModelParts
    schedule: Schedule

    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that may be trained, by name; the names are those of the checkpoints."""
        ...

    def latent_shape(self, batch: Batch) -> tuple[int, int, int]:
        """(C, h, w) of one sample's latents."""
        ...

    def inputs(self, batch: Batch, draws: Draws) -> dict[str, Any]:
        """Arguments of ``module``, on its device."""
        ...

    def export(self, path: Path, *, dtype: torch.dtype, all_in_one: bool, extra: dict[str, str]) -> None:
        """Write the file that ``generate`` and the nodes take."""
        ...


class DiffusionModule(nn.Module):
    """DiT and, where they are trained too, the text encoders: from latents and text to losses."""

    def __init__(
        self, dit: DiT, text: TextEncoders | None, schedule: Schedule, config: ObjectiveSection
    ) -> None:
        super().__init__()
        self.dit = dit
        self.text = text
        self.schedule = schedule
        self.config = config

    def train(self, mode: bool = True) -> DiffusionModule:
        """As ever, but the text encoders' dropout stays off: sampling has none either."""
        super().train(mode)
        if self.text is not None:
            self.text.eval()
        return self

    def forward(
        self, latents: Tensor, noise: Tensor, t: Tensor, text: Any, image_meta_size: Tensor | None = None
    ) -> LossTerms:
        """Losses (B,) of clean latents (B, C, h, w), their noise and timesteps t (B,).

        ``text`` is tokens if the text encoders are trained, else features.
        """
        features = text if self.text is None else self.text(text)
        bert, t5 = (_to_compute_dtype(f) for f in (features.bert, features.t5))
        context = self.dit.encode_context(
            bert, features.bert_mask, t5, features.t5_mask, image_meta_size=image_meta_size
        )
        output = self.dit(self.schedule.add_noise(latents, noise, t), t, context)
        with torch.autocast(latents.device.type, enabled=False):
            return diffusion_loss(
                output,
                latents,
                noise,
                t,
                self.schedule,
                weighting=self.config.weighting,
                snr_gamma=self.config.snr_gamma,
                vlb=self.config.vlb,
            )


def _to_compute_dtype(features: Tensor) -> Tensor:
    """Features in autocast's dtype, cast once here instead of in every block."""
    kind = features.device.type
    return features.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else features


class FullObjective:
    """All parameters of the DiT and, if configured, of the text encoders."""

    def __init__(
        self,
        parts: ModelParts,
        config: ObjectiveSection,
        device: torch.device,
        *,
        stored_text: Callable[[str], TextFeatures] | None = None,
    ) -> None:
        self.parts = parts
        self.device = device
        trained = parts.text if config.train_text_encoders else None
        self.schedule = Schedule(parts.info.diffusion)
        self.module: nn.Module = DiffusionModule(parts.dit, trained, self.schedule, config).to(device)
        self.module.train()
        if trained is None and stored_text is None:
            parts.text.to(device)
        self.text = TextSource(parts.text, device, trained=trained is not None, stored=stored_text)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def latent_shape(self, batch: Batch) -> tuple[int, int, int]:
        if batch.moments is not None:
            channels, height, width = batch.moments.shape[1:]
            return channels // 2, height, width
        scale = self.parts.vae.downscale
        width, height = batch.size
        return self.parts.dit.config.in_channels, height // scale, width // scale

    def inputs(self, batch: Batch, draws: Draws) -> dict[str, Any]:
        bert = ["" if drop else c for c, drop in zip(batch.captions, draws.drop_bert, strict=True)]
        t5 = ["" if drop else c for c, drop in zip(batch.captions, draws.drop_t5, strict=True)]
        inputs = {
            "latents": self._latents(batch, draws.posterior_noise),
            "noise": draws.noise.to(self.device, non_blocking=True),
            "t": draws.t.to(self.device, non_blocking=True),
            "text": self.text(bert, t5),
        }
        if self.parts.dit.config.size_cond:
            inputs["image_meta_size"] = _sizes(batch).to(self.device, non_blocking=True)
        return inputs

    @torch.no_grad()
    def _latents(self, batch: Batch, posterior_noise: Tensor) -> Tensor:
        moments = batch.moments
        if moments is None:
            if batch.pixels is None:
                raise ValueError("a batch needs pixels or moments")
            moments = self.parts.vae.to(self.device).encode_moments(batch.pixels)
        mean, log_variance = moments.to(self.device, torch.float32, non_blocking=True).chunk(2, dim=1)
        deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        latents = mean + deviation * posterior_noise.to(self.device, non_blocking=True)
        return (latents - self.parts.vae.shift_factor) * self.parts.vae.scaling_factor

    def export(self, path: Path, *, dtype: torch.dtype, all_in_one: bool, extra: dict[str, str]) -> None:
        self.parts.save(path, dtype=dtype, all_in_one=all_in_one, extra=extra)


def _sizes(batch: Batch) -> Tensor:
    """The size condition of v1.1 and older: (B, 6) original, trained size (W, H), crop (left, top)."""
    size = torch.tensor(batch.size).expand(len(batch), 2)
    return torch.cat([batch.original_sizes, size, batch.crops], dim=1).float()
