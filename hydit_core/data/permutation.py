"""A shuffled order of any length that is computed place by place instead of being kept."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_ROUNDS = 8
"""An even number, so that the halves end with the widths that they began with."""
_ODD = np.uint64(0x9E3779B97F4A7C15)


class KeyedPermutation:
    """A permutation of ``range(n)`` chosen by a 64-bit ``key``; needs no memory, however large ``n`` is.

    A Feistel network over the smallest power of two that holds ``n``; what it maps beyond ``n`` is mapped
    again until it falls below (Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains: cycle walking).
    Its halves may differ by a bit, and swap their widths from round to round.

    Args:
        n: how many places, from 1 to 2**62.
        key: any integer; its lowest 64 bits count.
    """

    def __init__(self, n: int, key: int) -> None:
        if not 1 <= n <= 1 << 62:
            raise ValueError(f"a permutation of {n} places: expected 1 to 2**62")
        self._n = n
        bits = max(2, (n - 1).bit_length())
        self._low, self._high = (bits + 1) // 2, bits // 2
        start = np.uint64(key & 0xFFFFFFFFFFFFFFFF)
        self._keys = _mix(start ^ _mix(np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _ODD))

    def __len__(self) -> int:
        return self._n

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """What stands at each of ``places``, integers below ``n`` in any shape: int64 of the same shape."""
        return self._walk(places, self._forward)

    def place(self, values: np.ndarray) -> np.ndarray:
        """Where each of ``values`` stands, the inverse: int64 of the same shape."""
        return self._walk(values, self._backward)

    def _walk(self, given: np.ndarray, step: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        found = step(np.asarray(given).astype(np.uint64))
        limit = np.uint64(self._n)
        while (beyond := found >= limit).any():
            found = np.where(beyond, step(found), found)
        return found.astype(np.int64)

    def _forward(self, values: np.ndarray) -> np.ndarray:
        low, high = self._low, self._high
        left, right = values >> np.uint64(low), values & _mask(low)
        for key in self._keys:
            # left has `high` bits, right `low`; the next round has it the other way round
            left, right = right, left ^ (_mix(right ^ key) & _mask(high))
            low, high = high, low
        return (left << np.uint64(low)) | right

    def _backward(self, values: np.ndarray) -> np.ndarray:
        low, high = self._low, self._high
        left, right = values >> np.uint64(low), values & _mask(low)
        for key in self._keys[::-1]:
            low, high = high, low
            left, right = right ^ (_mix(left ^ key) & _mask(high)), left
        return (left << np.uint64(low)) | right


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _mix(values: np.ndarray) -> np.ndarray:
    """Spread each 64-bit integer's bits over all of it (the finalizer of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # modulo 2**64
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
