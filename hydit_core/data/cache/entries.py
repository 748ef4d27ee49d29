"""Tensors that are kept for pictures: several entries a picture, each under a key of its own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import DataError
from .store import KEY_LENGTH, TensorStore


class PictureEntries:
    """The stored entries of a dataset's pictures. Subclasses say which keys are wanted.

    Attributes:
        store: where they lie.
        dtype: of what is stored.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, rows: int, entries: int) -> None:
        self.store = TensorStore(folder)
        self.dtype = dtype
        self._keys = np.zeros((rows, entries), dtype=f"S{KEY_LENGTH}")  # empty: not wanted
        self._memory: dict[str, torch.Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes that are started afresh read from disk; forked ones share the memory."""
        return {**self.__dict__, "_memory": {}}

    def missing(self) -> np.ndarray:
        """Which entries are wanted and not on disk: (rows, entries) booleans."""
        stored = self.store.contains(self._keys)
        return (self._keys != b"") & ~stored

    def verify(self) -> int:
        """Compare stored entries with their checksums; returns how many differ, and so count as missing."""
        return self.store.verify(key.decode() for key in self._keys[self._keys != b""])

    def put(self, row: int, entry: int, value: torch.Tensor) -> None:
        """Store an entry of a picture."""
        self.put_all([(row, entry, value)])

    def put_all(self, entries: Iterable[tuple[int, int, torch.Tensor]]) -> None:
        """Store (row, entry, value) of several, which come to lie in one shard."""
        self.store.put_all(
            (self._keys[row, entry].decode(), value.to(self.dtype)) for row, entry, value in entries
        )

    def load(self, limit_bytes: int) -> bool:
        """Read everything that is stored into memory if it fits into ``limit_bytes``; say whether it did."""
        keys = [k.decode() for k in np.unique(self._keys[(self._keys != b"") & ~self.missing()])]
        if self.store.nbytes(keys) > limit_bytes:
            return False
        self._memory = self.store.read(keys)
        return True

    def _entry(self, row: int, entry: int) -> torch.Tensor:
        """An entry in float32. Raises :class:`DataError` if it is not there."""
        key = self._keys[row, entry].decode()
        try:
            return (self._memory[key] if key in self._memory else self.store.get(key)).float()
        except KeyError:
            raise DataError(f"the cache {self.store.folder} has no entry for picture {row}") from None
