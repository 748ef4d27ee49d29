"""Writes adapters: as a PEFT folder, or as one file for kohya's trainer or for ComfyUI."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraError
from ..new_files import atomic_path
from ..weights.output import check_output
from ..weights.source import cast
from ..weights.writer import save_safetensors
from .adapter import PARTS, Adapter
from .fuse import fused
from .kinds import DoRA
from .names import comfy_name, fused_count, kohya_name
from .patch import Patch
from .scaling import PEFT_CONFIG

FORMATS = ("comfy", "peft", "kohya")
_FILE = "adapter_model.safetensors"

DORA_NOTE = (
    "DoRA along output rows: ComfyUI divides by the norm of the base weight, not of the changed one, so its"
    " own LoRA loader applies this file at slightly different strength; our loader applies it as trained"
)
T5_NOTE = (
    "ComfyUI's own LoRA loader does not know kohya's names of mT5 modules; --format comfy has names it knows"
)


def write(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    format: str = "comfy",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Write an adapter, atomically.

    * ``comfy``: one safetensors file whose names ComfyUI's own loader knows, for DiT, BERT and mT5.
    * ``kohya``: one safetensors file with ``lora_unet_`` and ``lora_te1_`` names.
    * ``peft``: a folder for ``PeftModel.from_pretrained`` on the DiT; adapters of the text encoders are
      folders in it. Plain LoRA and DoRA only.

    Slices of a fused projection become one change of the whole.

    Args:
        path: the file to write or, for ``peft``, the folder, new or empty.
        dtype: of matrices; default: as they are. Alphas are always exact.
        metadata: takes precedence over the adapter's own.
        overwrite: replace an existing file, unless the adapter was made from it.

    Returns:
        Notes about the file for the user, one line each.

    Raises:
        LoraError: if the format or the dtype cannot hold the adapter.
        WeightsError: if it cannot be written, or is there.
    """
    path = Path(path)
    form, folder = f"the format {format}", format == "peft"
    check_output(path, adapter.files, overwrite=overwrite, folder=folder, form=form)
    patches = _whole(adapter, format)
    texts = {**adapter.metadata, **(metadata or {})}
    if format == "peft":
        _write_folder(path, patches, dtype, texts)
        return ()
    save_safetensors(path, _tensors(patches, format, dtype), texts)
    return _notes(patches, format)


