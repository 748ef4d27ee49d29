"""Files of the published sizes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from key_lists import sparse_safetensors
from torch import Tensor

#: What the published LoRA runs adapt.
PROJECTIONS = tuple(f"{name}.weight" for name in ("Wqkv", "q_proj", "kv_proj", "out_proj"))


def random_file(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """Float16 values of the size that trained weights have, with nothing of it in memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sparse_safetensors(path, shapes)
    values = torch.randn(2**23, generator=torch.Generator().manual_seed(0)) * 0.02
    block = memoryview(values.half().numpy()).cast("B")
    with path.open("r+b") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        file.seek(begin)
        left = path.stat().st_size - begin
        while left:
            left -= file.write(block[:left])
    return path


def attention_lora(rank: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Float16 factors (down, up) for each attention projection of a DiT, the pooler's q included, by module.

    Their product is about as large as the weights of :func:`random_file`.
    """
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for key, shape in shapes.items():
        module = key.removesuffix(".weight")
        if not key.endswith(PROJECTIONS) or not module.startswith(("blocks.", "pooler.q_proj")):
            continue
        out, columns = shape
        draw = [0.05 * torch.randn(size, generator=generator) for size in ((rank, columns), (out, rank))]
        factors[module] = draw[0].half(), draw[1].half()
    return factors
