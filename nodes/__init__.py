"""The nodes, one file a family."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from comfy_api.latest import ComfyExtension, io

NODES: list[type[io.ComfyNode]] = []

for _family in ("loaders", "text", "latent", "sampling", "save"):
    if (Path(__file__).parent / f"{_family}.py").is_file():
        _module = import_module(f".{_family}", __name__)
        NODES += [
            value
            for value in vars(_module).values()
            if isinstance(value, type)
            and issubclass(value, io.ComfyNode)
            and value.__module__ == _module.__name__
            and value.__name__.startswith("HyDiT")
        ]


class HyDiTExtension(ComfyExtension):
    """What ComfyUI asks for the list of nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> HyDiTExtension:
    """Called by ComfyUI once, when it loads the pack."""
    return HyDiTExtension()
