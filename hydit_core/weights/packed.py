"""Weights in 8 bits with scales, in ComfyUI's formats: what they mean, and making them.

A weight is ``q * scale``, with one scale or one for each row. With ConvRot (Huang et al. 2025) the rows were
first multiplied by a regular Hadamard matrix in groups of columns, which spreads outliers over the group; the
matrix is its own inverse.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import WeightsError

INT8 = "int8_tensorwise"
FORMATS = {INT8: torch.int8, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
"""The formats that are read, and the dtype that each stores."""

LARGEST_GROUP = 256
"""The most columns that ConvRot rotates together here, and ComfyUI's default where a file is silent."""

_STEPS = 127
_LEAST = 1e-30


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored.

    Attributes:
        format: one of :data:`FORMATS`.
        rows: a scale for each row, not one for all.
        group: the columns that are rotated together, a power of 4; 0: not rotated.
        full_precision: products are computed with the unpacked weight, not in 8 bits.
    """

    format: str
    rows: bool = False
    group: int = 0
    full_precision: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored numbers."""
        return FORMATS[self.format]

    @property
    def name(self) -> str:
        """What a user calls it: ``int8``, ``int8_convrot``, ``fp8_scaled`` ..."""
        if self.format == INT8:
            return "int8_convrot" if self.group else "int8"
        return "fp8_scaled" if self.dtype == torch.float8_e4m3fn else "fp8_e5m2_scaled"

    def scale_shape(self, rows: int) -> tuple[int, ...]:
        """The shape of the scales that are written for a weight with so many rows."""
        return (rows, 1) if self.rows else ()

    def note(self) -> Tensor:
        """What stands in ``X.comfy_quant``: JSON as bytes."""
        said: dict[str, object] = {"format": self.format}
        if self.full_precision:
            said["full_precision_matrix_mult"] = True
        if self.group:
            said |= {"convrot": True, "convrot_groupsize": self.group}
        return torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)


class Packed(NamedTuple):
    """A stored weight: numbers in ``scheme.dtype``, and scales in float32, shaped () or (rows, 1)."""

    values: Tensor
    scale: Tensor
    scheme: Scheme

    def dense(self) -> Tensor:
        """The weight in float32."""
        weight = self.values.float()
        weight *= self.scale.to(weight.device)
        return rotated(weight, self.scheme.group) if self.scheme.group else weight


def pack(weight: Tensor, scheme: Scheme, name: str = "a weight") -> Packed:
    """Store a matrix (R, C) in 8 bits, each number rounded to the nearest step.

    Raises:
        WeightsError: it holds values that are not finite.
    """
    weight = weight.float()
    if not torch.isfinite(weight).all():
        raise WeightsError(f"{name} has values that are not finite and cannot be quantised")
    if scheme.group:
        weight = rotated(weight, scheme.group)
    size = weight.abs()
    reach = size.amax(-1, keepdim=True) if scheme.rows else size.amax()
    if scheme.format == INT8:
        scale = (reach / _STEPS).clamp(min=_LEAST)
        return Packed((weight / scale).round_().clamp_(-_STEPS - 1, _STEPS).to(torch.int8), scale, scheme)
    limit = torch.finfo(scheme.dtype).max
    scale = (reach / limit).clamp(min=_LEAST)
    return Packed((weight / scale).clamp_(-limit, limit).to(scheme.dtype), scale, scheme)


def rotated(weight: Tensor, group: int) -> Tensor:
    """A matrix (R, C) in float32 whose columns are rotated in groups; twice gives it back."""
    rows, columns = weight.shape
    turned = weight.view(rows, columns // group, group) @ hadamard(group).to(weight.device)
    return turned.view(rows, columns)


@lru_cache(maxsize=8)
def hadamard(size: int) -> Tensor:
    """The regular Hadamard matrix of a power of 4, symmetric and orthogonal."""
    four = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix / size**0.5


def is_group(size: int) -> bool:
    """Whether so many columns can be rotated together: a power of 4 from 4 on."""
    return size >= 4 and not size & (size - 1) and size.bit_length() % 2 == 1


def group_for(columns: int) -> int:
    """The largest power of 4 up to :data:`LARGEST_GROUP` that divides ``columns``; 0 if 4 does not."""
    group = LARGEST_GROUP
    while group >= 4 and columns % group:
        group //= 4
    return group if group >= 4 else 0
