"""LORA_MODELs: several LoRAs in one, as the dictionary that ComfyUI's own nodes pass on; and their files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from comfy.cli_args import args
from torch import Tensor

from ...hydit_core.errors import ConfigError, LoraError
from ...hydit_core.lora.adapter import Adapter
from ...hydit_core.lora.blocks import BlockWeights
from ...hydit_core.lora.combined import COMBINED_KEY, combined_metadata
from ...hydit_core.lora.extract import combine
from ...hydit_core.lora.kinds import DoRA
from ...hydit_core.lora.reading import from_tensors
from ...hydit_core.lora.weighted import told_depth, weighted
from ...hydit_core.lora.writing import to_tensors, write
from ...hydit_core.untrusted import parse_json
from .lora import apply_lora, report
from .save import graph_texts, output_name, save_path

log = logging.getLogger(__name__)


class LoraModel(dict[str, Tensor]):
    """A LORA_MODEL: tensors under ComfyUI's names, strengths included. ``metadata`` is for its files."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        super().__init__(tensors)
        self.metadata = dict(metadata)


def merge_lora(
    adapter: Adapter,
    strength: float,
    block_weights: str,
    *,
    lora: Any = None,
    model: Any = None,
    clip: Any = None,
    partial: bool = True,
) -> tuple[LoraModel, Any, Any, str]:
    """Add a LoRA with its strength to a LORA_MODEL, and put all of that on MODEL and CLIP.

    Args:
        lora: a LORA_MODEL, ours or of ComfyUI's own nodes; None: none yet.
        model, clip: without the LoRAs in ``lora``. They are not changed; None stays None.
        partial: see :func:`apply_lora`.

    Returns:
        The LORA_MODEL, MODEL, CLIP, and a report.

    Raises:
        LoraError: a DoRA among several, or at another strength than 1; or what :func:`apply_lora` raises.
        ConfigError: there are not as many weights as blocks.
    """
    weights = BlockWeights.parse(block_weights)
    own = weighted(adapter, strength, weights, _depth(adapter, weights, model))
    merged = own if lora is None else _together(adapter_of(lora), own)
    value = LoraModel(to_tensors(merged, "comfy"), merged.metadata)
    said = report(adapter)
    if model is not None or clip is not None:
        model, clip, said = apply_lora(merged, model, clip, partial=partial)
    files = [f"{entry['lora']} at {entry['strength']:g}" for entry in _recipe(merged)]
    return value, model, clip, "\n".join([said, "merged: " + ", ".join(files)])


def adapter_of(lora: Any) -> Adapter:
    """A LORA_MODEL as an adapter. Raises :class:`LoraError` if it is another model's."""
    return from_tensors(lora, metadata=getattr(lora, "metadata", {}), name="the LORA_MODEL")


def _depth(adapter: Adapter, weights: BlockWeights, model: Any) -> int:
    """The number of blocks that weights are needed for."""
    if model is not None:
        return len(model.model.diffusion_model.blocks)
    depth = told_depth(adapter, weights)
    if depth is None:
        raise ConfigError(f"block_weights {weights}: connect model, whose number of blocks the curve needs")
    return depth


def _together(before: Adapter, own: Adapter) -> Adapter:
    """An adapter with the changes of both."""
    modules = {
        key: [*before.modules.get(key, ()), *own.modules.get(key, ())]
        for key in (*before.modules, *own.modules)
    }
    for module, patches in modules.items():
        if len(patches) > 1 and any(isinstance(patch, DoRA) for patch in patches):
            raise LoraError(
                f"a DoRA ({module}) cannot be one LoRA with others: chain HyDiTLoraLoader instead, and write "
                "the model with HyDiTModelSave"
            )
    metadata = combined_metadata([(before, 1.0), (own, 1.0)], [*_recipe(before), *_recipe(own)])
    return Adapter(modules, f"{before.name} + {own.name}", own.format, metadata)


def _recipe(adapter: Adapter) -> list[dict[str, Any]]:
    """The LoRAs that a LoRA was merged from."""
    try:
        return list(parse_json(adapter.metadata[COMBINED_KEY], COMBINED_KEY, kind=list, error=LoraError))
    except (KeyError, LoraError):
        return [{"lora": adapter.name, "strength": 1.0}]


def save_lora(
    lora: Any,
    filename_prefix: str,
    format: str,
    rank: int = 0,
    *,
    prompt: Any = None,
    extra_pnginfo: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write a LORA_MODEL below ComfyUI's output folder, where it appears when it is complete.

    Args:
        format: ``comfy`` or ``kohya``, one file; ``peft``, a folder.
        rank: the most that a module may have; 0 keeps all.
        prompt, extra_pnginfo: the graph, for the metadata.

    Returns:
        Its name, and what the user should know, one line each.

    Raises:
        ConfigError: the name cannot be used.
        LoraError: the LORA_MODEL is another model's, or cannot be written in this format.
    """
    path = save_path(filename_prefix, suffix="" if format == "peft" else ".safetensors")
    adapter, notes = adapter_of(lora), []
    metadata = dict(adapter.metadata)
    if rank:
        cut = combine([(adapter, 1.0)], rank)
        adapter = cut.adapter
        notes.append(f"rank {rank}: {cut.energy:.2%} of the change is kept")
    if format != "peft" and _dora_on_outputs(adapter):
        notes.append(
            "a DoRA along the output axis: ComfyUI's own loader computes it by another formula; load it with "
            "HyDiTLoraLoader"
        )
    graph = {} if args.disable_metadata else graph_texts(prompt, extra_pnginfo)
    write(adapter, path, format=format, metadata={**metadata, **graph})
    log.info("hydit: saved %s", path)
    return [output_name(path) + ("/" if format == "peft" else ""), *notes]


def _dora_on_outputs(adapter: Adapter) -> bool:
    return any(isinstance(patch, DoRA) and patch.axis == 0 for patch in adapter.patches())
