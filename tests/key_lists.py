"""The complete key lists of the published layouts, and files with them that cost neither disk nor time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

Shape = tuple[int, ...]

_RULES = json.loads((Path(__file__).parent / "data" / "keys.json").read_text())
NAMES = tuple(_RULES)


def key_list(name: str) -> dict[str, Shape]:
    """Every key and shape of a published layout: ``g2_v12``, ``diffusers_g2_v12``, ``cn_v11`` ..."""
    keys: dict[str, Shape] = {}
    for group in _RULES[name]:
        numbers = range(group["blocks"][0], group["blocks"][1] + 1) if group["blocks"] else [None]
        for number in numbers:
            for key, shape in group["keys"].items():
                keys[key if number is None else key.replace("{n}", str(number))] = tuple(shape)
    return keys


def sparse_safetensors(path: Path, shapes: Mapping[str, Shape], dtype: str = "F16", size: int = 2) -> Path:
    """A valid safetensors file full of zeros that takes no room on disk. Written by hand on purpose."""
    header, offset = {}, 0
    for key, shape in shapes.items():
        count = 1
        for n in shape:
            count *= n
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + count * size]}
        offset += count * size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return path
