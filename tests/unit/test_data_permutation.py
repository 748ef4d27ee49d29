"""Orders that are computed instead of kept: permutations, spread evenly, the same for ever."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from hydit_core.data import order as order_module
from hydit_core.data.order import BatchOrder
from hydit_core.data.permutation import KeyedPermutation


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 31, 33, 100, 4097, 65536])
def test_each_value_has_one_place(n: int) -> None:
    permutation = KeyedPermutation(n, 7 * n + 1)
    values = permutation(np.arange(n))
    assert np.sort(values).tolist() == list(range(n))
    assert permutation.place(values).tolist() == list(range(n))


def test_all_orders_are_equally_likely() -> None:
    counts = Counter(tuple(KeyedPermutation(4, key)(np.arange(4)).tolist()) for key in range(1200))
    assert counts.keys() == set(permutations(range(4)))
    expected = 1200 / 24
    assert (
        sum((count - expected) ** 2 / expected for count in counts.values()) < 49.7
    )  # 23 degrees, p = 0.001


def test_neighbors_go_far_apart() -> None:
    n = 300_000
    values = KeyedPermutation(n, 3)(np.arange(n))
    for other in (np.arange(n), np.roll(values, 1), KeyedPermutation(n, 4)(np.arange(n))):
        assert abs(np.corrcoef(values, other)[0, 1]) < 0.01
    # The distance of two random places on a circle is uniform.
    steps = np.bincount(((values[1:] - values[:-1]) % n) * 10 // n, minlength=10)
    assert abs(steps / steps.mean() - 1).max() < 0.03


def spelled_out(n: int, key: int, place: int) -> int:
    """The same in Python's integers, by the papers' formulas."""
    full = (1 << 64) - 1

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & full
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & full
        return z ^ (z >> 31)

    bits = max(2, (n - 1).bit_length())
    while True:
        left_bits, right_bits = bits // 2, bits - bits // 2
        left, right = place >> right_bits, place & ((1 << right_bits) - 1)
        for number in range(1, 9):
            round_key = mix((key & full) ^ mix(number * 0x9E3779B97F4A7C15 & full))
            left, right = right, left ^ (mix(right ^ round_key) & ((1 << left_bits) - 1))
            left_bits, right_bits = right_bits, left_bits
        place = left << right_bits | right
        if place < n:
            return place


@pytest.mark.parametrize(("n", "key"), [(10**8, 12345), (1000, -1), (3, 0), (1 << 40, 1 << 63)])
def test_an_order_never_changes(n: int, key: int) -> None:
    """A resumed run must find its place again, whatever the machine and the versions."""
    places = [0, 1, 2, n // 2, n - 1]
    assert KeyedPermutation(n, key)(np.array(places)).tolist() == [spelled_out(n, key, p) for p in places]


def test_only_what_fits_64_bits() -> None:
    for n in (0, 1 << 63):
        with pytest.raises(ValueError, match="expected 1 to"):
            KeyedPermutation(n, 1)


def test_an_order_of_many_samples_keeps_none_of_them() -> None:
    n = 10**9
    tracemalloc.start()
    order = BatchOrder({0: n, 3: n // 7}, 64, seed=5, areas=[1, 1, 1, 9])
    assert order.bucket(0) == 3
    seen = np.concatenate([order.samples(step) for step in (0, 1, 10**6, order.steps_per_epoch - 1)])
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert len(set(seen.tolist())) == len(seen) and seen.max() < len(order)


@pytest.mark.parametrize("counts", [{0: 61}, {0: 23, 1: 8, 2: 1, 4: 12}])
def test_a_computed_order_shows_every_sample(counts: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "_Kept", order_module._Computed)
    order = BatchOrder(counts, 4, seed=2, areas=[1, 1, 9, 1, 1])
    for epoch in range(3):
        steps = range(order.steps_before(epoch), order.steps_before(epoch + 1))
        seen = {int(sample) for step in steps for sample in order.samples(step)}
        if epoch == 0:
            assert order.bucket(0) == (2 if 2 in counts else 0)
        assert len(seen) >= len(order) - 4 * len(counts)
    shown = Counter(int(s) for step in range(order.steps_before(5)) for s in order.samples(step))
    assert len(shown) == len(order) and min(shown.values()) >= 5
