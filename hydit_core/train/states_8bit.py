"""AdamW's states in 8 bits, by torchao: of parts of parameters, and from a checkpoint to any number of parts.

Values that follow each other in a parameter, row after row, share a scale. Where a part would begin between
two such blocks, or is small, its states are in float32 (:func:`.optimizer_kinds.packs`); so a checkpoint of
parts holds what one of a whole does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..quiet import quiet_imports
from .optimizer_kinds import packs
from .parallel.copies import is_part, own

SIGNED: Mapping[str, bool] = {"exp_avg": True, "exp_avg_sq": False, "max_exp_avg_sq": False}
"""The states that are packed, and whether they have signs."""
_PARTS = ("codes", "scale", "qmap")


@functools.cache
def optimizer_class() -> Any:
    """torchao's AdamW8bit, which decides by its own part alone whether states are packed: here all agree."""
    with quiet_imports():
        from torchao.optim import AdamW8bit

    class AdamW8bitOfParts(AdamW8bit):  # type: ignore[misc]
        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            if is_part(p) and not packs(tuple(p.shape), parts_of(p), self.block_size):
                return torch.zeros_like(p)
            made: Tensor = super()._new_buffer(p, signed)
            return made

    return AdamW8bitOfParts


def parts_of(parameter: Any) -> int:
    """Into how many parts a parameter is split."""
    if not is_part(parameter):
        return 1
    mesh = parameter.device_mesh
    return math.prod(mesh.size(i) for i, place in enumerate(parameter.placements) if place.is_shard())


@torch.no_grad()
def stored(name: str, value: Any) -> dict[str, Tensor]:
    """A packed state as tensors for a file, split as its parameter is; nothing for any other value."""
    local = value.to_local() if is_part(value) else value
    if not hasattr(local, "__tensor_flatten__"):
        return {}
    _, (signed, *_) = local.__tensor_flatten__()
    return {
        f"{name}.codes": _as_part(local.codes, value, tuple(value.shape)),
        f"{name}.scale": _as_part(local.scale, value, (value.numel() // local.block_size,)),
        f"{name}.qmap": local.qmap,
        f"{name}.signed": torch.tensor(signed),
    }


def _as_part(local: Tensor, like: Any, shape: tuple[int, ...]) -> Tensor:
    """What processes hold of a tensor of this shape, split as ``like`` is."""
    if not is_part(like):
        return local
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    how: dict[str, Any] = {"shape": torch.Size(shape), "stride": stride, "run_check": False}
    return DTensor.from_local(local, like.device_mesh, like.placements, **how)


@torch.no_grad()
def placed(value: Any, key: str, parameter: Tensor, block: int) -> Tensor:
    """A state of a checkpoint as an optimizer with blocks of this size keeps it for ``parameter``.

    ``value`` is a tensor, or a packed one by the names of its parts, of which only the codes may be split.
    """
    from torchao.optim.subclass_8bit import OptimState8bit

    here = own(parameter)
    fits = packs(tuple(parameter.shape), parts_of(parameter), block)
    made: Tensor | None = None
    if isinstance(value, dict):
        codes, scale, qmap = (own(value[name]).to(here.device) for name in _PARTS)
        width, first = parameter.numel() // len(scale), _first(parameter)
        if fits and width == block:
            scale = scale[first // block : (first + here.numel()) // block].clone()
            made = OptimState8bit(codes, scale, qmap, bool(value["signed"]), dtype=parameter.dtype)
        else:
            of_each = torch.arange(first, first + here.numel(), device=here.device) // width
            values = (qmap[codes.flatten().int()] * scale[of_each]).view(here.shape)
    else:
        values = own(value).to(here.device)
    if made is None:
        made = values
        if fits:
            how = {"device": here.device, "dtype": parameter.dtype}
            made = OptimState8bit.zeros(here.shape, SIGNED[key], block, **how).copy_(values)
    return _as_part(made, parameter, tuple(parameter.shape))


def _first(parameter: Any) -> int:
    """The place of a part's first value in the whole, row after row."""
    if not is_part(parameter):
        return 0
    (chunk,) = parameter.__create_chunk_list__()
    return int(chunk.offsets[0]) * math.prod(parameter.shape[1:])
