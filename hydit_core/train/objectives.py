"""What is trained and how a batch becomes a loss. One class an objective; the loop knows none of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..control import CONTROL_KEY
from ..data.dataset import Batch
from ..diffusion.losses import LossTerms, diffusion_loss
from ..diffusion.schedule import Schedule
from ..model.controlnet import ControlNet
from ..model.dit import DiT
from ..text.encoders import TextEncoders
from ..text.features import TextFeatures
from ..weights.save import save_checkpoint
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
    export_name: str
    """The file that :meth:`export` writes, in the run's folder."""
    start_key: str
    """The key of the configuration that starts a new run from such a file."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that may be trained, by name; the names are those of the checkpoints."""
        ...

    def latent_shape(self, batch: Batch) -> tuple[int, int, int]:
        """(C, h, w) of one sample's latents."""
        ...

    def inputs(self, batch: Batch, draws: Draws) -> dict[str, Any]:
        """Arguments of ``module``, on its device."""
        ...

    def use_checkpointing(self, fraction: float) -> None:
        """Compute the activations of this fraction of the blocks again in the backward pass."""
        ...

    def check_resumable(self, before: dict[str, Any]) -> None:
        """Raise ConfigError if a run with the configuration ``before`` cannot be continued with this one.

        Weights and optimizer are compared elsewhere: this is about what gives them another meaning.
        """
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
        self,
        latents: Tensor,
        noise: Tensor,
        t: Tensor,
        text: Any,
        image_meta_size: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> LossTerms:
        """Losses (B,) of clean latents (B, C, h, w), their noise and timesteps t (B,).

        ``text`` is tokens if the text encoders are trained, else features; ``mask`` (B, 1, h, w) says what
        each latent counts.
        """
        features = text if self.text is None else self.text(text)
        bert, t5 = (_to_compute_dtype(f) for f in (features.bert, features.t5))
        context = self.dit.encode_context(
            bert, features.bert_mask, t5, features.t5_mask, image_meta_size=image_meta_size
        )
        output = self.dit(self.schedule.add_noise(latents, noise, t), t, context)
        return _losses(output, latents, noise, t, self.schedule, self.config, mask)


class ControlModule(nn.Module):
    """A ControlNet in training before a frozen DiT: from latents, text features and hint to losses."""

    def __init__(
        self, dit: DiT, controlnet: ControlNet, schedule: Schedule, config: ObjectiveSection
    ) -> None:
        super().__init__()
        self.dit = dit
        self.controlnet = controlnet
        self.schedule = schedule
        self.config = config

    def train(self, mode: bool = True) -> ControlModule:
        """As ever, but the frozen base stays in eval mode."""
        super().train(mode)
        self.dit.eval()
        return self

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        t: Tensor,
        text: TextFeatures,
        hint: Tensor,
        image_meta_size: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> LossTerms:
        """Losses (B,) of clean latents and hint latents, both (B, C, h, w), noise and timesteps t (B,).

        Gradients flow through the DiT's later blocks to the residuals; its weights get none.
        """
        bert, t5 = (_to_compute_dtype(f) for f in (text.bert, text.t5))
        with torch.no_grad():  # text projections are frozen in both networks
            base, own = (
                net.encode_context(bert, text.bert_mask, t5, text.t5_mask, image_meta_size=image_meta_size)
                for net in (self.dit, self.controlnet)
            )
        x_t = self.schedule.add_noise(latents, noise, t)
        output = self.dit(x_t, t, base, self.controlnet(x_t, t, own, hint))
        return _losses(output, latents, noise, t, self.schedule, self.config, mask)


def _losses(
    output: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    schedule: Schedule,
    config: ObjectiveSection,
    mask: Tensor | None,
) -> LossTerms:
    with torch.autocast(latents.device.type, enabled=False):
        return diffusion_loss(
            output,
            latents,
            noise,
            t,
            schedule,
            weighting=config.weighting,
            snr_gamma=config.snr_gamma,
            vlb=config.vlb,
            mask=mask,
        )


def _to_compute_dtype(features: Tensor) -> Tensor:
    """Features in autocast's dtype, cast once here instead of in every block."""
    kind = features.device.type
    return features.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else features


