"""HunyuanDiT for ComfyUI: clone this folder into ``ComfyUI/custom_nodes``."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("comfy_api") is None:
    raise ImportError(
        "this folder is a node pack, which only ComfyUI can import: clone it into ComfyUI/custom_nodes. "
        "Without ComfyUI, run `python -m hydit_core.generate` in this folder, or `import hydit_core`"
    )

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
