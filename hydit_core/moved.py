"""Modules that stood elsewhere in 0.1: their former names still import, with a warning, until 0.3."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
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


def former(package: str, modules: Sequence[str]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` for names that it re-exported from ``modules`` of ``package``."""

    def find(name: str) -> Any:
        if not name.startswith("__"):
            for module in modules:
                full = f"{package}.{module}"
                found = vars(import_module(full)).get(name)
                if found is not None:
                    warnings.warn(
                        f"{name} is in {full} now; its former place goes with 0.3",
                        DeprecationWarning,
                        stacklevel=2,
                    )
                    return found
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


class _Former(MetaPathFinder, Loader):
    """Makes an empty module of a former name, which looks for everything in the new places."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(f"{self.package}.")
        return ModuleSpec(fullname, self) if not package and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        homes = MOVED[module.__name__.removeprefix(f"{self.package}.")]
        vars(module)["__getattr__"] = former(self.package, homes)


def install(package: str) -> None:
    """Let the former names under ``package`` import."""
    if not any(isinstance(finder, _Former) and finder.package == package for finder in sys.meta_path):
        sys.meta_path.append(_Former(package))
