"""Which samples a step sees, and every random number that a sample's preparation needs.

All of it is a pure function of the seed and the step, so that a resumed run, a run with more
workers and a run on more ranks see the same data.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import ConfigError
from .permutation import KeyedPermutation


def hash_int(*parts: int | str) -> int:
    """A 64-bit integer from any integers and strings, the same on every machine and in every process."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
    )


def uniform(*parts: int | str) -> float:
    """A number in [0, 1) drawn by hashing; draws with different ``parts`` are independent."""
    return (hash_int(*parts) >> 11) * 2.0**-53


def sample_generator(seed: int, step: int, position: int, purpose: str = "") -> torch.Generator:
    """A CPU generator for one sample: ``position`` is its place in the global batch of ``step``.

    Noise, timesteps and condition dropout drawn from it do not depend on the rank or the worker.
    """
    return torch.Generator().manual_seed(hash_int(seed, step, position, purpose))


class BatchOrder:
    """The samples of every step.

    Each bucket is an endless stream: its samples in a new permutation each epoch, cut into global
    batches of ``batch_size * world_size``. A batch belongs to the epoch of its first sample; one that
    reaches the end of an epoch goes on with the next permutation. So no sample is dropped or shown
    more often than the others, all samples of a batch have one size, and every rank has the same
    number of steps. The batches of an epoch run in an order shuffled by (seed, epoch). In the first
    epoch a batch of the largest size runs first, so that a run which would exceed memory does so at once.

    Any step is found without walking over those before it, and nothing is kept for each sample once there
    are many.

    Args:
        counts: of each bucket with samples, ascending by bucket, how many an epoch has. Samples are numbered
            through all buckets, one after the other.
        areas: pixels of each bucket's size, for finding the largest; all alike by default.
    """

    def __init__(
        self,
        counts: Mapping[int, int],
        batch_size: int,
        world_size: int = 1,
        seed: int = 0,
        *,
        areas: Sequence[int] | None = None,
    ) -> None:
        if batch_size < 1 or world_size < 1:
            raise ConfigError(f"batch size {batch_size} x {world_size} ranks: both must be at least 1")
        if not counts:
            raise ConfigError("there is no sample to train on")
        self.batch_size = batch_size
        self.world_size = world_size
        self.seed = seed
        self.global_batch = batch_size * world_size
        self.buckets = list(counts)
        self._sizes = np.array(list(counts.values()), dtype=np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._first = (
            0 if areas is None else max(range(len(self.buckets)), key=lambda i: areas[self.buckets[i]])
        )
        self._plan: tuple[int, Plan | None] = (-1, None)
        self._permutations: OrderedDict[tuple[int, int], Permutation] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes that are started afresh compute their own permutations."""
        return {**self.__dict__, "_plan": (-1, None), "_permutations": OrderedDict()}

    def __len__(self) -> int:
        """Samples in an epoch."""
        return int(self._sizes.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the first epoch; later epochs may have a few less, see :meth:`steps_before`."""
        return self.steps_before(1)

    def steps_before(self, epoch: int) -> int:
        """Steps of all epochs before ``epoch``."""
        return int(self._batches_before(epoch).sum())

    def epoch_of(self, step: int) -> int:
        """The epoch that ``step`` belongs to."""
        last = step * self.global_batch // len(self) + 1
        return bisect_right(range(last + 1), step, key=self.steps_before) - 1

    def bucket(self, step: int) -> int:
        """The bucket that all samples of ``step`` belong to."""
        return self.buckets[self._locate(step)[0]]

    def samples(self, step: int) -> np.ndarray:
        """The global batch: (batch_size * world_size,) sample numbers, in order of their position."""
        slot, place = self._locate(step)
        n, found, taken = int(self._sizes[slot]), [], 0
        while taken < self.global_batch:
            epoch, start = divmod(place + taken, n)
            places = np.arange(start, min(n, start + self.global_batch - taken))
            found.append(self._permutation(slot, epoch)(places))
            taken += len(places)
        return self._starts[slot] + np.concatenate(found)

    def passes(self, step: int) -> np.ndarray:
        """How often its bucket had been gone through before each sample of ``step``: (batch,) integers."""
        slot, place = self._locate(step)
        return (place + np.arange(self.global_batch)) // self._sizes[slot]

    def bucket_members(self, bucket: int) -> range:
        """All samples of a bucket; none for one that is never shown."""
        if bucket not in self.buckets:
            return range(0)
        slot = self.buckets.index(bucket)
        return range(int(self._starts[slot]), int(self._starts[slot] + self._sizes[slot]))

    def positions(self, rank: int) -> range:
        """The places in the global batch that ``rank`` works on."""
        return range(rank * self.batch_size, (rank + 1) * self.batch_size)

    def _locate(self, step: int) -> tuple[int, int]:
        """(slot of the bucket, place in its stream at which the batch begins)."""
        epoch = self.epoch_of(step)
        slot, batch = self._plan_of(epoch).locate(step - self.steps_before(epoch))
        return slot, batch * self.global_batch

    def _plan_of(self, epoch: int) -> Plan:
        known, plan = self._plan
        if plan is None or known != epoch:
            plan = self._epoch_plan(epoch)
            self._plan = (epoch, plan)
        return plan

    def _batches_before(self, epoch: int) -> np.ndarray:
        """Of each bucket the batches of all epochs before ``epoch``: (buckets,) integers."""
        return -(-epoch * self._sizes // self.global_batch)

    def _epoch_plan(self, epoch: int) -> Plan:
        firsts, ends = self._batches_before(epoch), self._batches_before(epoch + 1)
        order = shuffled(int((ends - firsts).sum()), hash_int(self.seed, epoch, "batches"))
        return _EpochPlan(firsts, ends - firsts, order, self._first if epoch == 0 else None)

    def _permutation(self, slot: int, epoch: int) -> Permutation:
        wanted = (slot, epoch)
        if wanted not in self._permutations:
            self._permutations[wanted] = self._sequence(slot, epoch)
            while len(self._permutations) > 2 * len(self.buckets) + 2:
                self._permutations.popitem(last=False)
        return self._permutations[wanted]

    def _sequence(self, slot: int, epoch: int) -> Permutation:
        """In which order a bucket's samples, numbered from 0, come in an epoch."""
        return shuffled(int(self._sizes[slot]), hash_int(self.seed, epoch, f"bucket {self.buckets[slot]}"))


class Plan(Protocol):
    """In which order an epoch's batches run."""

    def locate(self, place: int) -> tuple[int, int]:
        """(slot of the bucket, number of the batch in that bucket's stream) of the ``place``-th batch."""


class _EpochPlan:
    """In which order an epoch's batches run: numbered through all buckets, then shuffled.

    ``leading`` is the bucket's slot of which one comes first, if any.
    """

    def __init__(self, firsts: np.ndarray, counts: np.ndarray, order: Shuffled, leading: int | None) -> None:
        self._firsts, self._ends, self._order = firsts, np.cumsum(counts), order
        self._swapped = 0
        if leading is not None:
            start = int(self._ends[leading] - counts[leading])
            self._swapped = order.first_place(range(start, int(self._ends[leading])))

    def locate(self, place: int) -> tuple[int, int]:
        """(slot of the bucket, number of the batch in that bucket's stream) of the ``place``-th batch."""
        place = {0: self._swapped, self._swapped: 0}.get(place, place)
        number = int(self._order(np.array([place]))[0])
        slot = int(np.searchsorted(self._ends, number, side="right"))
        before = int(self._ends[slot - 1]) if slot else 0
        return slot, int(self._firsts[slot]) + number - before


class Permutation(Protocol):
    """A permutation of ``range(n)``."""

    def __call__(self, places: np.ndarray) -> np.ndarray: ...


class Shuffled(Permutation, Protocol):
    """One of which is known where something stands."""

    def first_place(self, values: range) -> int:
        """A place at which one of ``values`` stands; the first, where they are looked through."""


class _Kept:
    """A shuffled array.

    RandomState's stream is frozen for ever, numpy's newer generators' is not: a run may be resumed under
    another numpy.
    """

    def __init__(self, n: int, key: int) -> None:
        shuffled = np.random.RandomState([key & 0xFFFFFFFF, key >> 32]).permutation(n)
        self._values = shuffled.astype(np.uint32)  # there may be one for each of many buckets

    def __call__(self, places: np.ndarray) -> np.ndarray:
        return self._values[places]

    def first_place(self, values: range) -> int:
        return int(np.flatnonzero((self._values >= values.start) & (self._values < values.stop))[0])


class _Computed(KeyedPermutation):
    def first_place(self, values: range) -> int:
        return int(self.place(np.array([values.start]))[0])


def shuffled(n: int, key: int) -> Shuffled:
    """A permutation of ``range(n)`` that ``key`` chooses: kept if it is small, else computed place by place.

    Where the border lies is part of every run's order, and does not change.
    """
    return _Kept(n, key) if n < 1 << 20 else _Computed(n, key)
