"""HunyuanDiT: model, samplers, weights, LoRA merging and training, free of ComfyUI.

>>> import hydit_core
>>> pipe = hydit_core.load()  # the embedded model; or a file or folder
>>> pipe("a red apple", seed=1)[0].save("apple.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import ConfigError, DataError, HyditError, LoraError, WeightsError
from .moved import install
from .version import VERSION

if TYPE_CHECKING:
    from .facts import DiffusionConfig, ModelInfo, SamplingDefaults
    from .image_prompts.encoder import load_image_encoder
    from .image_prompts.run import ImagePrompt
    from .loading import load
    from .lora.adapter import Adapter as LoraAdapter
    from .lora.extract import combine as combine_loras
    from .lora.extract import extract as extract_lora
    from .lora.merge import merge_files as merge_loras
    from .lora.reading import read as load_lora
    from .lora.writing import write as save_lora
    from .model.config import DiTConfig
    from .model.controlnet import ControlNet
    from .model.dit import DiT
    from .pipeline import Pipeline
    from .presets import PRESETS
    from .weights.load import load_controlnet, load_dit, load_ip_adapter
    from .weights.save import save_checkpoint

__version__ = VERSION
install()

# Module, or module:name in it. Imported on first use: importing hydit_core alone must not import torch.
_HOMES = {
    "PRESETS": "presets",
    "ControlNet": "model.controlnet",
    "DiT": "model.dit",
    "DiTConfig": "model.config",
    "DiffusionConfig": "facts",
    "ImagePrompt": "image_prompts.run",
    "LoraAdapter": "lora.adapter:Adapter",
    "ModelInfo": "facts",
    "Pipeline": "pipeline",
    "SamplingDefaults": "facts",
    "combine_loras": "lora.extract:combine",
    "extract_lora": "lora.extract:extract",
    "load": "loading",
    "load_controlnet": "weights.load",
    "load_dit": "weights.load",
    "load_image_encoder": "image_prompts.encoder",
    "load_ip_adapter": "weights.load",
    "load_lora": "lora.reading:read",
    "merge_loras": "lora.merge:merge_files",
    "save_checkpoint": "weights.save",
    "save_lora": "lora.writing:write",
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
    "ImagePrompt",
    "LoraAdapter",
    "LoraError",
    "ModelInfo",
    "Pipeline",
    "SamplingDefaults",
    "WeightsError",
    "combine_loras",
    "extract_lora",
    "load",
    "load_controlnet",
    "load_dit",
    "load_image_encoder",
    "load_ip_adapter",
    "load_lora",
    "merge_loras",
    "save_checkpoint",
    "save_lora",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, _, own = _HOMES[name].partition(":")
    value = getattr(import_module(f".{module}", __name__), own or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
