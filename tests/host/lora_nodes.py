"""LoRA files in ComfyUI's folder for the tests of a module, and the node that loads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graphs import Graph
from lora_files import Form

LOADER = "HyDiTLoraLoader"


@contextmanager
def written(host: Any, forms: Mapping[str, Form]) -> Iterator[Path]:
    """The folder with these files in it, by name; empty again afterwards."""
    folder = host.models_dir / "loras"
    for name, form in forms.items():
        form.write(folder / name)
    host.refresh()
    yield folder
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    host.refresh()


def loader(host: Any, model: Any, name: str, **widgets: Any) -> Graph:
    """The loader, number 2, on a MODEL."""
    g = Graph()
    node = g.add(LOADER, _defaults=True, model=host.give(g, model), lora_name=name, **widgets)
    for number in (0, 2):
        g.add("HyDiTTestCapture", value=node.out(number))
    return g


def load(host: Any, model: Any, name: str, **widgets: Any) -> tuple[Any, str]:
    """The MODEL with the LoRA, and the node's report."""
    found, report = host.values(loader(host, model, name, **widgets), ("2", 0), ("2", 2))
    return found, report
