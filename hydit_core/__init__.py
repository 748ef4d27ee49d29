"""HunyuanDiT: model, samplers, weights, LoRA merging and training, free of ComfyUI.

>>> import hydit_core
>>> pipe = hydit_core.load()  # the embedded model; or a file or folder
>>> pipe("a red apple", seed=1)[0].save("apple.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import ConfigError, DataError, HyditError, WeightsError
from .version import VERSION

if TYPE_CHECKING:
    from .facts import DiffusionConfig, ModelInfo, SamplingDefaults
    from .model.config import DiTConfig
    from .model.controlnet import ControlNet
    from .model.dit import DiT
    from .pipeline import Pipeline, load
    from .presets import PRESETS
    from .weights.load import load_controlnet, load_dit
    from .weights.save import save_checkpoint

__version__ = VERSION

# Found when they are first asked for: importing hydit_core alone must not import torch.
_HOMES = {
    "PRESETS": "presets",
    "ControlNet": "model.controlnet",
    "DiT": "model.dit",
    "DiTConfig": "model.config",
    "DiffusionConfig": "facts",
    "ModelInfo": "facts",
    "Pipeline": "pipeline",
    "SamplingDefaults": "facts",
    "load": "pipeline",
    "load_controlnet": "weights.load",
    "load_dit": "weights.load",
    "save_checkpoint": "weights.save",
}

__all__ = [
    "PRESETS",
    "ConfigError",
    "ControlNet",
    "DataError",
    "DiT",
    "DiTConfig",
    "DiffusionConfig",
    "HyditError",
    "ModelInfo",
    "Pipeline",
    "SamplingDefaults",
    "WeightsError",
    "load",
    "load_controlnet",
    "load_dit",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
