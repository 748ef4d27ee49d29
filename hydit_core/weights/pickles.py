"""Reading ``torch.save`` files as tensors only: no code of the file ever runs."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import WeightsError
from .source import MemorySource

LOAD_KEYS = ("ema", "module", "state_dict", "model_state_dict", "model", "distill", "merge", "params")
"""Where trainers put the weights inside the saved dictionary, the preferred first."""


def open_pickle(path: Path, *, load_key: str | None = None) -> MemorySource:
    """Open a ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file.

    Zip files (torch >= 1.6) are mapped, so nothing is read until a tensor is used; the older format is read
    at once. Only tensors and plain data are unpickled; the one class let through is ``argparse.Namespace``,
    the command line that DeepSpeed checkpoints of this model carry beside their weights.

    Args:
        load_key: which of several sets of weights to take (``ema``, ``module`` ...); default: the first
            of :data:`LOAD_KEYS` that the file has.

    Raises:
        WeightsError: if the file holds other objects, no tensors, or not that key.
    """
    loaded = _load(path)
    tensors, used = _find_tensors(loaded, path, load_key)
    metadata = {"hydit.load_key": used} if used else {}
    if len(choices := _choices(loaded)) > 1:
        metadata["hydit.load_keys"] = ", ".join(choices)
    return MemorySource(tensors, path=path, metadata=metadata)


def _load(path: Path) -> Any:
    is_zip = zipfile.is_zipfile(path)
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            if is_zip and path.suffix != ".safetensors":  # torch goes by that suffix when it has a name
                return torch.load(path, mmap=True, **options)
            with open(path, "rb") as file:
                return torch.load(file, **options)
    except Exception as error:  # unpickling damaged bytes can raise nearly anything
        names = _refused_globals(path, error) if is_zip else _named_in(error)
        if names:
            raise WeightsError(
                f"{path} holds objects that only running its code could restore ({', '.join(names)});"
                " refused, because such a file can run anything. Ask its author for a safetensors file,"
                " or a file that holds nothing but the state dict."
            ) from None
        raise WeightsError(
            f"{path} cannot be read as a torch file of tensors; it is damaged, incomplete or something else"
            f"{_reason(error)}. Download or save it again."
        ) from error


def _refused_globals(path: Path, error: Exception) -> list[str]:
    try:
        found = list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the file is damaged, not dangerous
        return _named_in(error)
    return [name for name in found if name != "argparse.Namespace"] or _named_in(error)


def _named_in(error: Exception) -> list[str]:
    match = re.search(r"GLOBAL ([\w.]+)", str(error))
    return [match.group(1)] if match else []


def _reason(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    # Torch's advice to switch the safety off is not ours.
    return "" if "weights_only" in line else f" ({line})"


def _tensors_of(value: Any) -> dict[str, torch.Tensor]:
    if not isinstance(value, Mapping):
        return {}
    return {key: v for key, v in value.items() if isinstance(key, str) and isinstance(v, torch.Tensor)}


def _find_tensors(loaded: Any, path: Path, load_key: str | None) -> tuple[dict[str, torch.Tensor], str]:
    """The flat state dict inside what was saved, and the keys that led to it."""
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path} holds a {type(loaded).__name__}; expected a dictionary of tensors")
    choices = _choices(loaded)
    if load_key is not None:
        if load_key in choices:
            tensors, rest = _find_tensors(loaded[load_key], path, None)
            return tensors, f"{load_key}.{rest}" if rest else load_key
        found = f"it has {', '.join(choices)}" if choices else "it is one plain state dict"
        raise WeightsError(f"{path} has no weights under {load_key!r}; {found}")
    tensors = _tensors_of(loaded)
    # A checkpoint may hold tensors beside its weights (a step counter, a random state).
    for key in (*LOAD_KEYS, *(() if tensors else choices)):
        if key in choices:
            tensors, rest = _find_tensors(loaded[key], path, None)
            return tensors, f"{key}.{rest}" if rest else key
    if tensors:
        return tensors, ""
    raise WeightsError(f"{path} holds no tensors" + _zero_hint(path))


def _choices(loaded: Mapping[Any, Any]) -> list[str]:
    """The keys under which there are tensors."""
    return [str(key) for key, value in loaded.items() if isinstance(value, Mapping) and _holds_tensors(value)]


def _holds_tensors(value: Any, depth: int = 3) -> bool:
    if not isinstance(value, Mapping) or depth == 0:
        return False
    return bool(_tensors_of(value)) or any(_holds_tensors(inner, depth - 1) for inner in value.values())


def _zero_hint(path: Path) -> str:
    if "zero_pp_rank" in path.name or "optim_states" in path.name:
        return "; it is an optimizer shard of DeepSpeed, the weights are in mp_rank_00_model_states.pt"
    return ""
