"""A growing store of tensors on disk under content hashes, safe to interrupt at any moment.

Entries are written in shards, safetensors files of some 64 MB that appear whole or not at all. A
shard's own header is its index, so there is nothing beside the shards that could disagree with
them. An entry never changes: new content has a new key.
"""

from __future__ import annotations

import hashlib
import re
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import DataError, WeightsError
from ..weights.files import open_tensors
from ..weights.source import TensorSource
from ..weights.writer import save_safetensors

KEY_LENGTH = 32
_OPEN_SHARDS = 64
_ABANDONED_SECONDS = 3600
_SHARD = re.compile(r"shard-[0-9a-f]{32}\.safetensors")
_TEMPORARY = re.compile(r"\.shard-.*\.tmp")


def content_key(*parts: str | bytes) -> str:
    """A store key, 32 hexadecimal digits of SHA-256, of texts and bytes."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:KEY_LENGTH]


class TensorStore:
    """Tensors by key in the shards of one folder.

    Several processes may write to one folder at once; each sees the others' shards after
    :meth:`refresh`. What :meth:`put` collects reaches the disk when a shard is full and at :meth:`flush`.
    """

    def __init__(self, folder: Path, *, shard_bytes: int = 64 << 20) -> None:
        self.folder = folder
        self._shard_bytes = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        """Mapped files do not travel to other processes; they are opened there again."""
        return {**self.__dict__, "_open": OrderedDict()}

    def refresh(self) -> None:
        """Read the headers of all shards. A damaged shard counts as absent, with a warning."""
        self._open: OrderedDict[int, TensorSource] = OrderedDict()
        self._shards: list[Path] = []
        self._damaged: list[Path] = []
        keys: list[str] = []
        shard_of_key: list[int] = []
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            if not _SHARD.fullmatch(path.name):
                continue
            try:
                found = open_tensors(path).keys()
            except WeightsError as error:
                warnings.warn(f"left out of the cache: {error}", stacklevel=2)
                self._damaged.append(path)
                continue
            keys += found
            shard_of_key += [len(self._shards)] * len(found)
            self._shards.append(path)
        order = np.argsort(np.array(keys, dtype=f"S{KEY_LENGTH}"), kind="stable")
        self._keys = np.array(keys, dtype=f"S{KEY_LENGTH}")[order]
        self._shard_of_key = np.array(shard_of_key, dtype=np.int32)[order]

    def clean(self) -> None:
        """Delete damaged shards and what killed writers left behind."""
        for path in self._damaged:
            path.unlink(missing_ok=True)
        for path in self.folder.glob(".shard-*"):
            try:
                changed = path.stat().st_mtime
            except FileNotFoundError:  # its writer has just finished it
                continue
            if _TEMPORARY.fullmatch(path.name) and time.time() - changed > _ABANDONED_SECONDS:
                path.unlink(missing_ok=True)

    def contains(self, keys: Sequence[str] | np.ndarray) -> np.ndarray:
        """Which of the keys are on disk: booleans in the shape of ``keys``."""
        wanted = np.asarray(keys, dtype=f"S{KEY_LENGTH}")
        if len(self._keys) == 0:
            return np.zeros(wanted.shape, dtype=bool)
        places = np.searchsorted(self._keys, wanted).clip(max=len(self._keys) - 1)
        return self._keys[places] == wanted

    def put(self, key: str, tensor: torch.Tensor) -> None:
        """Add an entry; writes a shard when enough has come together."""
        self._pending[key] = tensor.detach().cpu().contiguous()
        self._pending_bytes += tensor.nbytes
        if self._pending_bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as a shard. Raises :class:`DataError` if that fails."""
        if not self._pending:
            return
        name = content_key(*sorted(self._pending))
        try:
            save_safetensors(self.folder / f"shard-{name}.safetensors", self._pending)
        except WeightsError as error:
            raise DataError(f"cannot write the cache: {error}") from error
        self._pending, self._pending_bytes = {}, 0

    def get(self, key: str) -> torch.Tensor:
        """Read one entry from disk. Raises KeyError if it is not there."""
        return self._shard(key)[key].clone()

    def nbytes(self, keys: Iterable[str]) -> int:
        """Bytes that the entries take in memory."""
        return sum(self._shard(key).nbytes(key) for key in self._by_shard(keys))

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read many entries into memory, shard by shard."""
        return {key: self.get(key) for key in self._by_shard(keys)}

    def _by_shard(self, keys: Iterable[str]) -> list[str]:
        return sorted(keys, key=lambda key: (self._shard_of_key[self._place(key)], key))

    def _place(self, key: str) -> int:
        place = int(np.searchsorted(self._keys, np.bytes_(key)))
        if place == len(self._keys) or self._keys[place] != np.bytes_(key):
            raise KeyError(key)
        return place

    def _shard(self, key: str) -> TensorSource:
        number = int(self._shard_of_key[self._place(key)])
        if number not in self._open:
            self._open[number] = open_tensors(self._shards[number])
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]
