"""What the file of a LoRA says that was made of others, or of one at another strength."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..facts import METADATA_KEY
from .adapter import TRIGGER_KEYS, Adapter
from .blocks import BlockWeights
from .distilled import distilled_info

COMBINED_KEY = "hydit.combined"
"""Metadata of a LoRA made of others: a JSON list of what went in."""


def combined_metadata(
    adapters: Sequence[tuple[Adapter, float]], recipe: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """The metadata of several LoRAs in one: what all agree on, every trigger word, and the recipe.

    A distilled LoRA's settings stay recommended, those of the last one: at other settings none of it draws
    well. What describes the weights of one file is left out.

    Args:
        adapters: with their strengths.
        recipe: what went in, an entry for each, see :func:`recipe_entry`.

    Raises:
        LoraError: a distilled one says what cannot be.
    """
    first, *others = (adapter.metadata for adapter, _ in adapters)
    metadata = {
        key: value
        for key, value in first.items()
        if "hash" not in key
        and key not in (*TRIGGER_KEYS, "hydit.lora")
        and all(other.get(key) == value for other in others)
    }
    if told := [(adapter, strength) for adapter, strength in adapters if distilled_info(adapter)]:
        metadata.pop(METADATA_KEY, None)
        used = [adapter.metadata[METADATA_KEY] for adapter, strength in told if strength > 0]
        metadata |= {METADATA_KEY: used[-1]} if used else {}
    if words := dict.fromkeys(word for adapter, _ in adapters if (word := adapter.trigger())):
        metadata |= dict.fromkeys(TRIGGER_KEYS, ", ".join(words))
    metadata[COMBINED_KEY] = json.dumps(list(recipe), ensure_ascii=False)
    return metadata


def recipe_entry(adapter: Adapter, strength: float, weights: BlockWeights) -> dict[str, Any]:
    """What a combined LoRA's metadata say about one of the LoRAs it was made of."""
    entry: dict[str, Any] = {"lora": adapter.name, "strength": strength}
    if weights != BlockWeights():
        entry["block_weights"] = str(weights)
    return entry
