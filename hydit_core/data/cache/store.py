"""A growing store of tensors on disk under content hashes, safe to interrupt at any moment.

Entries are written in shards, safetensors files of some 64 MB that appear whole or not at all. A
shard's own header is its index, so there is nothing beside the shards that could disagree with
them. An entry never changes: new content has a new key. The header's metadata hold a checksum of every
entry (shards of earlier releases lack them), because disks and memory do change bits.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import DataError, WeightsError
from ...untrusted import parse_json
from ...weights.files import open_tensors
from ...weights.source import TensorSource
from ...weights.writer import save_safetensors

KEY_LENGTH = 32
_OPEN_SHARDS = 64
_UNKNOWN = -1
_ABANDONED_SECONDS = 3600
_SUMS = "hydit.crc32"
"""The metadata key of the checksums: JSON, by entry."""
_KEY = re.compile(rf"[0-9a-f]{{{KEY_LENGTH}}}")
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
        self._bad: set[str] = set()
        keys: list[str] = []
        shard_of_key: list[int] = []
        sums: list[int] = []
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            if not _SHARD.fullmatch(path.name):
                continue
            try:
                source = open_tensors(path)
                found, known = source.keys(), _read_sums(source)
                if other := next((key for key in found if not _KEY.fullmatch(key)), None):
                    raise WeightsError(f"{path} holds {other[:40]!r}, which is no entry of a cache")
            except WeightsError as error:
                warnings.warn(f"left out of the cache: {error}", stacklevel=2)
                self._damaged.append(path)
                continue
            keys += found
            sums += [known.get(key, _UNKNOWN) for key in found]
            shard_of_key += [len(self._shards)] * len(found)
            self._shards.append(path)
        order = np.argsort(np.array(keys, dtype=f"S{KEY_LENGTH}"), kind="stable")
        self._keys = np.array(keys, dtype=f"S{KEY_LENGTH}")[order]
        self._shard_of_key = np.array(shard_of_key, dtype=np.int32)[order]
        self._sums = np.array(sums, dtype=np.int64)[order]

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
        bad = np.array(sorted(self._bad), dtype=f"S{KEY_LENGTH}")
        return (self._keys[places] == wanted) & ~np.isin(wanted, bad)

    def verify(self, keys: Iterable[str]) -> int:
        """Read entries and compare them with their checksums; those that differ count as absent from now on,
        with a warning. Keys that are not there are passed over. Gives the number of damaged ones.
        """
        wanted = np.unique(np.array(list(keys), dtype=f"S{KEY_LENGTH}"))
        bad = []
        for key in self._by_shard(k.decode() for k in wanted[self.contains(wanted)]):
            try:
                if self._sums[self._places(key).start] != _UNKNOWN:
                    self.get(key)
            except DataError:
                bad.append(key)
        if bad:
            self._bad.update(bad)
            warnings.warn(f"{self.folder}: {len(bad)} damaged entries are made anew", stacklevel=2)
        return len(bad)

    def put(self, key: str, tensor: torch.Tensor) -> None:
        """Add an entry; writes a shard when enough has come together."""
        self.put_all([(key, tensor)])

    def put_all(self, entries: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Add entries that come to lie in one shard."""
        for key, tensor in entries:
            self._pending[key] = tensor.detach().cpu().contiguous()
            self._pending_bytes += tensor.nbytes
        if self._pending_bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as a shard. Raises :class:`DataError` if that fails."""
        if not self._pending:
            return
        name = content_key(*sorted(self._pending))
        sums = {key: _checksum(tensor) for key, tensor in sorted(self._pending.items())}
        metadata = {_SUMS: json.dumps(sums, separators=(",", ":"))}
        try:
            save_safetensors(self.folder / f"shard-{name}.safetensors", self._pending, metadata)
        except WeightsError as error:
            raise DataError(f"cannot write the cache: {error}") from error
        self._pending, self._pending_bytes = {}, 0

    def get(self, key: str) -> torch.Tensor:
        """Read one entry from disk.

        Raises KeyError if it is not there, :class:`DataError` if it differs from its checksum.
        """
        for place in self._places(key):  # a damaged one that was made anew stands in two shards
            tensor = self._shard(place)[key].clone()
            if self._sums[place] in (_UNKNOWN, _checksum(tensor)):
                return tensor
        shard = self._shards[self._shard_of_key[self._places(key).start]]
        raise DataError(
            f"{shard} is damaged: an entry differs from its checksum. Continue the run, or build its caches "
            "(`python -m hydit_core.train cache CONFIG.toml`): such entries are made anew then"
        )

    def nbytes(self, keys: Iterable[str]) -> int:
        """Bytes that the entries take in memory."""
        return sum(self._shard(self._places(key).start).nbytes(key) for key in self._by_shard(keys))

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read many entries into memory, shard by shard."""
        return {key: self.get(key) for key in self._by_shard(keys)}

    def _by_shard(self, keys: Iterable[str]) -> list[str]:
        return sorted(keys, key=lambda key: (self._shard_of_key[self._places(key).start], key))

    def _places(self, key: str) -> range:
        """Where an entry stands in the list of all. Raises KeyError if it is not there."""
        wanted = np.bytes_(key)
        first, end = (int(np.searchsorted(self._keys, wanted, side)) for side in ("left", "right"))
        if first == end:
            raise KeyError(key)
        return range(first, end)

    def _shard(self, place: int) -> TensorSource:
        number = int(self._shard_of_key[place])
        if number not in self._open:
            try:
                self._open[number] = open_tensors(self._shards[number])
            except WeightsError as error:  # it was whole when it was listed
                raise DataError(f"the cache was changed meanwhile: {error}") from error
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]


def _checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _read_sums(source: TensorSource) -> dict[str, int]:
    """The checksums of a shard by entry; none of a shard that has none. Raises WeightsError for nonsense."""
    if _SUMS not in source.metadata:
        return {}
    sums = parse_json(source.metadata[_SUMS], f"{source.path}: metadata {_SUMS!r}", error=WeightsError)
    if not all(type(value) is int and 0 <= value < 1 << 32 for value in sums.values()):
        raise WeightsError(f"{source.path}: metadata {_SUMS!r} holds what is no checksum")
    return sums
