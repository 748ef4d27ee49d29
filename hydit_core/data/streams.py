"""Pictures inside files that are best read one after the other: their order, and what of it is shuffled.

All of it is a function of seed, epoch and place, as :class:`~.order.BatchOrder` is, and nothing is kept for
each picture. A file is cut into parts of pictures that follow each other. Each epoch the parts come in
another order, the same for the buckets of all sizes, whose batches advance together; within a window, a
bucket's samples are shuffled. So what is read at a time lies in few parts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import DataError
from .config import DataConfig
from .manifest import Manifest
from .order import BatchOrder, Permutation, hash_int, shuffled
from .prior import Samples
from .remote import RemotePath

PARTS = 16
"""So many parts of files a window reaches over."""
_COARSE = 64


@dataclass(frozen=True)
class Streams:
    """Which rows of a manifest are read as streams, in parts; (parts,) arrays.

    Attributes:
        first, end: the rows of each part.
        copies, copy: how often an epoch shows its rows, and which of these times a part stands for.
        others: the rows of all other sources, as ranges.
        prior: whether prior rows are among the streams.
        window: among how many samples of all buckets together the order is shuffled.
    """

    first: np.ndarray
    end: np.ndarray
    copies: np.ndarray
    copy: np.ndarray
    others: tuple[range, ...]
    prior: bool
    window: int

    @staticmethod
    def of(config: DataConfig, manifest: Manifest) -> Streams | None:
        """None if no source is read as a stream.

        Raises :class:`DataError` for one that is to be, but has its pictures in files of their own.
        """
        ends = [
            bisect_left(range(len(manifest)), number + 1, key=manifest.source)
            for number in range(len(config.sources))
        ]
        rows = [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        found = [n for n, own in enumerate(rows) if own and _is_stream(config, manifest, n, own)]
        if not found:
            return None
        longest = max(1, config.window // PARTS)
        shown = [(rows[n], config.sources[n].repeats) for n in found]
        parts = [part for own, repeats in shown for part in _parts(manifest, own, longest, repeats)]
        others = tuple(own for n, own in enumerate(rows) if n not in found)
        prior = any(config.sources[n].prior for n in found)
        first, end, copies, which = np.concatenate(parts, axis=1)
        return Streams(first, end, copies, which, others, prior, config.window)

    @property
    def recipe(self) -> int:
        """Changes with anything that decides the order."""
        parts = np.stack([self.first, self.end, self.copies, self.copy]).astype("<i8").tobytes()
        told = [(rows.start, rows.stop) for rows in self.others]
        return hash_int("streams 1", parts.hex(), str(told), int(self.prior), self.window)


def _is_stream(config: DataConfig, manifest: Manifest, number: int, rows: range) -> bool:
    asked, picture = config.sources[number].stream, manifest.picture(rows.start)
    if asked is None:
        return picture.row >= 0 and isinstance(picture.path, RemotePath) and not config.cache.latents
    if asked and picture.row < 0:
        raise DataError(
            f"data source {config.sources[number].path}: stream = true is for pictures inside tar, Parquet "
            "or Arrow files; these are in files of their own"
        )
    return asked


def _parts(manifest: Manifest, rows: range, longest: int, repeats: int) -> Iterator[np.ndarray]:
    """Of each file, and of each time that it is shown: first rows, ends, repeats, and which of them it is."""
    start = rows.start
    while start < rows.stop:
        end = manifest.file_end(start, rows.stop)
        firsts = np.arange(start, end, longest)
        for number in range(repeats):
            counts = np.full_like(firsts, repeats), np.full_like(firsts, number)
            yield np.stack([firsts, np.minimum(firsts + longest, end), *counts])
        start = end


class StreamOrder(BatchOrder):
    """The samples of every step, where some are read as :class:`Streams`.

    As its base, with three differences. A bucket's batches follow each other, so that what it has shown is
    one number, and a run may go on from there with batches of another size (:meth:`going_on`). All buckets
    are at about the same fraction of the epoch at any time. And the samples of a batch stand in the order of
    the files, so that each rank reads its own part of the window.
    """

    def __init__(
        self,
        streams: Streams,
        samples: Samples,
        batch_size: int,
        world_size: int = 1,
        seed: int = 0,
        *,
        areas: Sequence[int] | None = None,
    ) -> None:
        super().__init__(samples.counts, batch_size, world_size, seed, areas=areas)
        self._streams, self._samples = streams, samples
        self._since, self._origin = 0, np.zeros_like(self._sizes)
        self._members: dict[int, _Members] = {}
        self._parts: OrderedDict[int, np.ndarray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_members": {}, "_parts": OrderedDict()}

    @property
    def steps_per_epoch(self) -> int:
        return int((-(-self._sizes // self.global_batch)).sum())

    def steps_before(self, epoch: int) -> int:
        """The first step of ``epoch``, where that has any."""
        return self._since + super().steps_before(epoch)

    def epoch_of(self, step: int) -> int:
        if step < self._since:
            raise ValueError(f"step {step}: this order begins at step {self._since}")
        places = int(self._origin.sum()) + (step - self._since) * self.global_batch
        return bisect_left(range(places // len(self) + 2), step + 1, key=self.steps_before) - 1

    @property
    def begins(self) -> tuple[int, list[int]]:
        """The step that this order begins at, and how many samples each bucket had shown before."""
        return self._since, self._origin.tolist()

    def positions_before(self, step: int) -> list[int]:
        """How many samples each bucket has shown before ``step``, of all epochs."""
        epoch = self.epoch_of(step)
        plan = self._plan_of(epoch)
        assert isinstance(plan, _AdvancingPlan)
        batches = plan.before(step - self.steps_before(epoch))
        return (self._origin + batches * self.global_batch).tolist()

    def going_on(self, step: int, positions: Sequence[int]) -> StreamOrder:
        """This order from ``step`` on, of which each bucket has shown so many samples before.

        Those come next that were not shown yet, whatever the size of the batches was. Raises ValueError for
        positions that cannot be: of other buckets, or below 0.
        """
        origin = np.array(positions, dtype=np.int64)
        if origin.shape != self._sizes.shape or (origin < 0).any() or step < 0:
            raise ValueError(f"step {step}, positions {positions}: there are {len(self.buckets)} buckets")
        other = copy(self)
        other._since, other._origin, other._plan = step, origin, (-1, None)
        return other

    def _batches_before(self, epoch: int) -> np.ndarray:
        return np.maximum(-(-(epoch * self._sizes - self._origin) // self.global_batch), 0)

    def _locate(self, step: int) -> tuple[int, int]:
        slot, place = super()._locate(step)
        return slot, int(self._origin[slot]) + place

    def _epoch_plan(self, epoch: int) -> _AdvancingPlan:
        firsts, ends = self._batches_before(epoch), self._batches_before(epoch + 1)
        leads = not firsts.any()
        key = hash_int(self.seed, epoch, "batches")
        return _AdvancingPlan(firsts, ends - firsts, key, self._first if leads else None)

    def _sequence(self, slot: int, epoch: int) -> Permutation:
        if slot not in self._members:
            self._members[slot] = _Members(self._streams, self._samples, self.buckets[slot])
        if epoch not in self._parts:
            count = len(self._streams.first)
            order = shuffled(count, hash_int(self.seed, epoch, "parts"))(np.arange(count))
            self._parts[epoch] = order.astype(np.uint32)
            while len(self._parts) > 2:
                self._parts.popitem(last=False)
        n = int(self._sizes[slot])
        window = max(1, round(self._streams.window * n / len(self)))
        key = hash_int(self.seed, epoch, f"bucket {self.buckets[slot]}")
        return _Sequence(self._members[slot], self._parts[epoch], n, window, key)


class _AdvancingPlan:
    """An epoch's batches: those of each bucket one after the other, at times that are drawn anew.

    The k-th of a bucket's m batches runs at a time between k/m and (k + 1)/m of the epoch. ``leading`` is the
    bucket's slot of which one comes first, if any.
    """

    def __init__(self, firsts: np.ndarray, counts: np.ndarray, key: int, leading: int | None) -> None:
        self._firsts, self._ends = firsts, np.cumsum(counts)
        slots = np.repeat(np.arange(len(counts)), counts)
        numbers = np.arange(len(slots)) - (self._ends - counts)[slots]
        # RandomState's stream is frozen for ever.
        drawn = np.random.RandomState([key & 0xFFFFFFFF, key >> 32]).random_sample(len(slots))
        order = np.argsort((numbers + drawn) / counts[slots], kind="stable")
        if leading is not None and counts[leading]:
            first = int(self._ends[leading] - counts[leading])
            order = np.concatenate([[first], order[order != first]])
        self._order = order.astype(np.uint32)
        self._counted = 0, firsts

    def locate(self, place: int) -> tuple[int, int]:
        number = int(self._order[place])
        slot = int(np.searchsorted(self._ends, number, side="right"))
        before = int(self._ends[slot - 1]) if slot else 0
        return slot, int(self._firsts[slot]) + number - before

    def before(self, place: int) -> np.ndarray:
        """Of each bucket the batches before the ``place``-th of this epoch, those of other epochs too."""
        done, batches = self._counted if self._counted[0] <= place else (0, self._firsts)
        slots = np.searchsorted(self._ends, self._order[done:place], side="right")
        batches = batches + np.bincount(slots, minlength=len(self._ends))
        self._counted = place, batches
        return batches


class _Members:
    """A bucket's samples, by what they are: in parts of streams, other ones, places of prior rows."""

    def __init__(self, streams: Streams, samples: Samples, bucket: int) -> None:
        self.streams, self.rows = streams, samples.own_rows(bucket)
        counts = (self.place(streams.end) - self.place(streams.first)) // streams.copies
        self.counts = counts.astype(np.min_scalar_type(int(counts.max())))
        """(parts,) how many samples each has here."""
        self.streamed = int(counts.sum())
        bounds = np.array([(own.start, own.stop) for own in streams.others], dtype=np.int64).reshape(-1, 2)
        starts, ends = self.place(bounds[:, 0]), self.place(bounds[:, 1])
        self.others = int((ends - starts).sum())
        self._ends, self._shifts = np.cumsum(ends - starts), ends - np.cumsum(ends - starts)

    def place(self, row: np.ndarray) -> np.ndarray:
        """The first sample of ``row`` or one after it."""
        return np.searchsorted(self.rows, row)

    def other(self, indices: np.ndarray) -> np.ndarray:
        """The samples that are of no stream, by their number among those."""
        return indices + self._shifts[np.searchsorted(self._ends, indices, side="right")]

    def of_parts(self, parts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """The samples of parts, by their number in the part."""
        streams = self.streams
        return self.place(streams.first[parts]) + streams.copy[parts] + streams.copies[parts] * offsets


class _Sequence:
    """In which order a bucket's ``n`` samples come in an epoch; ``parts`` is the order of the streams' parts.

    Streams, other samples and prior places are merged evenly, then shuffled in blocks of ``window``.
    """

    def __init__(self, members: _Members, parts: np.ndarray, n: int, window: int, key: int) -> None:
        self._members, self._parts, self._n, self._window, self._key = members, parts, n, window, key
        # Of every so many parts, for there may be a million of them, and as many in each bucket.
        starts = np.arange(0, len(parts), _COARSE)
        self._ends = np.cumsum(np.add.reduceat(members.counts[parts], starts, dtype=np.int64))
        self._block: tuple[int, Permutation | None] = (-1, None)

    @cached_property
    def _others(self) -> Permutation:
        return shuffled(self._members.others, hash_int(self._key, "others"))

    @cached_property
    def _prior(self) -> Permutation:
        return shuffled(self._n - len(self._members.rows), hash_int(self._key, "prior"))

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """What stands at ``places``, all together, in the order of reading."""
        members, rest = self._members, self._n - self._members.streamed
        merged = np.sort(self._shuffled(places))
        streamed, unstreamed, is_unstreamed = _split(merged, self._n, rest)
        others, prior, is_prior = _split(unstreamed, rest, rest - members.others)
        inner = np.empty_like(unstreamed)
        inner[~is_prior] = members.other(self._others(others).astype(np.int64)) if len(others) else others
        if len(prior) and not members.streams.prior:  # whose places show one row after the other
            prior = self._prior(prior).astype(np.int64)
        inner[is_prior] = len(members.rows) + prior
        found = np.empty_like(merged)
        found[~is_unstreamed], found[is_unstreamed] = self._streamed(streamed), inner
        return found

    def _shuffled(self, places: np.ndarray) -> np.ndarray:
        blocks, found = places // self._window, np.empty_like(places)
        for block in np.unique(blocks).tolist():
            own, start = blocks == block, block * self._window
            known, order = self._block
            if order is None or known != block:
                order = shuffled(min(self._window, self._n - start), hash_int(self._key, block, "window"))
                self._block = block, order
            found[own] = start + order(places[own] - start)
        return found

    def _streamed(self, places: np.ndarray) -> np.ndarray:
        """The samples that stand at ascending ``places`` of the streams alone."""
        found = np.empty_like(places)
        stretches = np.searchsorted(self._ends, places, side="right")
        for stretch in np.unique(stretches).tolist():
            own = stretches == stretch
            parts = self._parts[stretch * _COARSE : (stretch + 1) * _COARSE]
            counts = self._members.counts[parts].astype(np.int64)
            ends = np.cumsum(counts) + (int(self._ends[stretch - 1]) if stretch else 0)
            numbers = np.searchsorted(ends, places[own], side="right")
            offsets = places[own] - (ends - counts)[numbers]
            found[own] = self._members.of_parts(parts[numbers], offsets)
        return found


def _split(places: np.ndarray, n: int, seconds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of ``n`` places every n/seconds-th is for one of the second kind: (numbers among the first kind, among
    the second, which are of the second).
    """
    before = places * seconds // max(n, 1)
    second = (places + 1) * seconds // max(n, 1) > before
    return (places - before)[~second], before[second], second
