"""Other people's packs, to be run beside ours if they are available.

They are looked for under their repositories' names in the folder COMFYUI_PACKS, else in the host's own
custom_nodes. No part of them is in this repository.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest


def load_pack(host: Any, name: str, node: str) -> Path:
    """Load the pack into the running host; skips the test if it is not there or has no ``node``."""
    given = os.environ.get("COMFYUI_PACKS")
    places = [Path(given) / name] if given else []
    places += [host.comfy / "custom_nodes" / spelled for spelled in (name, name.lower())]
    folder = next((place for place in places if (place / "__init__.py").is_file()), None)
    if folder is None:
        pytest.skip(f"{name} is not there: clone it into a folder and name that in COMFYUI_PACKS")
    if node not in host.nodes.NODE_CLASS_MAPPINGS:
        asyncio.run(host.nodes.load_custom_node(str(folder)))
    if node not in host.nodes.NODE_CLASS_MAPPINGS:
        pytest.skip(f"{folder} does not load in ComfyUI {host.version}")
    return folder
