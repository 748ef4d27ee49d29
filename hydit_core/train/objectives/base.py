"""What is trained and how a batch becomes a loss: what all objectives share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...data.dataset import Batch
from ...data.section import Section
from ...diffusion.losses import LossTerms, diffusion_loss
from ...diffusion.schedule import Schedule
from ...facts import DiffusionConfig
from ...model.attention import AttentionFn
from ...model.config import DiTConfig
from ...model.dit import DiT
from ...text.features import TextFeatures
from ..conditioning import TextSource
from ..draws import Draws
from ..networks import ModelParts
from ..sections import ObjectiveSection, TrainSections

if TYPE_CHECKING:  # it brings transformers, which a configuration is checked without
    from ...text.encoders import TextEncoders

AnyConfig = TypeVar("AnyConfig", bound=TrainSections)
T = TypeVar("T")


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

    def fixed_in_export(self) -> list[nn.Parameter]:
        """What the exported file holds of the module besides :meth:`parameters`."""
        ...

    def export(self, path: Path, *, dtype: torch.dtype, all_in_one: bool, extra: dict[str, str]) -> None:
        """Write the file that ``generate`` and the nodes take, of what ``parts.whole`` gives."""
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
        """As usual, but the text encoders' dropout stays off: sampling has none either."""
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
        **conditions: Tensor,
    ) -> LossTerms:
        """Losses (B,) of clean latents (B, C, h, w), their noise and timesteps t (B,).

        ``text`` is tokens if the text encoders are trained, else features; ``mask`` (B, 1, h, w) weights
        the latents in the loss; ``conditions`` are what :meth:`predict` takes besides.
        """
        features = text if self.text is None else self.text(text)
        contexts = self.contexts(in_compute_dtype(features), image_meta_size)
        output = self.predict(self.schedule.add_noise(latents, noise, t), t, contexts, **conditions)
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
                mask=mask,
            )

    def contexts(self, text: TextFeatures, image_meta_size: Tensor | None) -> Any:
        """What the networks take from the text; ``image_meta_size`` is (B, 6)."""
        return self.dit.encode_context(
            text.bert, text.bert_mask, text.t5, text.t5_mask, image_meta_size=image_meta_size
        )

    def drawing(self, draw: Callable[[], T]) -> T:
        """What ``draw`` returns, which calls networks of this module by themselves.

        Where their weights are split over processes, this is a forward of the module like any other.
        """
        return draw()

    def predict(self, x_t: Tensor, t: Tensor, contexts: Any, **conditions: Tensor) -> Tensor:
        """(B, 2 C, h, w) of noisy latents (B, C, h, w), with what :meth:`contexts` gave."""
        return self.dit(x_t, t, contexts)


def in_compute_dtype(features: TextFeatures) -> TextFeatures:
    """Features in autocast's dtype, cast once here instead of in every block."""
    kind = features.bert.device.type
    if not torch.is_autocast_enabled(kind):
        return features
    dtype = torch.get_autocast_dtype(kind)
    return features._replace(bert=features.bert.to(dtype), t5=features.t5.to(dtype))


class Rehearsal(NamedTuple):
    """A training module without content, to measure what one step of it keeps in memory."""

    module: DiffusionModule
    blocks: int
    """How many blocks keep activations for the backward pass."""
    conditions: Mapping[str, tuple[int, ...] | None] = {}
    """What ``module.predict`` takes besides: the shape for one sample; None: that of the latents."""


def rehearse_dit(
    dit: DiTConfig,
    *,
    attention: AttentionFn,
    dtype: torch.dtype,
    operations: Any = nn,
    module: Callable[..., DiffusionModule] = DiffusionModule,
) -> Rehearsal:
    """That of a whole DiT in training."""
    network = DiT(dit, attention=attention, dtype=dtype, operations=operations)
    return Rehearsal(module(network, None, Schedule(DiffusionConfig()), ObjectiveSection()), dit.depth)


