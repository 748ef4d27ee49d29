"""Writing quantised layers: which weights to quantise, and the tensors that a file has for each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .packed import Packed, Scheme, pack
from .source import TensorSource
from .unpacking import NOTE, SCALE


class QuantisingSource(TensorSource):
    """``source`` with the tensors that ``schemes`` names quantised as they are read, and no others."""

    def __init__(self, source: TensorSource, schemes: Mapping[str, Scheme]) -> None:
        self.path = source.path
        self.metadata = source.metadata
        self._source = source
        self._schemes = schemes

    def keys(self) -> list[str]:
        return self._source.keys()

    def __contains__(self, key: object) -> bool:
        return key in self._source

    def shape(self, key: str) -> tuple[int, ...]:
        return self._source.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._source.dtype(key)

    def get(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._source.get(key, dtype)

    def scheme(self, key: str) -> Scheme | None:
        return self._schemes.get(key)

    def packed(self, key: str) -> Packed:
        scheme = self._schemes[key]
        if self._source.scheme(key) == scheme:
            return self._source.packed(key)
        return pack(self._source.get(key, torch.float32), scheme, f"{self.path}: {key}")

    def release(self, key: str) -> None:
        self._source.release(key)


def unquantised(source: TensorSource) -> TensorSource:
    """``source`` with everything unpacked, for formats that have no quantised layers."""
    return QuantisingSource(source, {}) if source.schemes() else source


class PackedSource(TensorSource):
    """The tensors of a file: a weight with a scheme becomes its numbers, its scales and its description."""

    def __init__(self, source: TensorSource) -> None:
        self.path = source.path
        self.metadata = source.metadata
        self._source = source
        self._schemes = {key: scheme for key in source if (scheme := source.scheme(key))}
        self._scales: dict[str, str] = {}
        self._notes: dict[str, Tensor] = {}
        for key, scheme in self._schemes.items():
            layer = key.removesuffix(".weight")
            self._scales[f"{layer}.{SCALE}"] = key
            self._notes[f"{layer}.{NOTE}"] = scheme.note()

    def keys(self) -> list[str]:
        return [*self._source.keys(), *self._scales, *self._notes]

    def __contains__(self, key: object) -> bool:
        return key in self._source or key in self._scales or key in self._notes

    def shape(self, key: str) -> tuple[int, ...]:
        if key in self._notes:
            return tuple(self._notes[key].shape)
        if key in self._scales:
            weight = self._scales[key]
            return self._schemes[weight].scale_shape(self._source.shape(weight)[0])
        return self._source.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        if key in self._notes:
            return torch.uint8
        if key in self._scales:
            return torch.float32
        return self._schemes[key].dtype if key in self._schemes else self._source.dtype(key)

    def get(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """As stored; ``dtype`` must be None for what a scheme makes."""
        if key in self._notes:
            return self._notes[key]
        if key in self._scales:
            return self._source.packed(self._scales[key]).scale
        return self._source.packed(key).values if key in self._schemes else self._source.get(key, dtype)

    def release(self, key: str) -> None:
        if key in self._source:
            self._source.release(key)
