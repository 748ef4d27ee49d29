"""Named tensors from any source, which are read one at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..dtypes import FP8_DTYPES
from ..errors import WeightsError
from .packed import Packed, Scheme


def cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Cast a floating-point tensor; integers (a vocabulary, a tokenizer's bytes) stay as they are.

    Values are clamped to the range of an 8-bit float first: torch would turn those beyond it into NaN.
    """
    if dtype is None or tensor.dtype == dtype or not tensor.is_floating_point():
        return tensor
    if dtype in FP8_DTYPES:
        limit = torch.finfo(dtype).max
        return tensor.float().clamp(-limit, limit).to(dtype)
    return tensor.to(dtype)


class TensorSource(ABC):
    """A read-only collection of named tensors. Names, shapes and dtypes are known without reading data.

    ``dict(source)`` works. Tensors may be views of a mapped file: write to them only after a copy.
    """

    path: Path
    metadata: Mapping[str, str]

    @abstractmethod
    def keys(self) -> list[str]:
        """The names, in the order of the file."""

    @abstractmethod
    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, from the header."""

    @abstractmethod
    def dtype(self, key: str) -> torch.dtype:
        """A tensor's stored dtype, from the header."""

    @abstractmethod
    def get(self, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read one tensor, and cast it to ``dtype`` if it is floating-point."""

    def rows(self, key: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows ``start`` to ``stop`` (dimension 0) of what :meth:`get` gives.

        Where a file has them side by side, nothing else is read.
        """
        return cast(self.get(key)[start:stop], dtype)

    def scheme(self, key: str) -> Scheme | None:
        """How a tensor that is quantised is stored; None for ordinary ones."""
        return None

    def packed(self, key: str) -> Packed:
        """A tensor that has a :meth:`scheme`, as it is stored. :meth:`get` gives it unpacked."""
        raise KeyError(key)

    def schemes(self) -> dict[str, Scheme]:
        """All quantised tensors."""
        return {key: scheme for key in self.keys() if (scheme := self.scheme(key))}

    def release(self, key: str) -> None:  # noqa: B027 - most sources hold nothing that could be freed
        """Say that this tensor is not needed again; a source that holds it in memory may free it."""

    def numel(self, key: str) -> int:
        """The number of elements of a tensor."""
        return math.prod(self.shape(key))

    def nbytes(self, key: str) -> int:
        """The stored size of a tensor in bytes."""
        return self.numel(key) * self.dtype(key).itemsize

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """All shapes by name."""
        return {key: self.shape(key) for key in self.keys()}

    def main_dtype(self) -> torch.dtype | None:
        """The floating-point dtype of most of the data; None without floating-point tensors."""
        sizes: dict[torch.dtype, int] = {}
        for key in self.keys():
            if (dtype := self.dtype(key)).is_floating_point:
                sizes[dtype] = sizes.get(dtype, 0) + self.numel(key)
        return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.get(key)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


class MemorySource(TensorSource):
    """Tensors that are already in memory, such as a state dict."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        path: Path | str = "<memory>",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.metadata = dict(metadata or {})
        self._tensors = dict(tensors)
        self._facts = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in self._tensors.items()}

    def keys(self) -> list[str]:
        return list(self._facts)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._facts[key][0]

    def dtype(self, key: str) -> torch.dtype:
        return self._facts[key][1]

    def get(self, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return cast(self._tensors[key].detach(), dtype)

    def release(self, key: str) -> None:
        self._tensors.pop(key, None)

    def __contains__(self, key: object) -> bool:
        return key in self._facts


class MergedSource(TensorSource):
    """Several sources with different names as one: a folder's shards, or a checkpoint's parts."""

    def __init__(self, sources: list[TensorSource], *, path: Path, metadata: Mapping[str, str]) -> None:
        self.path = path
        self.metadata = metadata
        self._owner = {key: source for source in sources for key in source}

    def keys(self) -> list[str]:
        return list(self._owner)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._owner[key].shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._owner[key].dtype(key)

    def get(self, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._owner[key].get(key, dtype)

    def rows(self, key: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._owner[key].rows(key, start, stop, dtype)

    def scheme(self, key: str) -> Scheme | None:
        return self._owner[key].scheme(key)

    def packed(self, key: str) -> Packed:
        return self._owner[key].packed(key)

    def release(self, key: str) -> None:
        self._owner[key].release(key)

    def __contains__(self, key: object) -> bool:
        return key in self._owner


class CastSource(TensorSource):
    """A source with other dtypes for the tensors that are named in ``dtypes``.

    ``packed`` keeps quantised tensors packed all the same, where the dtype only says what to compute in.
    """

    def __init__(
        self, source: TensorSource, dtypes: Mapping[str, torch.dtype], *, packed: bool = False
    ) -> None:
        self.path = source.path
        self.metadata = source.metadata
        self._source = source
        self._dtypes = dtypes
        self._packed = packed

    def keys(self) -> list[str]:
        return self._source.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._source.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._dtypes.get(key, self._source.dtype(key))

    def get(self, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return cast(self._checked(key, partial(self._source.get, key)), dtype)

    def rows(self, key: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return cast(self._checked(key, partial(self._source.rows, key, start, stop)), dtype)

    def _checked(self, key: str, read: Callable[[torch.dtype | None], torch.Tensor]) -> torch.Tensor:
        wanted = self._dtypes.get(key)
        made = read(wanted)  # so that a source that computes rounds only once
        if wanted == torch.float16 and torch.isinf(made).any():
            exact = read(torch.float32)
            if torch.isfinite(exact).all():
                raise WeightsError(
                    f"{self.path}: {key} has values up to {exact.abs().max().item():.4g}, which float16 "
                    "cannot hold (65504 at most); use bf16 or fp32"
                )
        return made

    def scheme(self, key: str) -> Scheme | None:
        return self._source.scheme(key) if self._packed or key not in self._dtypes else None

    def packed(self, key: str) -> Packed:
        return self._source.packed(key)

    def release(self, key: str) -> None:
        self._source.release(key)

    def __contains__(self, key: object) -> bool:
        return key in self._source


def as_source(tensors: TensorSource | Mapping[str, Any]) -> TensorSource:
    """A mapping of tensors as a source; a source is returned as it is."""
    return tensors if isinstance(tensors, TensorSource) else MemorySource(tensors)
