"""Training a ControlNet in front of a frozen DiT."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...control import CONTROL_KEY, check_fit
from ...data.config import ControlConfig
from ...data.dataset import Batch
from ...diffusion.schedule import Schedule
from ...facts import DiffusionConfig
from ...model.attention import AttentionFn, training_attention
from ...model.config import DiTConfig
from ...model.controlnet import ControlNet
from ...model.dit import DiT
from ...model.trunk import Context
from ...text.features import TextFeatures
from ...weights import unread
from ...weights.load import load_controlnet
from ...weights.save import save_checkpoint
from ..draws import Draws
from ..networks import ModelParts
from ..sections import ObjectiveSection, TrainSections
from .base import DiffusionModule, DiffusionObjective, Rehearsal, parameter_bytes

if TYPE_CHECKING:
    from ...text.encoders import TextEncoders


class ControlModule(DiffusionModule):
    """A ControlNet in training in front of a frozen DiT: from latents, text features and hint to losses."""

    def __init__(
        self, dit: DiT, controlnet: ControlNet, schedule: Schedule, config: ObjectiveSection
    ) -> None:
        super().__init__(dit, None, schedule, config)
        self.controlnet = controlnet

    def train(self, mode: bool = True) -> ControlModule:
        """As usual, but the frozen base stays in eval mode."""
        super().train(mode)
        self.dit.eval()
        return self

    @torch.no_grad()  # text projections are frozen in both networks
    def contexts(self, text: TextFeatures, image_meta_size: Tensor | None) -> tuple[Context, Context]:
        base, own = (
            net.encode_context(
                text.bert, text.bert_mask, text.t5, text.t5_mask, image_meta_size=image_meta_size
            )
            for net in (self.dit, self.controlnet)
        )
        return base, own

    def predict(self, x_t: Tensor, t: Tensor, contexts: Any, **conditions: Tensor) -> Tensor:
        """``hint`` are the latents of the control pictures, (B, C, h, w).

        Gradients flow through the DiT's later blocks to the residuals; its weights get none.
        """
        base, own = contexts
        controls = self.controlnet(x_t, t, own, conditions["hint"])
        return self.dit(x_t, t, base, controls)


class ControlNetObjective(DiffusionObjective):
    """The blocks and the added projections of a ControlNet; its other parts stay those of the base.

    ``control`` says how the control pictures are made, for the metadata of the file.
    """

    start_key = "objective.controlnet"

    # -- the configuration -------------------------------------------------------------------------

    @classmethod
    def check(cls, config: TrainSections) -> None:
        samples = config.samples
        if config.data.control is None:
            raise ValueError(_BELONG_TOGETHER)
        if config.model.init_from is None or config.objective.train_text_encoders:
            raise ValueError(
                "a ControlNet is trained for finished weights: give model.init_from, and leave "
                "objective.train_text_encoders off"
            )
        if samples.every and len(samples.control_images) not in (1, len(samples.prompts)):
            raise ValueError(
                "samples.control_images: give one picture, or one for each of samples.prompts "
                f"({len(samples.prompts)})"
            )

    @classmethod
    def check_unused(cls, config: TrainSections) -> None:
        if config.data.control is not None:
            raise ValueError(_BELONG_TOGETHER)
        if config.objective.controlnet or config.objective.dropout_control:
            raise ValueError("objective.controlnet and dropout_control need objective.kind = 'controlnet'")
        if config.samples.control_images:
            raise ValueError("samples.control_images needs objective.kind = 'controlnet'")

    # -- the dry run -------------------------------------------------------------------------------

    @classmethod
    def shapes(cls, config: TrainSections, dit: DiT, text: TextEncoders) -> dict[str, Tensor]:
        if config.objective.controlnet is not None:
            open_controlnet(config.objective, dit.config)
        return dict(control_parameters(ControlNet(dit.config, device="meta")))

    @classmethod
    def lines(cls, config: TrainSections, shapes: dict[str, Tensor]) -> Iterator[str]:
        key = f" ({config.objective.controlnet_load_key})" if config.objective.controlnet_load_key else ""
        start = config.objective.controlnet or "the first half of the DiT, which is frozen"
        yield f"ControlNet from {start}{key}"

    @classmethod
    def frozen_bytes(cls, config: TrainSections, dit: DiT) -> int:
        controlnet = ControlNet(dit.config, device="meta")
        embedders = sum(p.numel() for p in controlnet.parameters())
        embedders -= sum(p.numel() for p in control_parameters(controlnet).values())
        return parameter_bytes(dit, config.run.precision) + 4 * embedders

    @classmethod
    def rehearsal(
        cls, config: TrainSections, dit: DiTConfig, *, attention: AttentionFn, dtype: torch.dtype
    ) -> Rehearsal:
        base = DiT(dit, attention=attention, dtype=dtype).requires_grad_(False)
        controlnet = ControlNet(dit, attention=attention, dtype=dtype)
        module = ControlModule(base, controlnet, Schedule(DiffusionConfig()), config.objective)
        return Rehearsal(module, blocks=2 * dit.num_controls, conditions={"hint": None})

    # -- the run -----------------------------------------------------------------------------------

    @classmethod
    def complete(cls, config: TrainSections, parts: ModelParts) -> None:
        dit = parts.dit
        if config.objective.controlnet is None:
            net = parts.controlnet = ControlNet.from_base(dit, attention=training_attention)
            if parts.deferred:
                unread.like(net, dit)
                for parameter in net.projections():
                    unread.mark(parameter, unread.Zeros())
        else:
            how: dict[str, Any] = {"attention": training_attention, "deferred": parts.deferred}
            parts.controlnet = open_controlnet(config.objective, dit.config, dtype=torch.float32, **how)
        if config.run.precision == "bf16":
            dit.to(torch.bfloat16)  # frozen

    @classmethod
    def make(cls, config: TrainSections, parts: ModelParts, device: torch.device) -> ControlNetObjective:
        assert config.data.control is not None
        return cls(parts, config.objective, device, control=_how_made(config.data.control))

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

    def fixed_in_export(self) -> list[nn.Parameter]:
        trained = {id(parameter) for parameter in self.parameters().values()}
        return [parameter for parameter in self.controlnet.parameters() if id(parameter) not in trained]

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
        """The ControlNet in Tencent's layout; nothing else could go into one file with it."""
        metadata = {**extra, CONTROL_KEY: json.dumps(self.control)}
        own = self.parts.content(self.controlnet)
        save_checkpoint(path, dit=own, info=self.parts.info, dtype=dtype, metadata=metadata)


_BELONG_TOGETHER = (
    "objective.kind = 'controlnet' and a table data.control (for example kind = 'canny') belong together"
)


def control_parameters(controlnet: ControlNet) -> dict[str, nn.Parameter]:
    """What of a ControlNet is trained: the blocks and the added projections (Tencent/HunyuanDiT)."""
    trained = ("blocks.", "before_proj.", "after_proj_list.")
    named = controlnet.named_parameters()
    return {f"controlnet.{name}": p for name, p in named if name.startswith(trained)}


def open_controlnet(section: ObjectiveSection, dit: DiTConfig, **how: Any) -> ControlNet:
    """The ControlNet that a run continues; ``how`` goes to :func:`~hydit_core.weights.load.load_controlnet`.

    Raises:
        ConfigError: it is made for another DiT.
    """
    path = section.controlnet
    assert path is not None  # else it is copied from the base
    controlnet, _ = load_controlnet(path, load_key=section.controlnet_load_key, **how)
    check_fit(controlnet.config, dit, str(path))
    return controlnet


def _how_made(control: ControlConfig) -> dict[str, Any]:
    made: dict[str, Any] = {"kind": control.label or control.kind}
    if control.kind == "canny":
        made |= {"low": control.low, "high": control.high}
    return made
