"""LoRAs on MODELs and CLIPs, as patches that ComfyUI itself applies, streams and removes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import comfy.model_management
import comfy.weight_adapter
import torch
from torch import Tensor

from ...hydit_core.errors import LoraError
from ...hydit_core.lora.adapter import PARTS, Adapter, Match, changed, module_shapes
from ...hydit_core.lora.blocks import BlockWeights, depth_of
from ...hydit_core.lora.distilled import lora_notes, with_lora
from ...hydit_core.lora.kinds import LoRA, SetWeight
from ...hydit_core.lora.patch import Patch
from ...hydit_core.lora.reading import read
from .model import model_info, set_model_info
from .tokens import BERT, MT5

_PREFIXES = {"dit": "diffusion_model.", "bert": f"{BERT}.transformer.bert.", "t5": f"{MT5}.transformer."}
_NAMES = {"dit": "the model", "bert": "BERT", "t5": "mT5"}
_SHOWN = 4

# A name of a weight, or of a slice of it: dimension, start, length.
Target = str | tuple[str, tuple[int, int, int]]


class PatchAdapter(comfy.weight_adapter.WeightAdapterBase):
    """A :class:`Patch` for which ComfyUI has no adapter, or one with another formula.

    ``weights`` is (patch, tensors): ComfyUI copies adapters, moving all tensors in nested tuples and keeping
    everything else in them. The tensors in the patch itself therefore have no content.
    """

    name = "hydit"

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        self.loaded_keys, self.weights = loaded_keys, weights

    @classmethod
    def of(cls, patch: Patch) -> PatchAdapter:
        return cls(set(), (patch.mapped(lambda tensor: tensor.to("meta")), tuple(patch.all_tensors())))

    def patch(self, device: torch.device) -> Patch:
        """The patch with its content, on ``device``."""
        patch, tensors = self.weights
        move = comfy.model_management.cast_to_device
        moved = iter([move(tensor, device, tensor.dtype) for tensor in tensors])
        return patch.mapped(lambda _: next(moved))

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Any,
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:
        """Change ``weight`` in place, as ComfyUI's adapters do."""
        weight.copy_(changed(weight, [self.patch(weight.device)], strength))
        return weight


def open_lora(path: Path) -> Adapter:
    """The LoRA in a file or a PEFT folder, which is not needed afterwards.

    Raises:
        LoraError: it is something else.
    """
    adapter = read(path)
    # Copies of the tensors, which may be views of the file: Windows cannot replace an open file.
    owned = {
        module: [patch.mapped(torch.clone) for patch in patches]
        for module, patches in adapter.modules.items()
    }
    return replace(adapter, modules=owned)


def apply_lora(
    adapter: Adapter,
    model: Any,
    clip: Any = None,
    *,
    strength_model: float = 1.0,
    strength_clip: float = 1.0,
    block_weights: str | BlockWeights = "uniform(1)",
    partial: bool = True,
) -> tuple[Any, Any, str]:
    """A MODEL and a CLIP with a LoRA on them, and a report on it. The given ones are not changed.

    Args:
        model, clip: HunyuanDiT's, ours or ComfyUI's own; either may be None.
        partial: allow more than a tenth of the LoRA to be for layers that they do not have.

    Raises:
        LoraError: too little of the LoRA is for them, or its sizes are another model's.
        HyditError: the MODEL is not a HunyuanDiT.
        ConfigError: there are not as many weights as blocks.
    """
    weights = BlockWeights.parse(block_weights)
    keys, shapes = _targets(model, clip)
    if clip is None and adapter.parts() <= {"bert", "t5"}:
        raise LoraError(f"{adapter.name} ({adapter.describe()}) is for the text encoders alone: connect clip")
    match = adapter.require(shapes, base=_base(model, clip), partial=partial)
    depth = depth_of(shapes)
    strengths = {"dit": strength_model, "bert": strength_clip, "t5": strength_clip}
    rounds: dict[tuple[str, float, int], dict[Target, Any]] = defaultdict(dict)
    for module in match.matched:
        part = module.partition(".")[0]
        strength = strengths[part] * weights.of(module, depth)
        if strength == 0:
            continue
        for i, patch in enumerate(adapter.modules[module]):
            # ComfyUI takes one patch per target at a time
            rounds["dit" if part == "dit" else "text", strength, i].update(_patches(patch, keys[module]))
    notes = []
    if model is not None:
        before = model_info(model)
        after = with_lora(before, adapter, strength_model)
        notes = lora_notes(before, after)
    model = _patched(model, [(s, p) for (of, s, _), p in rounds.items() if of == "dit"])
    if notes:
        set_model_info(model, after)
    clip = _patched(clip, [(s, p) for (of, s, _), p in rounds.items() if of == "text"])
    return model, clip, "\n".join([report(adapter, match, clip is not None), *notes])