class DiffusionObjective:
    """From a batch to a module's inputs; subclasses choose the module and what of it is trained."""

    module: nn.Module
    export_name = "model.safetensors"
    start_key = "model.init_from"

    def __init__(
        self,
        parts: ModelParts,
        config: ObjectiveSection,
        device: torch.device,
        *,
        trains_text: bool | None = None,
    ) -> None:
        self.parts = parts
        self.device = device
        self.schedule = Schedule(parts.info.diffusion)
        self.module = self._module(config).to(device)
        self.module.train()
        trained = config.train_text_encoders if trains_text is None else trains_text
        if not trained and parts.stored_text is None:
            parts.text.to(device)
        self.text = TextSource(parts.text, device, trained=trained, stored=parts.stored_text)

    def _module(self, config: ObjectiveSection) -> nn.Module:
        raise NotImplementedError

    def use_checkpointing(self, fraction: float) -> None:
        self.parts.dit.gradient_checkpointing = fraction

    def check_resumable(self, before: dict[str, Any]) -> None:
        pass

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
        latents = self._latents(batch, draws.posterior_noise)
        inputs = {
            "latents": latents,
            "noise": draws.noise.to(self.device, non_blocking=True),
            "t": draws.t.to(self.device, non_blocking=True),
            "text": self.text(bert, t5),
        }
        if self.parts.dit.config.size_cond:
            inputs["image_meta_size"] = _sizes(batch).to(self.device, non_blocking=True)
        if batch.mask is not None:
            mask, size = batch.mask.to(self.device, non_blocking=True), latents.shape[-2:]
            inputs["mask"] = functional.interpolate(mask, size=tuple(size), mode="area")
        return inputs

    def _latents(self, batch: Batch, posterior_noise: Tensor) -> Tensor:
        if batch.moments is not None:
            return self._sampled(batch.moments, posterior_noise)
        if batch.pixels is None:
            raise ValueError("a batch needs pixels or moments")
        return self._sampled(self._moments(batch.pixels), posterior_noise)

    @torch.no_grad()
    def _moments(self, pixels: Tensor) -> Tensor:
        return self.parts.vae.to(self.device).encode_moments(pixels.to(self.device, non_blocking=True))

    @torch.no_grad()
    def _sampled(self, moments: Tensor, posterior_noise: Tensor) -> Tensor:
        """Scaled latents from the VAE's posterior; its mean where the noise is 0."""
        mean, log_variance = moments.to(self.device, torch.float32, non_blocking=True).chunk(2, dim=1)
        deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        latents = mean + deviation * posterior_noise.to(self.device, non_blocking=True)
        return (latents - self.parts.vae.shift_factor) * self.parts.vae.scaling_factor


class FullObjective(DiffusionObjective):
    """All parameters of the DiT and, if configured, of the text encoders."""

    def _module(self, config: ObjectiveSection) -> nn.Module:
        trained = self.parts.text if config.train_text_encoders else None
        return DiffusionModule(self.parts.dit, trained, self.schedule, config)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def export(self, path: Path, *, dtype: torch.dtype, all_in_one: bool, extra: dict[str, str]) -> None:
        self.parts.save(path, dtype=dtype, all_in_one=all_in_one, extra=extra)


class ControlNetObjective(DiffusionObjective):
    """The blocks and the added projections of a ControlNet; its other parts stay those of the base.

    ``control`` says how the control pictures are made, for the metadata of the file.
    """

    start_key = "objective.controlnet"

    def __init__(
        self,
        parts: ModelParts,
        config: ObjectiveSection,
        device: torch.device,
        *,
        control: dict[str, Any],
    ) -> None:
        if parts.controlnet is None:
            raise ValueError("the parts hold no ControlNet")
        self.controlnet = parts.controlnet
        self.control = control
        super().__init__(parts, config, device)
        self.module.requires_grad_(False)
        for parameter in self.parameters().values():
            parameter.requires_grad_(True)

    def _module(self, config: ObjectiveSection) -> nn.Module:
        return ControlModule(self.parts.dit, self.controlnet, self.schedule, config)

    def parameters(self) -> dict[str, nn.Parameter]:
        return control_parameters(self.controlnet)

    def use_checkpointing(self, fraction: float) -> None:
        super().use_checkpointing(fraction)
        self.controlnet.gradient_checkpointing = fraction

    def inputs(self, batch: Batch, draws: Draws) -> dict[str, Any]:
        if batch.control is None:
            raise ValueError("a batch needs control pictures")
        inputs = super().inputs(batch, draws)
        moments = batch.control if batch.moments is not None else self._moments(batch.control)
        # Mode, not a sample: what generate and the nodes do.
        hint = self._sampled(moments, torch.zeros_like(draws.posterior_noise))
        dropped = torch.tensor(draws.drop_control).to(hint.device, non_blocking=True)
        inputs["hint"] = hint.masked_fill(dropped[:, None, None, None], 0.0)
        return inputs

    def export(self, path: Path, *, dtype: torch.dtype, all_in_one: bool, extra: dict[str, str]) -> None:
        """The ControlNet in Tencent's layout; there is nothing that could be put in one file with it."""
        metadata = {**extra, CONTROL_KEY: json.dumps(self.control)}
        save_checkpoint(
            path, dit=self.controlnet.state_dict(), info=self.parts.info, dtype=dtype, metadata=metadata
        )


def control_parameters(controlnet: ControlNet) -> dict[str, nn.Parameter]:
    """What of a ControlNet is trained: the blocks and the added projections (Tencent/HunyuanDiT)."""
    trained = ("blocks.", "before_proj.", "after_proj_list.")
    named = controlnet.named_parameters()
    return {f"controlnet.{name}": p for name, p in named if name.startswith(trained)}


def _sizes(batch: Batch) -> Tensor:
    """The size condition of v1.1 and older: (B, 6) original, trained size (W, H), crop (left, top)."""
    size = torch.tensor(batch.size).expand(len(batch), 2)
    return torch.cat([batch.original_sizes, size, batch.crops], dim=1).float()
