"""The LoRA objective: adapters over a frozen base, and the two forms they are saved in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ...data.section import Section
from ...errors import ConfigError
from ...lora import reading, writing
from ...lora.adapter import TRIGGER_KEYS
from ...model.attention import AttentionFn
from ...model.config import DiTConfig
from ...model.dit import DiT
from ...new_files import remove_folder, replacing, unfinished
from ...weights import kitchen
from ...weights.bundle import bundle
from ...weights.frozen import OPERATIONS, quantizer, splittable_bytes, store, stored_bytes
from ...weights.modelspec import file_metadata
from ..adapter_kinds import KINDS
from ..adapters import (
    adapted_layers,
    adapted_parts,
    adapter_parameters,
    adapter_scales,
    find_targets,
    inject,
    load_adapter,
    parameter_shapes,
    starting_values,
    to_adapter,
)
from ..lora_section import LoraSection
from ..networks import ModelParts
from ..sections import ObjectiveSection, TrainSections
from .base import AnyConfig, DiffusionModule, DiffusionObjective, Rehearsal, rehearse_dit

if TYPE_CHECKING:
    from ...text.encoders import TextEncoders


_LOKR = ("factor", "decompose_both", "full_matrix")
_STRENGTH = {"kind", "rank", "alpha", "rslora", "rank_pattern", "alpha_pattern", *_LOKR}
"""The keys that say how strong a layer's change is."""


class LoraModule(DiffusionModule):
    """DiT and text encoders with adapters; the base is in eval mode, the adapters' dropout is not."""

    def train(self, mode: bool = True) -> LoraModule:
        super().train(mode)
        for _, layer in adapted_layers({"": self}):
            layer.train(mode)
        return self


