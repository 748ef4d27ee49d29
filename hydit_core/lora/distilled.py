"""LoRAs that draw in few steps: what their files recommend, and the model with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..errors import LoraError, WeightsError
from ..facts import METADATA_KEY, ModelInfo, SamplingDefaults
from .adapter import Adapter

_SETTINGS = ("sampler", "spacing", "steps", "cfg", "guidance_rescale")


def distilled_info(adapter: Adapter) -> ModelInfo | None:
    """What the file of a distilled LoRA says; None for other LoRAs, whose settings are those of their base.

    Raises:
        LoraError: it says what cannot be.
    """
    if METADATA_KEY not in adapter.metadata:
        return None
    try:
        info = ModelInfo.from_metadata(adapter.metadata, version="v1.2")
    except WeightsError as error:
        raise LoraError(f"{adapter.name}: {error}") from None
    return info if info.folded_cfg else None


def with_lora(info: ModelInfo, adapter: Adapter, strength: float = 1.0) -> ModelInfo:
    """What is known of a model with a LoRA: after a distilled one, its settings are recommended.

    The size and the negative prompt stay the model's. A strength of 0 or below makes no model distilled.
    """
    told = distilled_info(adapter) if strength > 0 else None
    if told is None:
        return info
    settings = {name: getattr(told.defaults, name) for name in _SETTINGS}
    return replace(info, defaults=replace(info.defaults, **settings), folded_cfg=told.folded_cfg)


def lora_notes(before: ModelInfo, after: ModelInfo) -> list[str]:
    """What the user should know if :func:`with_lora` made ``after`` of ``before``."""
    if after is before:
        return []
    notes = [f"distilled: {settings_text(after.defaults)}, unless chosen otherwise"]
    if before.folded_cfg:
        notes.append(
            f"warning: the model was distilled before ({settings_text(before.defaults)}): two distillations "
            "add up to more than either; the settings of the last one are used"
        )
    return notes


def merged_info(
    info: ModelInfo, adapters: Sequence[Adapter], strengths: Sequence[float]
) -> tuple[ModelInfo, list[str]]:
    """What is known of a model with several LoRAs, and what the user should know of that."""
    notes = []
    for adapter, strength in zip(adapters, strengths, strict=True):
        before, info = info, with_lora(info, adapter, strength)
        notes += lora_notes(before, info)
    return info, notes


def settings_text(defaults: SamplingDefaults) -> str:
    """Recommended settings in a few words."""
    return f"{defaults.steps} steps of {defaults.sampler}, {defaults.spacing} spacing, cfg {defaults.cfg:g}"
