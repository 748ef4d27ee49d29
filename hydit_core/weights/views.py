"""A source under other names: each tensor is a concatenation of row ranges of the tensors below.

Renaming, fusing q/k/v, splitting them, swapping halves and keeping one row are all that one operation.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from ..dtypes import FP8_DTYPES
from ..errors import WeightsError
from .packed import Packed, Scheme
from .source import TensorSource, cast

WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, DDP, FSDP and checkpointing add to names."""

_WRAPPED = re.compile(rf"(?<![^.])(?:{'|'.join(WRAPPERS)})\.")


class Piece(NamedTuple):
    """Rows ``start`` to ``stop`` (dimension 0) of a tensor; both None means the tensor as it is."""

    key: str
    start: int | None = None
    stop: int | None = None

    @property
    def whole(self) -> bool:
        return self.start is None and self.stop is None


class TensorView(TensorSource):
    """A lazy view; ``recipes`` lists for each name the pieces of ``source`` that it is made of, in order."""

    def __init__(self, source: TensorSource, recipes: Mapping[str, Sequence[Piece]]) -> None:
        self.path = source.path
        self.metadata = source.metadata
        self.source = source
        self._recipes = {name: tuple(pieces) for name, pieces in recipes.items()}
        self._readers: dict[str, int] = {}
        for pieces in self._recipes.values():
            for key in {piece.key for piece in pieces}:
                self._readers[key] = self._readers.get(key, 0) + 1

    def keys(self) -> list[str]:
        return list(self._recipes)

    def __contains__(self, key: object) -> bool:
        return key in self._recipes

    def _rows(self, piece: Piece) -> int:
        rows = rows_of(self.source, piece.key)
        return len(range(rows)[piece.start : piece.stop])

    def shape(self, key: str) -> tuple[int, ...]:
        pieces = self._recipes[key]
        first = self.source.shape(pieces[0].key)
        if len(pieces) == 1 and pieces[0].whole:
            return first
        for piece in pieces[1:]:
            if (other := self.source.shape(piece.key))[1:] != first[1:]:
                raise WeightsError(
                    f"{self.path}: {pieces[0].key} {first} and {piece.key} {other} cannot be one tensor"
                )
        return (sum(self._rows(piece) for piece in pieces), *first[1:])

    def dtype(self, key: str) -> torch.dtype:
        return self.source.dtype(self._recipes[key][0].key)

    def get(self, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        pieces = self._recipes[key]
        if len(pieces) == 1:
            piece = pieces[0]
            if piece.whole:
                return self.source.get(piece.key, dtype)
            return cast(self.source.get(piece.key)[piece.start : piece.stop], dtype)
        # Written piece by piece, so that the whole tensor never also exists in the source's dtype.
        stored = self.dtype(key)
        out = torch.empty(self.shape(key), dtype=dtype if dtype and stored.is_floating_point else stored)
        row = 0
        for piece in pieces:
            part = self.source.get(piece.key)[piece.start : piece.stop]
            # copy_ casts without a temporary; for 8 bits, cast() has to clamp first.
            out[row : row + len(part)].copy_(cast(part, dtype) if dtype in FP8_DTYPES else part)
            row += len(part)
        return out

    def rows(self, key: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        pieces = self._recipes[key]
        if len(pieces) == 1 and pieces[0].whole:
            return self.source.rows(pieces[0].key, start, stop, dtype)
        start, stop, _ = slice(start, stop).indices(self.shape(key)[0])
        parts: list[torch.Tensor] = []
        begin = 0
        for piece in pieces:
            there = range(rows_of(self.source, piece.key))[piece.start : piece.stop]
            taken = there[max(0, start - begin) : max(0, stop - begin)]
            if taken or not parts:
                parts.append(self.source.rows(piece.key, taken.start, taken.stop, dtype))
            begin += len(there)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def scheme(self, key: str) -> Scheme | None:
        first, *others = self._recipes[key]
        return None if others or not first.whole else self.source.scheme(first.key)

    def packed(self, key: str) -> Packed:
        return self.source.packed(self._recipes[key][0].key)

    def release(self, key: str) -> None:
        for below in {piece.key for piece in self._recipes[key]}:
            self._readers[below] -= 1
            if not self._readers[below]:
                self.source.release(below)


def rows_of(source: TensorSource, key: str) -> int:
    """The length of a tensor's dimension 0.

    Raises:
        WeightsError: it has none.
    """
    shape = source.shape(key)
    if not shape:
        raise WeightsError(f"{source.path}: {key} is a single number; expected a tensor with rows")
    return shape[0]


def rename(source: TensorSource, name: Callable[[str], str | None]) -> TensorView:
    """A view under new names; ``name`` returns None for tensors that are left out."""
    renamed = {key: name(key) for key in source}
    return TensorView(source, {new: (Piece(key),) for key, new in renamed.items() if new is not None})


def unwrapped(source: TensorSource) -> TensorSource:
    """``source`` without what torch.compile, DDP, FSDP and checkpointing put anywhere into names.

    Names that would then be duplicates stay as they are.
    """
    names = {key: unwrapped_name(key) for key in source}
    if all(key == name for key, name in names.items()):
        return source
    counts = Counter(names.values())
    return rename(source, lambda key: names[key] if counts[names[key]] == 1 else key)


def unwrapped_name(name: str) -> str:
    """``_orig_mod.blocks.0._fsdp_wrapped_module.norm1.weight`` -> ``blocks.0.norm1.weight``."""
    return _WRAPPED.sub("", name)


def without_prefix(source: TensorSource, prefix: str) -> TensorView:
    """The tensors whose names start with ``prefix``, named without it."""
    return rename(source, lambda key: key[len(prefix) :] if key.startswith(prefix) else None)
