"""The objectives by the name that ``objective.kind`` has for them. A new one is one more line here."""

from __future__ import annotations

import torch

from ..networks import ModelParts
from ..sections import TrainSections
from .base import DiffusionObjective
from .controlnet import ControlNetObjective
from .distill import DistillObjective
from .full import FullObjective
from .ip_adapter import IPAdapterObjective
from .lora import LoraObjective

OBJECTIVES: dict[str, type[DiffusionObjective]] = {
    "full": FullObjective,
    "controlnet": ControlNetObjective,
    "lora": LoraObjective,
    "distill": DistillObjective,
    "ip_adapter": IPAdapterObjective,
}


def objective_of(config: TrainSections) -> type[DiffusionObjective]:
    """What ``objective.kind`` names."""
    return OBJECTIVES[config.objective.kind].chosen(config)


def make_objective(config: TrainSections, parts: ModelParts, device: torch.device) -> DiffusionObjective:
    """The objective of a run, around its networks."""
    return objective_of(config).make(config, parts, device)


def export_names() -> tuple[str, ...]:
    """The files that runs export, each name once."""
    return tuple(dict.fromkeys(objective.export_name for objective in OBJECTIVES.values()))
