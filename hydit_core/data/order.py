"""Which samples a step sees, and every random number that a sample's preparation needs.

All of it is a pure function of the seed and the step, so that a resumed run, a run with more
workers and a run on more ranks see the same data.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch

from ..errors import ConfigError


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

    Any step is found without walking over those before it.

    Args:
        bucket_of_sample: (n,) integers, the bucket of every sample of an epoch.
        areas: pixels of each bucket's size, for finding the largest; all alike by default.
    """

    def __init__(
        self,
        bucket_of_sample: Sequence[int] | np.ndarray,
        batch_size: int,
        world_size: int = 1,
        seed: int = 0,
        *,
        areas: Sequence[int] | None = None,
    ) -> None:
        buckets = np.asarray(bucket_of_sample, dtype=np.int64)
        if batch_size < 1 or world_size < 1:
            raise ConfigError(f"batch size {batch_size} x {world_size} ranks: both must be at least 1")
        if len(buckets) == 0:
            raise ConfigError("there is no sample to train on")
        self._bucket_of_sample = buckets
        self.batch_size = batch_size
        self.world_size = world_size
        self.seed = seed
        self.global_batch = batch_size * world_size
        by_bucket = np.argsort(buckets, kind="stable")
        self.buckets, starts = np.unique(buckets[by_bucket], return_index=True)
        self.members = np.split(by_bucket, starts[1:])
        self._sizes = np.array([len(m) for m in self.members], dtype=np.int64)
        self._first = (
            0 if areas is None else max(range(len(self.buckets)), key=lambda i: areas[int(self.buckets[i])])
        )
        self._plan: tuple[int, np.ndarray] = (-1, np.empty((0, 2), dtype=np.int64))
        self._permutations: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        """Samples in an epoch."""
        return int(self._sizes.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the first epoch; later epochs may have a few less, see :meth:`steps_before`."""
        return self.steps_before(1)

    def steps_before(self, epoch: int) -> int:
        """Steps of all epochs before ``epoch``."""
        return int((-(-epoch * self._sizes // self.global_batch)).sum())

    def epoch_of(self, step: int) -> int:
        """The epoch that ``step`` belongs to."""
        last = step * self.global_batch // len(self) + 1
        return bisect_right(range(last + 1), step, key=self.steps_before) - 1

    def bucket(self, step: int) -> int:
        """The bucket that all samples of ``step`` belong to."""
        return int(self.buckets[self._locate(step)[0]])

    def samples(self, step: int) -> np.ndarray:
        """The global batch: (batch_size * world_size,) sample indices, in order of their position."""
        slot, batch = self._locate(step)
        n, found, taken = len(self.members[slot]), [], 0
        place = batch * self.global_batch
        while taken < self.global_batch:
            epoch, start = divmod(place + taken, n)
            piece = self._permutation(slot, epoch)[start : start + self.global_batch - taken]
            found.append(piece)
            taken += len(piece)
        return self.members[slot][np.concatenate(found)]

    def passes(self, step: int) -> np.ndarray:
        """How often its bucket had been gone through before each sample of ``step``: (batch,) integers."""
        slot, batch = self._locate(step)
        return (batch * self.global_batch + np.arange(self.global_batch)) // len(self.members[slot])

    def bucket_members(self, bucket: int) -> np.ndarray:
        """All samples, ascending, of a bucket; none for one that is never shown."""
        slot = int(np.searchsorted(self.buckets, bucket))
        known = slot < len(self.buckets) and self.buckets[slot] == bucket
        return self.members[slot] if known else self._bucket_of_sample[:0]

    def positions(self, rank: int) -> range:
        """The places in the global batch that ``rank`` works on."""
        return range(rank * self.batch_size, (rank + 1) * self.batch_size)

    def _locate(self, step: int) -> tuple[int, int]:
        """(slot of the bucket, number of the batch in that bucket's stream)."""
        epoch = self.epoch_of(step)
        if self._plan[0] != epoch:
            self._plan = (epoch, self._epoch_plan(epoch))
        slot, batch = self._plan[1][step - self.steps_before(epoch)]
        return int(slot), int(batch)

    def _epoch_plan(self, epoch: int) -> np.ndarray:
        """The epoch's batches in the order they run: (steps, 2) of slot and batch number."""
        firsts = -(-epoch * self._sizes // self.global_batch)
        ends = -(-(epoch + 1) * self._sizes // self.global_batch)
        slots = np.repeat(np.arange(len(self._sizes)), ends - firsts)
        batches = np.concatenate([np.arange(a, b) for a, b in zip(firsts, ends, strict=True)])
        plan = np.stack([slots, batches], axis=1)[self._shuffled(len(slots), epoch, "batches")]
        if epoch == 0:
            place = int(np.flatnonzero(plan[:, 0] == self._first)[0])
            plan[[0, place]] = plan[[place, 0]]
        return plan

    def _permutation(self, slot: int, epoch: int) -> np.ndarray:
        wanted = (slot, epoch)
        if wanted not in self._permutations:
            order = self._shuffled(int(self._sizes[slot]), epoch, f"bucket {self.buckets[slot]}")
            self._permutations[wanted] = order
            while len(self._permutations) > 2 * len(self.buckets) + 2:
                self._permutations.popitem(last=False)
        return self._permutations[wanted]

    def _shuffled(self, n: int, epoch: int, what: str) -> np.ndarray:
        value = hash_int(self.seed, epoch, what)
        # RandomState's stream is frozen for ever, numpy's newer generators' is not: a run may be
        # resumed under another numpy.
        return np.random.RandomState([value & 0xFFFFFFFF, value >> 32]).permutation(n)
