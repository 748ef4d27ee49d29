"""Distillation: a LoRA, or all weights, that draw in few steps and without guidance.

What the student learns from is in :mod:`hydit_core.diffusion.consistency`; the guidance is folded in by a
teacher that is guided (Meng et al. 2023, arXiv:2210.03142; Luo et al. 2023). There is no discriminator and no
second student: the target is the student itself, without gradients (Song & Dhariwal 2024,
arXiv:2310.14189). The variances that HunyuanDiT learns besides take no part.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ...data.dataset import Batch
from ...data.section import Section
from ...diffusion.consistency import Phases
from ...diffusion.guidance import guide
from ...diffusion.losses import LossTerms, loss_weight, mse_loss
from ...diffusion.schedule import Schedule
from ...errors import ConfigError
from ...facts import ModelInfo
from ...model.attention import AttentionFn
from ...model.config import DiTConfig
from ...model.dit import DiT
from ...text.features import TextFeatures
from ...weights import unread
from ..adapters import without_adapters
from ..draws import Draws
from ..networks import ModelParts
from ..sections import ObjectiveSection, TrainSections
from .base import (
    DiffusionModule,
    DiffusionObjective,
    Rehearsal,
    in_compute_dtype,
    parameter_bytes,
    rehearse_dit,
)
from .full import FullObjective
from .lora import LoraModule, LoraObjective

if TYPE_CHECKING:  # it brings transformers, which a configuration is checked without
    from ...text.encoders import TextEncoders


class DistillSection(Section):
    """The table ``distill`` of the configuration."""

    train: Literal["lora", "all"] = Field(
        default="lora", description="what learns it: a LoRA (see the table lora) or all weights of the DiT"
    )
    guidance: float | None = Field(
        default=None,
        ge=1,
        le=100,
        description="guidance scale that is folded in; 1 is none; unset: what init_from recommends",
    )
    phases: int = Field(
        default=4,
        ge=1,
        le=1000,
        description="parts of the schedule, each of which becomes one step; 1: every step goes to the clean "
        "picture (LCM)",
    )
    teacher_steps: int = Field(
        default=25,
        ge=1,
        le=1000,
        description="how many steps the teacher would take over the whole schedule, phases or more",
    )

    @model_validator(mode="after")
    def _enough_steps(self) -> DistillSection:
        if self.teacher_steps < self.phases:
            raise ValueError(
                f"teacher_steps = {self.teacher_steps} with phases = {self.phases}: use at least as many"
            )
        return self


class _Distilled(DiffusionModule):
    """The part that both kinds share: from latents and text to losses."""

    phases: Phases
    guidance: float

    def teaching(self) -> AbstractContextManager[DiT]:
        """The frozen DiT, for as long as the context lasts."""
        raise NotImplementedError

    def forward(  # type: ignore[override]
        self,
        latents: Tensor,
        noise: Tensor,
        t: Tensor,
        text: TextFeatures,
        empty: TextFeatures,
        image_meta_size: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> LossTerms:
        """Losses (B,) of clean latents (B, C, h, w), their noise and timesteps t (B,).

        ``empty`` are the features of an empty text, of batch size 1, for the teacher's guidance.
        """
        text, empty = in_compute_dtype(text), in_compute_dtype(empty)
        x_t = self.schedule.add_noise(latents, noise, t)
        contexts = self.contexts(text, image_meta_size)
        frozen = type(contexts)(*(part.detach() for part in contexts))

        def student(x: Tensor, s: Tensor) -> Tensor:
            return self.predict(x, s, frozen)[:, : x.shape[1]].float()

        def teacher(x: Tensor, s: Tensor) -> Tensor:
            return self._guided(x, s, text, empty, image_meta_size)

        target = self.phases.target(x_t, t, teacher, student)
        output = self.predict(x_t, t, contexts)[:, : x_t.shape[1]]
        with torch.autocast(latents.device.type, enabled=False):
            mse = mse_loss(output.float(), target, mask)
            weight = loss_weight(t, self.schedule, self.config.weighting, self.config.snr_gamma)
            return LossTerms(mse * weight.to(mse.device), mse, torch.zeros_like(mse))

    def _guided(
        self, x: Tensor, t: Tensor, text: TextFeatures, empty: TextFeatures, sizes: Tensor | None
    ) -> Tensor:
        """The teacher's prediction with guidance, in one batch: unconditional rows first."""
        rows = len(x)
        if self.guidance != 1:
            text = TextFeatures(
                *(torch.cat([e.expand(rows, *e.shape[1:]), p]) for e, p in zip(empty, text, strict=True))
            )
            x, t = torch.cat([x, x]), torch.cat([t, t])
            sizes = None if sizes is None else torch.cat([sizes, sizes])
        with self.teaching() as dit:
            context = dit.encode_context(
                text.bert, text.bert_mask, text.t5, text.t5_mask, image_meta_size=sizes
            )
            predicted = dit(x, t, context)[:, : x.shape[1]].float()
        if self.guidance == 1:
            return predicted
        uncond, cond = predicted.chunk(2)
        return guide(uncond, cond, self.guidance)


class DistilledLora(_Distilled, LoraModule):
    """The teacher is the same DiT without the adapters."""

    def teaching(self) -> AbstractContextManager[DiT]:
        return without_adapters(self.dit)