class DiffusionObjective:
    """The base of every objective, with what most of them do; each overrides what differs.

    The class methods need no trained weights: they are called when a configuration is checked, by the dry
    run, and while the networks are built.
    """

    section: ClassVar[type[Section] | None] = None
    """A table of the configuration that is the objective's, and is called like it."""
    shares: ClassVar[tuple[str, ...]] = ()
    """The tables of other objectives that this one uses too."""
    export_name = "model.safetensors"
    start_key = "model.init_from"
    module: nn.Module

    # -- the configuration -------------------------------------------------------------------------

    @classmethod
    def chosen(cls, config: TrainSections) -> type[DiffusionObjective]:
        """The class for this configuration, of an objective that has several."""
        return cls

    @classmethod
    def check(cls, config: TrainSections) -> None:
        """Raise ValueError for what this objective cannot be trained with."""

    @classmethod
    def check_unused(cls, config: TrainSections) -> None:
        """Raise ValueError for what only this objective uses, since another one is trained."""

    @classmethod
    def check_machine(cls, config: TrainSections) -> None:
        """Raise ConfigError for a library that is missing."""

    @classmethod
    def text_option(cls, config: TrainSections) -> str | None:
        """The key by which the outputs of the text encoders change at every step; None if they do not."""
        return "objective.train_text_encoders" if config.objective.train_text_encoders else None

    @classmethod
    def exports_text(cls, config: TrainSections) -> bool:
        """Whether the exported file holds the text encoders."""
        return False

    @classmethod
    def for_export(cls, config: AnyConfig) -> AnyConfig:
        """How to build the networks when all that is done with them is an export."""
        return config

    @classmethod
    def warnings(cls, config: TrainSections, captions: Callable[[], Iterable[str]]) -> Iterator[str]:
        """What the user should know of these captions before the training begins."""
        return iter(())

    # -- the dry run -------------------------------------------------------------------------------

    @classmethod
    def shapes(cls, config: TrainSections, dit: DiT, text: TextEncoders) -> dict[str, Tensor]:
        """What :meth:`parameters` will hold, as tensors whose content does not matter.

        Raises :class:`HyditError` if the weights to start from do not fit.
        """
        raise NotImplementedError

    @classmethod
    def text_state(cls, config: TrainSections) -> str:
        """What happens to the text encoders, in words."""
        return "trained too" if config.objective.train_text_encoders else "frozen"

    @classmethod
    def lines(cls, config: TrainSections, shapes: dict[str, Tensor]) -> Iterator[str]:
        """What else there is to say of the model."""
        return iter(())

    @classmethod
    def frozen_bytes(cls, config: TrainSections, dit: DiT) -> int:
        """The memory of the part of the DiT that is not trained."""
        return 0

    @classmethod
    def split_bytes(cls, config: TrainSections, dit: DiT) -> int:
        """What of :meth:`frozen_bytes` processes can hold parts of."""
        return cls.frozen_bytes(config, dit)

    @classmethod
    def rehearsal(
        cls, config: TrainSections, dit: DiTConfig, *, attention: AttentionFn, dtype: torch.dtype
    ) -> Rehearsal:
        """A step to measure, made under ``torch.device("meta")``, with this attention and in this dtype."""
        return rehearse_dit(dit, attention=attention, dtype=dtype)

    # -- the run -----------------------------------------------------------------------------------

    @classmethod
    def base_options(cls) -> dict[str, Any]:
        """How :func:`~hydit_core.weights.load.load_dit` is to load the base."""
        return {"dtype": torch.float32}

    @classmethod
    def complete(cls, config: TrainSections, parts: ModelParts) -> None:
        """Add to ``parts`` what is needed besides DiT, text encoders and VAE."""

    @classmethod
    def make(cls, config: TrainSections, parts: ModelParts, device: torch.device) -> DiffusionObjective:
        """The objective around the networks of a run."""
        return cls(parts, config.objective, device)

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
        module = self._module(config)
        self.module = module if parts.split else module.to(device)
        self.module.train()
        trained = config.train_text_encoders if trains_text is None else trains_text
        if not trained and parts.stored_text is None:
            parts.text.to(device)
        self.text = TextSource(parts.text, device, trained=trained, stored=parts.stored_text)

    def _module(self, config: ObjectiveSection) -> nn.Module:
        raise NotImplementedError

    def parameters(self) -> dict[str, nn.Parameter]:
        raise NotImplementedError

    def fixed_in_export(self) -> list[nn.Parameter]:
        return []

    def export(self, path: Path, *, dtype: torch.dtype, all_in_one: bool, extra: dict[str, str]) -> None:
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


def parameter_bytes(module: nn.Module, precision: str) -> int:
    """The memory of frozen weights in the precision of a run."""
    return sum(p.numel() for p in module.parameters()) * (2 if precision == "bf16" else 4)


def _sizes(batch: Batch) -> Tensor:
    """The size condition of v1.1 and older: (B, 6) original, trained size (W, H), crop (left, top)."""
    size = torch.tensor(batch.size).expand(len(batch), 2)
    return torch.cat([batch.original_sizes, size, batch.crops], dim=1).float()
