"""Full training: all weights of the DiT and, if asked for, of the text encoders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...model.dit import DiT
from ..sections import ObjectiveSection, TrainSections
from .base import DiffusionModule, DiffusionObjective

if TYPE_CHECKING:
    from ...text.encoders import TextEncoders


class FullObjective(DiffusionObjective):
    """All parameters of the DiT and, if configured, of the text encoders."""

    @classmethod
    def exports_text(cls, config: TrainSections) -> bool:
        return config.checkpoint.export_all_in_one

    @classmethod
    def shapes(cls, config: TrainSections, dit: DiT, text: TextEncoders) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {f"dit.{name}": p for name, p in dit.named_parameters()}
        if config.objective.train_text_encoders:
            found |= {f"text.{name}": p for name, p in text.named_parameters()}
        return found

    def _module(self, config: ObjectiveSection) -> nn.Module:
        trained = self.parts.text if config.train_text_encoders else None
        return DiffusionModule(self.parts.dit, trained, self.schedule, config)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def export(self, path: Path, *, dtype: torch.dtype, all_in_one: bool, extra: dict[str, str]) -> None:
        self.parts.save(path, dtype=dtype, all_in_one=all_in_one, extra=extra)