def _targets(model: Any, clip: Any) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """The names of the weights that an adapter may change, and their shapes, by its module keys."""
    states: dict[str, Mapping[str, Tensor]] = {}
    if model is not None:
        model_info(model)  # raises for other families
        states["dit"] = model.model.state_dict()
    if clip is not None:
        states["bert"] = states["t5"] = clip.cond_stage_model.state_dict()
    keys, shapes = {}, {}
    for part, state in states.items():
        prefix = _PREFIXES[part]
        own = {
            key[len(prefix) :]: tuple(value.shape) for key, value in state.items() if key.startswith(prefix)
        }
        shapes.update(module_shapes(own, part))
        keys.update({f"{part}.{name.removesuffix('.weight')}": prefix + name for name in own})
    return keys, shapes


def _patches(patch: Patch, key: str) -> Iterator[tuple[Target, Any]]:
    """A patch as ComfyUI's, for the weight ``key`` and its bias."""
    if patch.tensors:
        yield from _weight_patch(patch, key)
    if patch.bias is not None:
        bias = key.removesuffix("weight") + "bias"
        if patch.bias_whole:
            yield bias, PatchAdapter.of(SetWeight({"value": patch.bias}, rows=patch.rows))
            return
        yield _sliced(bias, patch.rows), ("diff", (patch.bias.reshape(-1),))


def _weight_patch(patch: Patch, key: str) -> Iterator[tuple[Target, Any]]:
    if isinstance(patch, LoRA):
        # Packs that look for LoRAs on a model recognize this one
        given = (patch.tensors["up"], patch.tensors["down"], patch.alpha, None, None, None)
        yield _sliced(key, patch.rows), comfy.weight_adapter.LoRAAdapter(set(), given)
    else:
        yield key, PatchAdapter.of(replace(patch, bias=None))


def _sliced(key: str, rows: tuple[int, int] | None) -> Target:
    return key if rows is None else (key, (0, rows[0], rows[1] - rows[0]))


def _patched(owner: Any, rounds: list[tuple[float, dict[Target, Any]]]) -> Any:
    """A clone of a MODEL or CLIP with patches at their strengths; None stays None."""
    if owner is None:
        return None
    owner = owner.clone()
    for strength, patches in rounds:
        missing = set(patches) - set(owner.add_patches(patches, strength))
        if missing:
            raise LoraError(f"ComfyUI found no {', '.join(map(str, sorted(missing, key=str)))} to patch")
    return owner


def _base(model: Any, clip: Any) -> str:
    """What a LoRA is put on, in words."""
    said = []
    if model is not None:
        blocks = depth_of(_targets(model, None)[1])
        said.append(f"this HunyuanDiT {model_info(model).version} of {blocks} blocks")
    if clip is not None:
        said.append("its text encoders" if said else "these text encoders")
    return " and ".join(said)


def report(adapter: Adapter, match: Match | None = None, with_clip: bool = False) -> str:
    """What a LoRA is, its trigger words, and what of it does not fit, one line each."""
    lines = [adapter.describe()]
    if trigger := adapter.trigger():
        lines.append(f"trigger words: {trigger}")
    for part in PARTS if match is not None else ():
        missing = [name for name in cast(Match, match).unmatched if name.startswith(f"{part}.")]
        if not missing:
            continue
        if part != "dit" and not with_clip:
            lines.append(f"{_NAMES[part]}: {len(missing)} modules left out; connect clip to use them")
        else:
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            names = ", ".join(name.partition(".")[2] for name in missing[:_SHOWN])
            lines.append(f"{_NAMES[part]} has no {names}{more}")
    return "\n".join(lines)