class DistilledAll(_Distilled):
    """The teacher is a frozen copy, which is neither trained nor saved."""

    def __init__(
        self, dit: DiT, text: TextEncoders | None, schedule: Schedule, config: ObjectiveSection
    ) -> None:
        super().__init__(dit, text, schedule, config)
        self.teacher = copy.deepcopy(dit).requires_grad_(False).eval()
        unread.like(self.teacher, dit)

    def train(self, mode: bool = True) -> DistilledAll:
        super().train(mode)
        self.teacher.eval()
        return self

    def teaching(self) -> AbstractContextManager[DiT]:
        return nullcontext(self.teacher)


class _DistillObjective(DiffusionObjective):
    """What both kinds share; each inherits the rest from the objective that trains the same weights."""

    section: ClassVar[type[Section] | None] = DistillSection

    @classmethod
    def check(cls, config: TrainSections) -> None:
        super().check(config)
        objective = config.objective
        if config.model.init_from is None or objective.train_text_encoders:
            raise ValueError(
                "finished weights are distilled, and the text encoders stay as they are: give "
                "model.init_from, and leave objective.train_text_encoders off"
            )
        said = config.model.info.defaults
        asked = [config.samples.sampler]
        if said is not None and "sampler" in said.model_fields_set:
            asked.append(said.sampler)
        if "ddpm" in asked:
            raise ValueError("a distilled model's variances are not trained: use another sampler than ddpm")
        if objective.dropout_bert or objective.dropout_t5 or objective.dropout_joint:
            raise ValueError(
                "a distilled model draws without guidance, so it learns nothing from empty texts: leave "
                "objective.dropout_bert, dropout_t5 and dropout_joint at 0"
            )

    @classmethod
    def complete(cls, config: TrainSections, parts: ModelParts) -> None:
        super().complete(config, parts)
        parts.info = distilled_info(config, parts.info)

    @classmethod
    def make(cls, config: TrainSections, parts: ModelParts, device: torch.device) -> DiffusionObjective:
        made = super().make(config, parts, device)
        own = _own(config)
        module: Any = made.module
        module.phases = Phases(made.schedule, own.phases, own.teacher_steps)
        module.guidance = parts.info.folded_cfg
        return made

    @classmethod
    def lines(cls, config: TrainSections, shapes: dict[str, Tensor]) -> Iterator[str]:
        yield from super().lines(config, shapes)
        own = _own(config)
        scale = "what init_from recommends" if own.guidance is None else f"{own.guidance:g}"
        yield (
            f"distilled with a guidance of {scale}, from {own.teacher_steps} steps to {own.phases} "
            + ("phases" if own.phases > 1 else "phase")
        )

    def inputs(self, batch: Batch, draws: Draws) -> dict[str, Any]:
        return {**super().inputs(batch, draws), "empty": self.text([""], [""])}


class DistillObjective(_DistillObjective, LoraObjective):
    """A LoRA that draws in few steps; its teacher is the model without it."""

    shares = ("lora",)

    @classmethod
    def chosen(cls, config: TrainSections) -> type[DiffusionObjective]:
        return cls if _own(config).train == "lora" else DistillAllObjective

    @classmethod
    def check(cls, config: TrainSections) -> None:
        super().check(config)
        if config.own_table("lora").trains_text:
            raise ValueError("a distilled LoRA leaves the text encoders as they are: no lora.train_...")

    def _module(self, config: ObjectiveSection) -> nn.Module:
        return DistilledLora(self.parts.dit, None, self.schedule, config)


class DistillAllObjective(_DistillObjective, FullObjective):
    """A DiT that draws in few steps; its teacher is a copy of what it starts from."""

    @classmethod
    def frozen_bytes(cls, config: TrainSections, dit: DiT) -> int:
        return super().frozen_bytes(config, dit) + parameter_bytes(dit, "fp32")

    @classmethod
    def rehearsal(
        cls, config: TrainSections, dit: DiTConfig, *, attention: AttentionFn, dtype: torch.dtype
    ) -> Rehearsal:
        return rehearse_dit(dit, attention=attention, dtype=dtype, module=DistilledAll)

    def _module(self, config: ObjectiveSection) -> nn.Module:
        return DistilledAll(self.parts.dit, None, self.schedule, config)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in super().parameters().items() if not name.startswith("teacher.")}


def guidance(own: DistillSection, info: ModelInfo) -> float:
    """The scale that the teacher is guided with, if ``info`` is what the base recommends.

    Raises:
        ConfigError: neither of them says.
    """
    scale = own.guidance
    if scale is None:
        scale = info.defaults.cfg
        if scale == 1:
            raise ConfigError(
                "model.init_from recommends no guidance that could be folded in: give distill.guidance (1 is "
                "none)"
            )
    return scale


def distilled_info(config: TrainSections, info: ModelInfo) -> ModelInfo:
    """What the distilled file says of itself; ``info`` is that of the base.

    Its sampler, spacing and steps are recommended unless ``model.info.defaults`` says others.

    Raises:
        ConfigError: as :func:`guidance` does.
    """
    own, said = _own(config), config.model.info.defaults
    settings = (
        {"sampler": "lcm", "steps": 8} if own.phases == 1 else {"sampler": "euler", "steps": own.phases}
    )
    settings["spacing"] = "trailing"
    chosen: dict[str, Any] = {} if said is None else said.model_dump(include={*settings}, exclude_unset=True)
    defaults = dataclasses.replace(info.defaults, **{**settings, **chosen}, cfg=1.0, guidance_rescale=0.0)
    return dataclasses.replace(info, defaults=defaults, folded_cfg=guidance(own, info))


def _own(config: TrainSections) -> DistillSection:
    table: DistillSection = config.own_table("distill")
    return table