def to_tensors(
    adapter: Adapter, format: str = "comfy", *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The tensors of a file of the format ``comfy`` or ``kohya``, by the names that they have there.

    Raises:
        LoraError: if the format cannot hold the adapter.
    """
    return _tensors(_whole(adapter, format), format, dtype)


def _whole(adapter: Adapter, format: str) -> dict[str, Patch]:
    """One patch for each module."""
    if format not in FORMATS:
        raise LoraError(f"no format {format!r}; there are {', '.join(FORMATS)}")
    if not adapter.modules:
        raise LoraError(f"{adapter.name} changes nothing; there is no LoRA to write")
    return {
        module: fused(given, _rows(module, given), where=module) for module, given in adapter.modules.items()
    }


def _tensors(patches: Mapping[str, Patch], format: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    name = comfy_name if format == "comfy" else kohya_name
    return {
        (key := f"{name(module)}.{end}"): _stored(key, value, dtype)
        for module, patch in patches.items()
        for end, value in _file_tensors(patch, module, format).items()
    }


def _rows(module: str, patches: Sequence[Patch]) -> int:
    """How many rows the module's weight has, as far as the patches tell."""
    given = patches[0]
    if given.rows is not None:
        start, stop = given.rows
        return max((stop - start) * fused_count(module), *(p.rows[1] for p in patches if p.rows), 0)
    if given.shape is not None:
        return given.shape[0]
    return given.bias.numel() if given.bias is not None else 0


def _stored(key: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach()
    if key.endswith(".alpha"):
        return tensor
    stored = cast(tensor, dtype).contiguous()
    if dtype == torch.float16 and bool((stored.isinf() & tensor.isfinite()).any()):
        raise LoraError(
            f"{key} reaches {float(tensor.abs().max()):.4g}, which fp16 does not hold: use bf16 or fp32"
        )
    return stored


def _file_tensors(patch: Patch, module: str, format: str) -> dict[str, Tensor]:
    """One patch as kohya, LyCORIS and ComfyUI spell it."""
    if patch.bias_whole or (patch.plain.comfy_only and format != "comfy"):
        raise LoraError(f"no format for {module}: whole weights go into comfy alone, whole biases into none")
    if patch.rank == 0 and patch.scale != 1 and patch.tensors:
        patch = _without_scale(patch)  # the spelling has no alpha for these
    found = patch.file_tensors()
    if patch.rank:
        found["alpha"] = _alpha(patch)
    if patch.bias is not None:
        found["diff_b"] = patch.bias
    return found


def _without_scale(patch: Patch) -> Patch:
    """The same change at scale 1: the scale goes into a tensor."""
    first = next(iter(patch.tensors))
    tensors = {**patch.tensors, first: patch.tensors[first].float() * patch.scale}
    return replace(patch, tensors=tensors, scale=1.0)


def _alpha(patch: Patch) -> Tensor:
    """The alpha that gives a reader exactly this scale, as float32 if that is precise enough."""
    alpha = exact_alpha(patch)
    single = torch.tensor(alpha, dtype=torch.float32)
    return single if single.item() == alpha else torch.tensor(alpha, dtype=torch.float64)


def exact_alpha(patch: Patch) -> float:
    """The alpha for which alpha / rank equals the scale to the last bit."""
    alpha = patch.alpha
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((value for value in near if value / patch.rank == patch.scale), alpha)


def _notes(patches: Mapping[str, Patch], format: str) -> tuple[str, ...]:
    notes = []
    if any(isinstance(patch, DoRA) and patch.axis == 0 for patch in patches.values()):
        notes.append(DORA_NOTE)
    if format == "kohya" and any(module.startswith("t5.") for module in patches):
        notes.append(T5_NOTE)
    return tuple(notes)


def _write_folder(
    path: Path, patches: Mapping[str, Patch], dtype: torch.dtype | None, metadata: Mapping[str, str]
) -> None:
    for module, patch in patches.items():
        if patch.peft_tensors() is None or patch.bias is not None:
            what = "a change of a bias" if patch.bias is not None else patch.kind
            raise LoraError(f"peft's format cannot hold {module} ({what}); use the format comfy or kohya")
    with atomic_path(path) as folder:
        for part in PARTS:
            own = {m.partition(".")[2]: p for m, p in patches.items() if m.startswith(f"{part}.")}
            if own:
                _write_part(folder if part == "dit" else folder / part, own, dtype, metadata)


def _write_part(
    folder: Path, patches: Mapping[str, Patch], dtype: torch.dtype | None, metadata: Mapping[str, str]
) -> None:
    stored = {
        (key := f"base_model.model.{module}.{end}"): _stored(key, value, dtype)
        for module, patch in patches.items()
        for end, value in (patch.peft_tensors() or {}).items()
    }
    save_safetensors(folder / _FILE, stored, {"format": "pt", **metadata})
    text = json.dumps(peft_config(patches), indent=2) + "\n"
    (folder / PEFT_CONFIG).write_text(text, encoding="utf-8")


def peft_config(patches: Mapping[str, Patch]) -> dict[str, Any]:
    """``adapter_config.json`` for these patches, by module names without their part.

    Raises:
        LoraError: if only some of them are DoRA: peft has one switch for all.
    """
    dora = {isinstance(patch, DoRA) for patch in patches.values()}
    if len(dora) > 1:
        raise LoraError("peft's format cannot hold DoRA of some modules only; use the format comfy or kohya")
    ranks = {module: patch.rank for module, patch in patches.items()}
    alphas = {module: _number(exact_alpha(patch)) for module, patch in patches.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "target_modules": sorted(patches),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": dora.pop(),
        "modules_to_save": None,
    }


def _number(value: float) -> float | int:
    return int(value) if value.is_integer() else value
