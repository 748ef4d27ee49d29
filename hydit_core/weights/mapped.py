"""Tensors whose bytes in a file are those in memory: mapped, and read when they are used."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import WeightsError
from .source import TensorSource, cast


class Entry(NamedTuple):
    """A tensor's place: bytes ``begin`` to ``end`` of the file; ``stride`` unless it is contiguous."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int
    stride: tuple[int, ...] | None = None


class MappedSource(TensorSource):
    """Tensors of a mapped file, views of the mapping (copy on write) until they are cast.

    The entries must be inside the file; the caller has to check that.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
        self.path = path
        self.metadata = metadata
        self._entries = dict(entries)
        self._released: set[str] = set()
        try:
            with open(path, "rb") as file:
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise WeightsError(f"cannot read {path}: {error.strerror}") from error
        self._bytes = torch.frombuffer(self._mapped, dtype=torch.uint8)

    def keys(self) -> list[str]:
        return list(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._entries[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return self._entries[key].dtype

    def get(self, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        entry = self._entries[key]
        if not math.prod(entry.shape):
            return cast(torch.empty(entry.shape, dtype=entry.dtype), dtype)
        data = self._bytes[entry.begin : entry.end]
        if entry.begin % entry.dtype.itemsize:
            data = data.clone()  # older writers did not align
        values = data.view(entry.dtype)
        if entry.stride is None:
            return cast(values.view(entry.shape), dtype)
        return cast(values.as_strided(entry.shape, entry.stride), dtype)

    def rows(self, key: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read into memory of its own, not mapped: so no page of the rest counts as this process's."""
        entry = self._entries[key]
        if entry.stride is not None or not math.prod(entry.shape):
            return super().rows(key, start, stop, dtype)
        start, stop, _ = slice(start, stop).indices(entry.shape[0])
        made = torch.empty((max(0, stop - start), *entry.shape[1:]), dtype=entry.dtype)
        content = memoryview(made.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(entry.begin + start * (entry.end - entry.begin) // entry.shape[0])
                read = 0
                while read < len(content):
                    if not (more := file.readinto(content[read:])):
                        raise WeightsError(f"{self.path} has become shorter since it was opened, at {key}")
                    read += more
        except OSError as error:
            raise WeightsError(f"cannot read {self.path}: {error.strerror}") from error
        return cast(made, dtype)

    def release(self, key: str) -> None:
        """Free the tensor's pages, except those that it shares with others; a later use reads them again.

        Only once, because whoever took the tensor may have written into it since.
        """
        if key in self._released:
            return
        self._released.add(key)
        entry, page = self._entries[key], mmap.PAGESIZE
        begin, end = -(-entry.begin // page) * page, entry.end // page * page
        if begin < end and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def __contains__(self, key: object) -> bool:
        return key in self._entries
