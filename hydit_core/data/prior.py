"""Which picture each sample of an epoch shows: those that are to be learned, and among them prior ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


class Samples:
    """An epoch's samples: first the rows to be learned, then places for prior rows.

    A place belongs to a bucket, and shows another of the bucket's prior rows in each epoch, so that all are
    shown equally often. Buckets have places in proportion to their prior rows.

    Args:
        rows: (n,) rows to be learned, each as often as an epoch shows it.
        prior: (m,) prior rows, likewise; may be empty.
        bucket_of_row: (rows,) of all rows.
        share: of the prior places among all samples.
    """

    def __init__(self, rows: np.ndarray, prior: np.ndarray, bucket_of_row: np.ndarray, share: float) -> None:
        self.rows = rows
        places = max(1, round(len(rows) * share / (1 - share))) if len(prior) else 0
        buckets, counts = np.unique(bucket_of_row[prior], return_counts=True)
        of_bucket = _apportioned(places, counts)
        self._prior = {
            int(bucket): prior[bucket_of_row[prior] == bucket]
            for bucket, own in zip(buckets, of_bucket, strict=True)
            if own
        }
        self._counts = {int(b): int(own) for b, own in zip(buckets, of_bucket, strict=True) if own}
        firsts = len(rows) + np.cumsum(of_bucket) - of_bucket
        self._firsts = {int(b): int(first) for b, first in zip(buckets, firsts, strict=True)}
        self.buckets = np.concatenate([bucket_of_row[rows], np.repeat(buckets, of_bucket)])
        """(samples,) the bucket of every sample."""

    def __len__(self) -> int:
        return len(self.buckets)

    def row(self, sample: int, epoch: int) -> int:
        """The row that ``sample`` shows when its bucket is gone through for the ``epoch``-th time, from 0."""
        return next(self.prior_from(sample, epoch)) if self.is_prior(sample) else int(self.rows[sample])

    def prior_from(self, sample: int, epoch: int) -> Iterator[int]:
        """The row that a prior place shows, then all others of its bucket in their order, as stand-ins."""
        bucket = int(self.buckets[sample])
        own = self._prior[bucket]
        start = epoch * self._counts[bucket] + sample - self._firsts[bucket]
        return (int(own[(start + i) % len(own)]) for i in range(len(own)))

    def prior_rows(self) -> np.ndarray:
        """All rows that the places show in turn, of one bucket after the other."""
        return np.concatenate(list(self._prior.values())) if self._prior else self.rows[:0]

    def is_prior(self, sample: int) -> bool:
        return sample >= len(self.rows)


def _apportioned(total: int, counts: np.ndarray) -> np.ndarray:
    """``total`` split into whole numbers in proportion to ``counts`` (largest remainders)."""
    if not len(counts):
        return counts
    exact = total * counts / counts.sum()
    parts = np.floor(exact).astype(np.int64)
    largest = np.argsort(parts - exact, kind="stable")[: total - int(parts.sum())]
    parts[largest] += 1
    return parts