class LoraObjective(DiffusionObjective):
    """Adapters of the DiT and, if configured, of the text encoders. Everything else is frozen."""

    section: ClassVar[type[Section] | None] = LoraSection
    export_name = "lora.safetensors"
    start_key = "lora.init_from"

    # -- the configuration -------------------------------------------------------------------------

    @classmethod
    def check(cls, config: TrainSections) -> None:
        if config.model.init_from is None:
            raise ValueError("a LoRA is trained for finished weights: give model.init_from")
        if config.objective.train_text_encoders:
            raise ValueError(
                "objective.train_text_encoders trains all their weights: a LoRA takes lora.train_bert and "
                "lora.train_t5"
            )

    @classmethod
    def check_machine(cls, config: TrainSections) -> None:
        quantizer(_base_precision(config))

    @classmethod
    def text_option(cls, config: TrainSections) -> str | None:
        return super().text_option(config) or ("lora.train_..." if _own(config).trains_text else None)

    @classmethod
    def for_export(cls, config: AnyConfig) -> AnyConfig:
        """With the base in fp32: it is not written, and fewer bits may need more libraries."""
        plain = _own(config).model_copy(update={"base_precision": "fp32"})
        return config.model_copy(update={"lora": plain})

    @classmethod
    def warnings(cls, config: TrainSections, captions: Callable[[], Iterable[str]]) -> Iterator[str]:
        trigger = _own(config).trigger
        if trigger and not any(trigger in caption for caption in captions()):
            yield f"no caption holds lora.trigger = {trigger!r}, so the LoRA will not learn to respond to it"

    # -- the dry run -------------------------------------------------------------------------------

    @classmethod
    def shapes(cls, config: TrainSections, dit: DiT, text: TextEncoders) -> dict[str, Tensor]:
        lora = _own(config)
        targets = find_targets(adapted_parts(lora, dit, text), lora)
        if lora.init_from is not None:
            starting_values(targets, lora, reading.read(lora.init_from), str(lora.init_from))
        return parameter_shapes(targets, lora)

    @classmethod
    def text_state(cls, config: TrainSections) -> str:
        return "frozen, with adapters" if _own(config).trains_text else "frozen"

    @classmethod
    def lines(cls, config: TrainSections, shapes: dict[str, Tensor]) -> Iterator[str]:
        lora, layers = _own(config), len({name.rpartition(".")[0] for name in shapes})
        what = KINDS[lora.kind].patch.label
        what += " of whole matrices" if lora.full_matrix else f" of rank {lora.rank}"
        strength = f"strength {1.0 if lora.full_matrix else lora.strength(lora.rank, lora.alpha):g}"
        if lora.rank_pattern or lora.alpha_pattern:
            strength += ", but where rank_pattern and alpha_pattern say otherwise"
        yield (
            f"{what} on {layers} layers, {strength}; "
            f"the DiT's matrices are stored in {_base_precision(config)}{_as_in_file(config)}"
        )
        if lora.init_from is not None:
            yield f"it starts from {lora.init_from}"

    @classmethod
    def frozen_bytes(cls, config: TrainSections, dit: DiT) -> int:
        return stored_bytes(dit, _own(config).base_precision, default=config.run.precision)

    @classmethod
    def split_bytes(cls, config: TrainSections, dit: DiT) -> int:
        precision = _own(config).base_precision
        return splittable_bytes(dit, precision, default=config.run.precision)

    @classmethod
    def rehearsal(
        cls, config: TrainSections, dit: DiTConfig, *, attention: AttentionFn, dtype: torch.dtype
    ) -> Rehearsal:
        found = rehearse_dit(dit, attention=attention, dtype=dtype, operations=OPERATIONS, module=LoraModule)
        networks = {"dit": found.module.dit}
        inject(networks, _own(config), seed=0, partial=True)
        found.module.requires_grad_(False)
        for parameter in adapter_parameters(networks, _own(config)).values():
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(True)
        return found

    # -- the run -----------------------------------------------------------------------------------

    @classmethod
    def base_options(cls) -> dict[str, Any]:
        """The base is cast matrix by matrix, later; what is quantised in its file may stay so."""
        return {"operations": OPERATIONS, "keep_quantised": True}

    @classmethod
    def make(cls, config: TrainSections, parts: ModelParts, device: torch.device) -> DiffusionObjective:
        return cls(parts, config, device)

    def __init__(self, parts: ModelParts, config: TrainSections, device: torch.device) -> None:
        self.lora = _own(config)
        self.networks = adapted_parts(self.lora, parts.dit, parts.text)
        inject(self.networks, self.lora, seed=config.run.seed)
        if self.lora.init_from is not None:
            load_adapter(
                self.networks, self.lora, reading.read(self.lora.init_from), str(self.lora.init_from)
            )
        parts.text.requires_grad_(False)
        parts.dit.requires_grad_(False)
        store(parts.dit, self.lora.base_precision, default=config.run.precision)
        parts.dit.random_blocks = self.lora.dropout > 0 or self.lora.rank_dropout > 0
        super().__init__(parts, config.objective, device, trains_text=self.lora.trains_text)
        for parameter in self.parameters().values():
            parameter.requires_grad_(True)

    def _module(self, config: ObjectiveSection) -> nn.Module:
        text = self.parts.text if self.lora.trains_text else None
        return LoraModule(self.parts.dit, text, self.schedule, config)

    def parameters(self) -> dict[str, nn.Parameter]:
        return adapter_parameters(self.networks, self.lora)

    def check_resumable(self, before: dict[str, Any]) -> None:
        if before["objective"]["kind"] not in ("lora", "distill"):
            return  # the weights will not fit
        # Of an earlier release some are not there: they had today's defaults.
        then = LoraSection.model_validate({key: before["lora"][key] for key in _STRENGTH & {*before["lora"]}})
        if then.kind != self.lora.kind:
            raise ConfigError(
                f"was trained with lora.kind = {then.kind!r}, the configuration says "
                f"{self.lora.kind!r}: keep it, or start a new run"
            )
        was, now = (adapter_scales(self.networks, lora) for lora in (then, self.lora))
        other = next((name for name in now if was[name] != now[name]), None)
        if other is not None:
            where = f" at {other}" if max(len({*s.values()}) for s in (was, now)) > 1 else ""
            raise ConfigError(
                f"was trained with a strength (alpha / rank) {was[other]:g}{where}, the configuration "
                f"says {now[other]:g}; keep rank, alpha, the patterns and rslora, or start a new run from "
                f"the LoRA by {self.start_key}"
            )

    def export(self, path: Path, *, dtype: torch.dtype, all_in_one: bool, extra: dict[str, str]) -> None:
        """``lora.safetensors`` as ComfyUI reads it and, of a LoRA, beside it ``lora/`` as peft reads it."""
        lora, info = self.lora, self.parts.info
        recipe = {
            "kind": lora.kind,
            "rank": lora.rank,
            "alpha": lora.alpha or lora.rank,
            "rslora": lora.rslora,
            "dora": lora.dora,
            "targets": lora.targets,
            "base": info.base,
        }
        for key in ("rank_pattern", "alpha_pattern", *(_LOKR if lora.kind == "lokr" else ())):
            if value := getattr(lora, key):
                recipe[key] = value
        metadata = {"hydit.lora": json.dumps(recipe)}
        if lora.trigger:
            metadata |= dict.fromkeys(TRIGGER_KEYS, lora.trigger)
        metadata = file_metadata(self.parts.dit.config, info, role="lora", extra={**metadata, **extra})
        adapter = to_adapter(self.networks, lora, metadata, self.parts.whole)
        writing.write(adapter, path, format="comfy", dtype=dtype, metadata=metadata, overwrite=True)
        if lora.kind != "lora":
            return
        folder = path.with_suffix("")
        for left in unfinished(folder.parent, folder.name):  # of a crash
            remove_folder(left)
        with replacing(folder, folder=True) as fresh:
            writing.write(adapter, fresh, format="peft", dtype=dtype, metadata=metadata)


def _own(config: TrainSections) -> LoraSection:
    table: LoraSection = config.own_table("lora")
    return table


def _as_in_file(config: TrainSections) -> str:
    """What is said of a base that is quantised in its file and stays so."""
    path = config.model.init_from
    if path is None or _own(config).base_precision is not None or not kitchen.is_available():
        return ""
    dit = bundle(path, only=("dit",), load_key=config.model.load_key).dit
    names = sorted({scheme.name for scheme in dit.schemes().values()} if dit else ())
    return f", but what the file has in {', '.join(names)} stays so" if names else ""


def _base_precision(config: TrainSections) -> str:
    """What the matrices of the frozen DiT are stored in."""
    return _own(config).base_precision or config.run.precision
