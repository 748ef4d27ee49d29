"""The LoRA objective: adapters over a frozen base, and the two forms they are saved in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..lora import reading, writing
from ..new_files import remove_folder, replacing, unfinished
from ..weights.frozen import store
from ..weights.modelspec import file_metadata
from .adapters import (
    adapted_layers,
    adapted_parts,
    adapter_parameters,
    inject,
    load_adapter,
    scale_of,
    to_adapter,
)
from .config import LoraSection, ObjectiveSection, TrainConfig
from .objectives import DiffusionModule, DiffusionObjective
from .parts import ModelParts


class LoraModule(DiffusionModule):
    """DiT and text encoders with adapters; the base is in eval mode, the adapters' dropout is not."""

    def train(self, mode: bool = True) -> LoraModule:
        super().train(mode)
        for _, layer in adapted_layers({"": self}):
            layer.train(mode)
        return self


class LoraObjective(DiffusionObjective):
    """Adapters of the DiT and, if configured, of the text encoders. Everything else is frozen."""

    export_name = "lora.safetensors"
    start_key = "lora.init_from"

    def __init__(
        self,
        parts: ModelParts,
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        self.lora = config.lora
        self.networks = adapted_parts(self.lora, parts.dit, parts.text)
        inject(self.networks, self.lora, seed=config.run.seed)
        if self.lora.init_from is not None:
            load_adapter(
                self.networks, self.lora, reading.read(self.lora.init_from), str(self.lora.init_from)
            )
        parts.text.requires_grad_(False)
        parts.dit.requires_grad_(False)
        store(parts.dit, config.base_precision)
        parts.dit.random_blocks = self.lora.dropout > 0
        super().__init__(parts, config.objective, device, trains_text=self.lora.trains_text)
        for parameter in self.parameters().values():
            parameter.requires_grad_(True)

    def _module(self, config: ObjectiveSection) -> nn.Module:
        text = self.parts.text if self.lora.trains_text else None
        return LoraModule(self.parts.dit, text, self.schedule, config)

    def parameters(self) -> dict[str, nn.Parameter]:
        return adapter_parameters(self.networks)

    def check_resumable(self, before: dict[str, Any]) -> None:
        if before["objective"]["kind"] != "lora":
            return  # the weights will not fit
        strength = {key: before["lora"][key] for key in ("rank", "alpha", "rslora")}
        was, now = scale_of(LoraSection.model_validate(strength)), scale_of(self.lora)
        if was != now:
            raise ConfigError(
                f"was trained with a strength (alpha / rank) {was:g}, the configuration says {now:g}; keep "
                f"rank, alpha and rslora, or start a new run from the LoRA by {self.start_key}"
            )

    def export(self, path: Path, *, dtype: torch.dtype, all_in_one: bool, extra: dict[str, str]) -> None:
        """``lora.safetensors`` as ComfyUI reads it, and beside it ``lora/`` as peft reads it."""
        lora, info = self.lora, self.parts.info
        recipe = {
            "rank": lora.rank,
            "alpha": lora.alpha or lora.rank,
            "rslora": lora.rslora,
            "dora": lora.dora,
            "targets": lora.targets,
            "base": info.base,
        }
        metadata = {"hydit.lora": json.dumps(recipe)}
        if lora.trigger:
            metadata |= {"hydit.trigger": lora.trigger, "modelspec.trigger_phrase": lora.trigger}
        metadata = file_metadata(self.parts.dit.config, info, role="lora", extra={**metadata, **extra})
        adapter = to_adapter(self.networks, lora, metadata)
        writing.write(adapter, path, format="comfy", dtype=dtype, metadata=metadata, overwrite=True)
        folder = path.with_suffix("")
        for left in unfinished(folder.parent, folder.name):  # of a crash
            remove_folder(left)
        with replacing(folder, folder=True) as fresh:
            writing.write(adapter, fresh, format="peft", dtype=dtype, metadata=metadata)
