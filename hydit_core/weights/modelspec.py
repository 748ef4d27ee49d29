"""The metadata in every file that we write: ``hydit.config`` and the Model Metadata Standard.

The standard: https://github.com/Stability-AI/ModelSpec (version 1.0.1).
"""

from __future__ import annotations

from collections.abc import Mapping

from ..facts import METADATA_KEY, ModelInfo
from ..model.config import DiTConfig
from .detect import model_size

_IMPLEMENTATION = "https://github.com/Tencent/HunyuanDiT"
ARCHITECTURE = "hunyuan-dit"
ARCHITECTURES = {"g/2": "hunyuan-dit-g2", "XL/2": "hunyuan-dit-xl2"}


def file_metadata(
    config: DiTConfig,
    info: ModelInfo,
    *,
    role: str = "",
    title: str = "",
    source: str = "",
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The metadata of a file that holds this model; ``extra`` overrides the rest.

    Args:
        role: ``controlnet`` or ``lora``; empty for the model itself.
        source: what the file was made from.
    """
    size = model_size(config)
    architecture = f"{ARCHITECTURES.get(size, ARCHITECTURE)}-{info.version.replace('.', '_')}"
    metadata = {
        METADATA_KEY: info.to_json(),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/{role}" if role else architecture,
        "modelspec.implementation": _IMPLEMENTATION,
        "modelspec.title": title or " ".join(filter(None, (f"HunyuanDiT-{size} {info.version}", role))),
        "modelspec.prediction_type": info.diffusion.prediction,
        "modelspec.resolution": f"{info.defaults.width}x{info.defaults.height}",
        "hydit.version": info.version,
        # What diffusers and transformers look for before they load a file.
        "format": "pt",
    }
    if source:
        metadata["hydit.source"] = source
    return {**metadata, **(extra or {})}
