"""Load the pack from several folders in a ComfyUI of its own, and print as JSON what that did.

    python import_probe.py COMFYUI BASE FOLDER...

Its own process, because it must see the first import of the pack, right after ComfyUI's own.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.abc
import json
import sys
import time
from typing import Any

#: What is slow to import. ComfyUI itself imports some of it, so that sys.modules alone tells nothing.
HEAVY = ("transformers", "diffusers", "peft", "sentencepiece", "accelerate", "cv2", "pyarrow", "pydantic")


class Recorder(importlib.abc.MetaPathFinder):
    """Notes every module that is looked for because of the pack's code, and finds none."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.heavy: dict[str, str] = {}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        # The host reads pyproject.toml between the pack's import and its nodes: that is not the pack's.
        frame, through = sys._getframe(1), []
        while frame is not None:
            if frame.f_code.co_filename.startswith(self.folder):
                through.append(frame.f_code.co_filename[len(self.folder) + 1 :])
            frame = frame.f_back
        if through:
            self.asked.append(fullname)
        if through and fullname in HEAVY:
            self.heavy[fullname] = " < ".join(through)


def start_host(comfy: str, base: str) -> Any:
    """ComfyUI's modules as main.py has them when it comes to the custom nodes; returns `nodes`."""
    sys.path[0] = comfy  # instead of this file's folder
    sys.argv = ["main.py", "--cpu", "--base-directory", base, "--disable-api-nodes"]
    importlib.import_module("comfy.options").enable_args_parsing()
    importlib.import_module("utils.extra_config")
    nodes = importlib.import_module("nodes")
    importlib.import_module("execution")
    server = importlib.import_module("server")
    server.PromptServer(asyncio.new_event_loop())
    return nodes


def load(nodes: Any, folder: str, network: list[str]) -> dict[str, Any]:
    """Load the pack at `folder` while heavy packages seem not to be loaded yet."""
    before, path = set(sys.modules), list(sys.path)
    mappings = dict(nodes.NODE_CLASS_MAPPINGS)
    hidden = {name: module for name, module in sys.modules.items() if name.split(".")[0] in HEAVY}
    for name in hidden:
        del sys.modules[name]
    recorder = Recorder(folder)
    sys.meta_path.insert(0, recorder)
    network.clear()
    began = time.perf_counter()
    try:
        loaded = asyncio.run(nodes.load_custom_node(folder, set()))
    finally:
        seconds = time.perf_counter() - began
        sys.meta_path.remove(recorder)
        sys.modules.update(hidden)
    module = sys.modules.get(folder.replace(".", "_x_"))
    changed = {k for k, v in nodes.NODE_CLASS_MAPPINGS.items() if mappings.get(k) is not v}
    return {
        "folder": folder,
        "loaded": loaded,
        "seconds": seconds,
        "nodes": sorted(changed),
        "asked": len(recorder.asked),
        "heavy": recorder.heavy,
        "modules": sorted(name for name in set(sys.modules) - before if not name.startswith(folder[:5])),
        "network": list(network),
        "path_kept": sys.path == path,
        "mappings": hasattr(module, "NODE_CLASS_MAPPINGS"),
        "web": nodes.EXTENSION_WEB_DIRS.get(folder.replace("\\", "/").split("/")[-1]),
    }


def main(comfy: str, base: str, folders: list[str]) -> None:
    nodes = start_host(comfy, base)
    network: list[str] = []

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request"):
            network.append(f"{event} {arguments[1:]}")

    sys.addaudithook(audit)
    told = [load(nodes, folder, network) for folder in folders]
    print("PROBE " + json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
