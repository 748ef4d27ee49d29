"""A column that keeps millions of strings in two arrays instead of millions of Python objects.

Besides memory this matters for worker processes: reading a Python object writes its reference
count, which un-shares forked memory page by page; reading an array does not.
"""

from __future__ import annotations

from array import array

import numpy as np


class StringColumn:
    """A list of strings stored as UTF-8 bytes and offsets; it grows by :meth:`append`."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._ends = array("q", [0])

    def append(self, value: str) -> None:
        # A lone surrogate (a badly escaped emoji in JSON, a file name in no known encoding) survives.
        self._data += value.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._data))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._data[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")

    def lengths(self) -> np.ndarray:
        """Length of every string in bytes of UTF-8, (n,) int64."""
        return np.diff(np.frombuffer(self._ends.tobytes(), dtype=np.int64))
