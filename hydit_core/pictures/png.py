"""Pictures that remember how they were made: the parameters in a PNG's text chunks.

``parameters`` is the line format that picture browsers and galleries show; ``hydit`` is the same as JSON,
for programs; ``workflow`` and ``prompt`` are what ComfyUI looks for in a picture that is dropped on its page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from ..errors import DataError
from ..images import png_head
from ..untrusted import parse_json

FORMAT = 1
# Names in the `parameters` line, in its customary order.
_LINE = {
    "steps": "Steps",
    "sampler": "Sampler",
    "spacing": "Schedule type",
    "cfg": "CFG scale",
    "guidance_rescale": "CFG rescale",
    "cfg_end": "CFG end",
    "forecast": "Forecast",
    "seed": "Seed",
    "model": "Model",
    "strength": "Denoising strength",
    "hires": "Hires upscale",
    "mask_blur": "Mask blur",
}


def parameters_text(parameters: Mapping[str, Any]) -> str:
    """The ``parameters`` text: prompt, negative prompt, then one line of settings."""
    parameters = {
        **parameters,
        "hires": parameters.get("upscale", {}).get("factor"),
        "mask_blur": parameters.get("inpaint", {}).get("feather"),
    }
    shown = [f"{label}: {parameters[key]}" for key, label in _LINE.items() if parameters.get(key) is not None]
    shown.insert(1, f"Size: {parameters['width']}x{parameters['height']}")
    lines = [str(parameters["prompt"])]
    if parameters.get("negative"):
        lines.append(f"Negative prompt: {parameters['negative']}")
    return "\n".join([*lines, ", ".join(shown)])


def png_info(parameters: Mapping[str, Any], **graph: Any) -> PngInfo:
    """The chunks. ``parameters`` needs at least prompt, width, height and steps.

    ``graph`` is ``workflow`` and ``prompt`` of a :class:`~.workflow.Graph`, if there is one.
    """
    info = PngInfo()
    info.add_itxt("parameters", parameters_text(parameters))
    info.add_itxt("hydit", json.dumps({"format": FORMAT, **parameters}, ensure_ascii=False))
    for name, value in graph.items():
        # ComfyUI's older pages misread international text chunks; JSON can do with ASCII.
        info.add_text(name, json.dumps(value))
    return info


def read_parameters(path: str | Path) -> dict[str, Any]:
    """The ``hydit`` chunk of a picture. Its pixels are not decoded.

    Raises:
        DataError: the file is no picture, or carries no such chunk.
    """
    try:
        with open(path, "rb") as file, Image.open(png_head(file) or file) as image:
            text = image.info.get("hydit") if image.format == "PNG" else None
    except Exception as error:  # Pillow raises many kinds, for bombs of pixels or of compressed text others
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        if isinstance(error, UnidentifiedImageError):
            reason = "no known format"
        raise DataError(f"{path}: not a readable picture ({reason})") from error
    if not isinstance(text, str):
        raise DataError(
            f"{path}: carries no `hydit` chunk; it was not written by hydit, or was re-saved without it"
        )
    return parse_json(text, f"{path}: chunk 'hydit'", error=DataError)
