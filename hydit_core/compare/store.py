"""The pictures of a comparison on the disk, so that a long run that broke off goes on.

Each picture is a PNG as ``generate`` writes it, with the pixels before rounding to 8 bit beside it (``.npy``,
16 bit) and what it cost (``.json``). The three appear together or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..images import Size, load_picture, probe_size, to_tensor
from ..new_files import atomic_path, write_new
from ..pictures.png import read_parameters
from ..untrusted import read_json

_SIDE = "side.json"
_LEVELS = 65535
_OF_ITEM = ("format", "prompt", "seed", "width", "height")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif"}


class Item(NamedTuple):
    """What all sides draw one picture of."""

    prompt: str
    seed: int
    size: Size | None

    @property
    def name(self) -> str:
        """A file's name that does not depend on the other items."""
        words = re.sub(r"\W+", "-", self.prompt)[:30].strip("-").encode()[:60].decode(errors="ignore")
        mark = hashlib.sha256(self.prompt.encode()).hexdigest()[:8]
        size = "" if self.size is None else f"-{self.size[0]}x{self.size[1]}"
        return f"{words}-{mark}-{self.seed}{size}"


@dataclass(frozen=True)
class Cost:
    """Of one picture: wall time, calls of the DiT while it was drawn, and how often it went through the DiT.

    A guided call takes a picture through the DiT twice, so ``passes`` is the work.
    """

    seconds: float
    calls: float
    passes: float


class Store:
    """One side's folder.

    Raises:
        ConfigError: it holds pictures of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self.settings = settings
        path = folder / _SIDE
        if path.exists():
            if (found := read_json(path, error=ConfigError)) != settings:
                different = sorted(
                    f"--{name.replace('_', '-')}"
                    for name in {*settings["options"], *_options(found)}
                    if settings["options"].get(name) != _options(found).get(name)
                )
                what = f"settings: {', '.join(different)}" if different else "files"
                raise ConfigError(
                    f"{folder} holds pictures of other {what}; choose another -o, or delete that folder"
                )
            return
        text = json.dumps(settings, ensure_ascii=False, indent=1)
        write_new(path, text.encode())

    def path(self, item: Item) -> Path:
        return self.folder / f"{item.name}.png"

    def has(self, item: Item) -> bool:
        path = self.path(item)
        return all(path.with_suffix(suffix).exists() for suffix in (".png", ".npy", ".json"))

    def put(self, item: Item, png: bytes, pixels: Tensor, cost: Cost) -> None:
        """Keep a picture: its PNG, and its pixels (3, H, W) in 0..1."""
        levels = (pixels.double() * _LEVELS).round().to(torch.int32).numpy().astype(np.uint16)
        array = io.BytesIO()
        np.save(array, levels)
        facts = json.dumps(vars(cost)).encode()
        write_new(self.path(item), png, {".npy": array.getvalue(), ".json": facts}, overwrite=True)

    def cost(self, item: Item) -> Cost:
        path = self.path(item).with_suffix(".json")
        found = read_json(path, error=DataError)
        try:
            return Cost(*(float(found[name]) for name in ("seconds", "calls", "passes")))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: not written by `hydit compare`; delete it") from error


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    found = settings.get("options")
    return found if isinstance(found, dict) else {}


def pixels_of(path: Path) -> Tensor:
    """A picture as (3, H, W), float32 in 0..1: from the ``.npy`` beside it, else from its own 8 bit.

    Raises :class:`DataError` for files that cannot be read.
    """
    exact = path.with_suffix(".npy")
    if not exact.exists():
        return (to_tensor(load_picture(path)) + 1) / 2
    width, height = probe_size(path)
    try:
        levels = np.load(exact, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{exact}: not the pixels of {path.name}: {error}") from error
    if levels.dtype != np.uint16 or levels.shape != (3, height, width):
        raise DataError(
            f"{exact}: not the pixels of {path.name}: {levels.dtype} {levels.shape}, expected uint16 "
            f"{(3, height, width)}"
        )
    return torch.from_numpy(levels.astype(np.float32) / _LEVELS)


def drawn_with(path: Path) -> dict[str, Any]:
    """All settings of a picture, the model's recommendations included, but not what it is of."""
    facts = read_parameters(path)
    return {name: value for name, value in facts.items() if name not in _OF_ITEM}


def write_text(path: Path, text: str) -> None:
    """Write or replace a report."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, "utf-8")
