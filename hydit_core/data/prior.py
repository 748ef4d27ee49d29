"""Which picture each sample of an epoch shows: those that are to be learned, and among them prior ones."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np

from .layout import Layout


class Samples:
    """An epoch's samples, numbered bucket after bucket: in each first the rows to be learned, then places for
    prior rows.

    A place shows another of the bucket's prior rows in each epoch, so that all are shown equally often.
    Buckets have places in proportion to their prior rows.

    Args:
        share: of the prior places among all samples.
    """

    def __init__(self, layout: Layout, share: float) -> None:
        self._layout = layout
        own, prior = (np.diff(ends, prepend=0) for ends in (layout.own_ends, layout.prior_ends))
        total = max(1, round(len(layout.own) * share / (1 - share))) if len(layout.prior) else 0
        places = np.zeros_like(prior)
        places[prior > 0] = _apportioned(total, prior[prior > 0])
        self._own, self._prior, self._places = own.tolist(), prior.tolist(), places.tolist()
        self.prior = int(places.sum())
        """Samples that show prior rows."""
        self._starts = (np.cumsum(own + places) - own - places).tolist()
        self._own_starts, self._prior_starts = (
            (ends - counts).tolist() for ends, counts in ((layout.own_ends, own), (layout.prior_ends, prior))
        )
        self._length = int((own + places).sum())
        self.counts = {bucket: n for bucket, n in enumerate((own + places).tolist()) if n}
        """How many samples each bucket has that has any."""

    def __len__(self) -> int:
        return self._length

    def bucket(self, sample: int) -> int:
        """The bucket that a sample belongs to."""
        # Of buckets that begin at one place all but the last are empty.
        return bisect_right(self._starts, sample) - 1

    def row(self, sample: int, epoch: int) -> int:
        """The row that ``sample`` shows when its bucket is gone through for the ``epoch``-th time, from 0."""
        bucket, place = self._place(sample)
        if place >= self._own[bucket]:
            return next(self.prior_from(sample, epoch))
        return int(self._layout.own[self._own_starts[bucket] + place])

    def prior_from(self, sample: int, epoch: int) -> Iterator[int]:
        """The row that a prior place shows, then all others of its bucket in their order, as stand-ins."""
        bucket, place = self._place(sample)
        first, n = self._prior_starts[bucket], self._prior[bucket]
        start = epoch * self._places[bucket] + place - self._own[bucket]
        return (int(self._layout.prior[first + (start + i) % n]) for i in range(n))

    def own_rows(self, bucket: int) -> np.ndarray:
        """The rows that the first samples of a bucket show, those to be learned: ascending, with repeats."""
        start = self._own_starts[bucket]
        return self._layout.own[start : start + self._own[bucket]]

    def prior_rows(self) -> np.ndarray:
        """All rows that the places show in turn, of one bucket after the other."""
        parts = [
            self._layout.prior[first : first + n]
            for first, n, places in zip(self._prior_starts, self._prior, self._places, strict=True)
            if places
        ]
        return np.concatenate(parts) if parts else self._layout.own[:0]

    def is_prior(self, sample: int) -> bool:
        bucket, place = self._place(sample)
        return place >= self._own[bucket]

    def _place(self, sample: int) -> tuple[int, int]:
        """A sample's bucket, and its number there."""
        bucket = self.bucket(sample)
        return bucket, sample - self._starts[bucket]


def _apportioned(total: int, counts: np.ndarray) -> np.ndarray:
    """``total`` split into whole numbers in proportion to ``counts`` (largest remainders)."""
    if not len(counts):
        return counts
    exact = total * counts / counts.sum()
    parts = np.floor(exact).astype(np.int64)
    largest = np.argsort(parts - exact, kind="stable")[: total - int(parts.sum())]
    parts[largest] += 1
    return parts
