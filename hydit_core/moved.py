"""Modules that stood elsewhere in 0.1: their former names still import, with a warning, until 0.3."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "config": ("facts", "model.config"),
    "data.fingerprints": ("data.cache.fingerprints",),
    "data.images": ("images",),
    "data.store": ("data.cache.store",),
    "data.text_cache": ("data.cache.text",),
    "lora.formats": ("lora.reading", "lora.writing"),
    "model.layer_weights": ("layer_weights",),
    "png": ("pictures.png", "images"),
    "redraw": ("pictures.redraw",),
    "train.attention": ("model.attention",),
    "train.frozen": ("weights.frozen",),
    "weights.companions": ("weights.beside", "weights.single"),
    "weights.dtypes": ("dtypes",),
    "weights.parts": ("weights.bundle", "weights.info"),
    "workflow": ("pictures.workflow",),
}
"""Former name in this package -> where its contents are now."""


RE_EXPORTED: dict[str, dict[str, str]] = {
    "data": {
        "data.cache.latents": "LatentCache build_latent_cache open_latent_cache require_outside_sources "
        "user_cache_folder",
        "data.cache.text": "TextCache build_text_cache",
        "data.config": "BucketConfig CacheConfig ControlConfig DataConfig SourceConfig",
        "data.control_images": "ControlImages",
        "data.dataset": "Batch TrainData open_dataset",
        "data.manifest": "Manifest Record",
        "data.order": "BatchOrder hash_int sample_generator uniform",
        "data.summary": "DataSummary",
        "images": "Geometry canny load_picture to_tensor",
    },
    "diffusion": {
        "diffusion.denoiser": "PREDICTIONS Denoiser",
        "diffusion.guidance": "GuidedDenoiser guide",
        "diffusion.losses": "LossTerms diffusion_loss sample_timesteps training_noise",
        "diffusion.samplers": "DEFAULT_SPACING SAMPLERS default_noise_sampler draw_noise noise_sampler_from "
        "sample_ddim sample_ddpm sample_dpmpp_2m sample_euler start_latents",
        "diffusion.schedule": "SPACINGS Schedule",
    },
    "generate": {"generate.__main__": "main"},
    "model": {
        "model.attention": "sdpa",
        "model.controlnet": "ControlNet combine_controls",
        "model.dit": "Context DiT",
        "model.rope": "apply_rope rope_table",
    },
    "pipeline": {"loading": "load outline"},
    "text": {
        "text.encoders": "TextEncoders",
        "text.features": "PromptReport TextFeatures TokenReport Tokens",
        "text.loading": "load_text_encoders",
        "text.tokenizers": "Tokenizers",
    },
    "weights.load": {
        "weights.bundle": "open_model",
        "weights.info": "model_info",
        "weights.save": "save_checkpoint",
    },
}
"""Module -> where the names are that it re-exported."""

_ROOT = __name__.removesuffix(".moved")
_FORMER = {f"{_ROOT}.{name}": homes for name, homes in MOVED.items()}


def former(package: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module that re-exported names (:data:`RE_EXPORTED`)."""
    homes = {
        name: home
        for home, names in RE_EXPORTED[package.removeprefix(f"{_ROOT}.")].items()
        for name in names.split()
    }

    def find(name: str) -> Any:
        if name not in homes:  # a submodule, too, is asked for so before it is imported
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return _found(name, homes[name])

    return find


def _found(name: str, home: str) -> Any:
    text = f"{name} is in hydit_core.{home} now; its former place goes with 0.3"
    warnings.warn(text, DeprecationWarning, stacklevel=3)
    return getattr(import_module(f"{_ROOT}.{home}"), name)


class _Former(MetaPathFinder, Loader):
    """Makes an empty module of a former name, which looks for everything in the new places."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in _FORMER else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        homes = _FORMER[module.__name__]

        def find(name: str) -> Any:
            for home in homes if not name.startswith("__") else ():
                if hasattr(import_module(f"{_ROOT}.{home}"), name):
                    return _found(name, home)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        vars(module)["__getattr__"] = find


def install() -> None:
    """Let the former names import; in ComfyUI, where this package has another name, below that one."""
    sys.meta_path.append(_Former())
