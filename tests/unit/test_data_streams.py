"""Pictures that are read file after file: shuffled as a reference says, whatever the ranks and batches."""

from __future__ import annotations

import pickle
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydit_core.data.config import DataConfig
from hydit_core.data.gathering import Findings
from hydit_core.data.manifest import GatheredManifest, Look
from hydit_core.data.order import hash_int
from hydit_core.data.rows import Rows
from hydit_core.data.sources.entry import TAR, Entry
from hydit_core.data.streams import PARTS, StreamOrder
from hydit_core.errors import DataError
from hydit_core.train.checkpoint import Progress
from hydit_core.train.place import go_on, position

SIZES = ((32, 32), (32, 64), (64, 32))
FILES = (20, 7, 45, 1, 32)


def rows(
    files: tuple[int, ...] = FILES, *others: dict[str, Any], batch: int = 1, world: int = 1, **options: Any
) -> Rows:
    """A source of tar files with so many pictures of three shapes, 70 % square; ``others`` may have files,
    too, or are pictures in files of their own.
    """
    manifest = GatheredManifest()
    sources = [{"files": files, "stream": True}, *others]
    for number, source in enumerate(sources):
        for file, count in enumerate(source.get("files", [1] * source.get("single", 0))):
            for row in range(count):
                shape = SIZES[
                    (hash_int(number, file, row) % 10 - 6) % 3 if hash_int(number, file, row) % 10 > 6 else 0
                ]
                inside = "files" in source
                path = Path(f"/{number}/{file}{'.tar' if inside else '.png'}")
                entry = Entry(
                    f"{file}/{row}",
                    path,
                    ("a",),
                    row=512 * row if inside else -1,
                    column=TAR if inside else "",
                )
                manifest.append(entry, entry.key, Look(shape), number)
    told = [{k: v for k, v in s.items() if k not in ("files", "single")} | {"path": "/x"} for s in sources]
    settings = {"resolution": 32, "buckets": {"enabled": True, "sizes": [f"{w}x{h}" for w, h in SIZES]}}
    config = DataConfig(sources=told, **{"window": 64, **settings, **options})
    return Rows(config, manifest, Findings(), seed=3, batch_size=batch, world_size=world)


def order_of(data: Rows) -> StreamOrder:
    assert isinstance(data.order, StreamOrder)
    return data.order


def permutation(n: int, *key: int | str) -> list[int]:
    value = hash_int(*key)
    return np.random.RandomState([value & 0xFFFFFFFF, value >> 32]).permutation(n).tolist()


def reference(data: Rows, bucket: int, epoch: int) -> list[int]:
    """The samples of a bucket in an epoch, by lists: parts of files, the window."""
    window, config = data.config.window, data.config
    parts: list[list[tuple[int, int]]] = []  # of (row, which time)
    for number, source in enumerate(config.sources):
        if not source.stream:
            continue
        own = [row for row in range(len(data.manifest)) if data.manifest.source(row) == number]
        files: dict[Path, list[int]] = {}
        for row in own:
            files.setdefault(data.manifest.picture(row).path, []).append(row)
        for members in files.values():
            cut = [members[i : i + window // PARTS] for i in range(0, len(members), window // PARTS)]
            parts += [[(row, time) for row in part] for time in range(source.repeats) for part in cut]
    members = data.samples.own_rows(bucket).tolist()
    numbers: dict[tuple[int, int], int] = {}
    for sample, row in enumerate(members):
        numbers[row, members[:sample].count(row)] = sample
    order = permutation(len(parts), data.seed, epoch, "parts")
    streamed = [numbers[one] for place in order for one in parts[place] if one in numbers]
    key = hash_int(data.seed, epoch, f"bucket {bucket}")
    others = [sample for sample in range(len(members)) if sample not in set(streamed)]
    others = [others[i] for i in permutation(len(others), key, "others")]
    prior = list(range(len(members), data.samples.counts[bucket]))
    if not any(source.prior and source.stream for source in config.sources):
        prior = [prior[i] for i in permutation(len(prior), key, "prior")]
    merged = evenly(streamed, evenly(others, prior))
    n, width = len(merged), max(1, round(window * len(merged) / len(data.samples)))
    found: list[int] = []
    for block, start in enumerate(range(0, n, width)):
        part = merged[start : start + width]
        found += [part[i] for i in permutation(len(part), key, block, "window")]
    return found


def evenly(first: list[int], second: list[int]) -> list[int]:
    """The second list's items spread over the first's."""
    found, n = [], len(first) + len(second)
    first, second, taken = list(first), list(second), 0
    for place in range(n):
        if (place + 1) * len(second) // n > taken:
            found.append(second[taken])
            taken += 1
        else:
            found.append(first.pop(0))
    return found


def streams_of(data: Rows, steps: range) -> dict[int, list[int]]:
    """Of each bucket its samples, numbered in the bucket, in the order in which they are seen."""
    seen: dict[int, list[int]] = defaultdict(list)
    for step in steps:
        bucket = data.order.bucket(step)
        seen[bucket] += (data.order.samples(step) - data.order.bucket_members(bucket).start).tolist()
    return seen


MIXED = (
    {"files": (8, 5), "stream": True, "repeats": 3},
    {"single": 11, "repeats": 2},
    {"files": (9,)},
)
PRIOR = {"files": (25, 9), "prior": True}


@pytest.mark.parametrize(
    "others",
    [(), MIXED, (*MIXED, PRIOR), ({**PRIOR, "stream": True},), (PRIOR, {**PRIOR, "stream": True})],
)
def test_the_order_is_that_of_the_reference(others: tuple[dict[str, Any], ...]) -> None:
    data = rows(FILES, *others)
    assert len(data.samples.counts) == 3
    seen = streams_of(data, range(2 * len(data.order)))  # an epoch has as many samples in each bucket
    for bucket, n in data.samples.counts.items():
        epochs = [reference(data, bucket, epoch) for epoch in range(3)]
        assert sorted(epochs[0]) == list(range(n)) and epochs[0] != epochs[1]
        assert seen[bucket] == [s for epoch in epochs for s in epoch][: len(seen[bucket])]
        assert len(seen[bucket]) == 2 * n


@pytest.mark.parametrize("batch", [1, 4, 7, 300])
def test_all_are_seen_equally_often(batch: int) -> None:
    data = rows(FILES, *MIXED, batch=batch)
    shown = Counter(data.layout.own.tolist())
    for epochs in (1, 3):
        seen: Counter[int] = Counter()
        for step in range(data.order.steps_before(epochs)):
            pairs = zip(data.order.samples(step), data.order.passes(step), strict=True)
            seen.update(data.samples.row(int(sample), int(epoch)) for sample, epoch in pairs)
        for bucket in data.samples.counts:
            own = np.unique(data.samples.own_rows(bucket)).tolist()
            assert all(seen[row] >= epochs * shown[row] for row in own)
            ahead = sum(seen[row] - epochs * shown[row] for row in own)
            assert ahead < batch


def test_another_world_has_the_same_order() -> None:
    alone, ranks = rows(batch=12), rows(batch=3, world=4)
    for step in range(40):
        assert alone.order.bucket(step) == ranks.order.bucket(step)
        parts = [ranks.order.samples(step)[list(ranks.order.positions(rank))] for rank in range(4)]
        assert np.concatenate(parts).tolist() == alone.order.samples(step).tolist()
        assert alone.order.passes(step).tolist() == ranks.order.passes(step).tolist()


def test_any_step_is_found_without_the_steps_before() -> None:
    walked = rows(FILES, *MIXED, batch=5)
    expected = [walked.order.samples(step).tolist() for step in range(60)]
    for step in (59, 3, 31, 30):
        data = pickle.loads(pickle.dumps(rows(FILES, *MIXED, batch=5).order))
        assert data.samples(step).tolist() == expected[step]


def test_batches_of_another_size_go_on_where_each_bucket_stopped() -> None:
    """Nothing is seen twice or left out: after any number of steps each bucket has shown the beginning of
    the stream that it shows one by one, and all buckets stand in the same epoch.
    """
    alone = streams_of(rows(FILES, *MIXED), range(800))
    for parts in ([(5, 20), (4, 90)], [(8, 21), (3, 1), (6, 50)], [(2, 0), (30, 9), (1, 30)]):
        step, seen = 0, defaultdict(list)
        places = [0] * 3
        for size, count in parts:
            data = rows(FILES, *MIXED, batch=size)
            data.order = order_of(data).going_on(step, places)
            for bucket, samples in streams_of(data, range(step, step + count)).items():
                seen[bucket] += samples
            step += count
            places = order_of(data).positions_before(step)
            for slot, bucket in enumerate(data.samples.counts):
                assert places[slot] == len(seen[bucket])
                assert sorted(seen[bucket]) == sorted(alone[bucket][: places[slot]])
        epochs = [place / n for place, n in zip(places, data.samples.counts.values(), strict=True)]
        assert max(epochs) - min(epochs) < 1 + max(size for size, _ in parts) / min(
            data.samples.counts.values()
        )


def test_where_it_stands_is_found_by_any_way() -> None:
    order = order_of(rows(FILES, *MIXED, batch=3))
    forward = [order.positions_before(step) for step in range(120)]
    assert [sum(places) for places in forward] == [3 * step for step in range(120)]
    for step in (119, 20, 21, 80, 0):
        assert order_of(rows(FILES, *MIXED, batch=3)).positions_before(step) == forward[step]
        assert order.positions_before(step) == forward[step]
    going = order.going_on(30, forward[30])
    assert going.positions_before(30) == forward[30]
    with pytest.raises(ValueError, match="begins at step 30"):
        going.samples(29)
    for wrong in ([1, 2], [1, 2, -3], ["a", 1, 1]):
        with pytest.raises(ValueError):
            order.going_on(30, wrong)


def test_the_largest_size_runs_first_and_no_batch_before_its_turn() -> None:
    data = rows(batch=4)
    largest = max(range(3), key=lambda bucket: data.sizes[bucket][0] * data.sizes[bucket][1])
    order = order_of(data)
    assert order.bucket(0) == largest
    assert order.going_on(9, order.positions_before(9)).bucket(9) == largest


def test_files_are_read_one_after_the_other() -> None:
    """A part of a file is read within a window of steps; at any time few parts are, a rank's own of them."""
    data = rows((400,) * 10, window=512, batch=16)
    steps: dict[tuple[Path, int], list[int]] = defaultdict(list)
    together, mine = [], []
    for step in range(data.order.steps_per_epoch):
        found = []
        for sample in data.order.samples(step)[data.order.passes(step) == 0]:
            picture = data.manifest.picture(data.samples.row(int(sample), 0))
            part = picture.path, picture.row // 512 // (512 // PARTS)
            steps[part].append(step)
            found.append(part)
        together.append(len(set(found)))
        mine += [len(set(found[start : start + 4])) for start in range(0, 16, 4)]
    assert len(steps) == 10 * 13
    spans = [max(found) - min(found) for found in steps.values()]
    assert max(spans) <= 2.5 * 512 / 16 and np.mean(spans) < 1.2 * 512 / 16
    assert 5 < np.mean(together) <= PARTS + 2  # they are mixed
    assert np.mean(mine) < 3
    first = [data.manifest.picture(data.samples.row(int(s), 0)).path for s in data.order.samples(5)]
    other = [data.manifest.picture(data.samples.row(int(s), 0)).path for s in data.order.samples(150)]
    assert len(set(first) - set(other)) > 2


def test_streams_are_what_is_not_on_a_disk_or_what_is_said() -> None:
    assert not isinstance(rows(FILES, batch=2, window=64).order, type(None))
    plain = rows((5,), {"single": 4, "stream": False})
    assert isinstance(plain.order, StreamOrder)
    with pytest.raises(DataError, match=r"stream = true is for pictures inside tar, Parquet or Arrow files"):
        rows((5,), {"single": 4, "stream": True})


def test_the_fingerprint_follows_the_order() -> None:
    prints = {
        rows().fingerprint(),
        rows(window=32).fingerprint(),
        rows((40, 8, *FILES[2:])).fingerprint(),
        rows(batch=2).fingerprint(),
    }
    assert len(prints) == 4 and rows().fingerprint() in prints
    assert rows(batch=2).fingerprint(1) == rows().fingerprint()


def test_a_checkpoint_says_where_it_is() -> None:
    """The same batches go on as if nothing had been; others go on where the samples stopped."""

    def progress(data: Any, step: int) -> Progress:
        found = Progress(step=step, batch=[data.order.global_batch, 2], data=data.fingerprint())
        found.order = position(data.order, 2 * step)
        return found

    whole: Any = rows(FILES, *MIXED, batch=6)
    found = progress(whole, 20)
    assert found.order["at"] == order_of(whole).positions_before(40)
    same: Any = rows(FILES, *MIXED, batch=3, world=2)
    assert go_on(same, found, [6, 2]) == []
    assert same.order.samples(70).tolist() == whole.order.samples(70).tolist()
    other: Any = rows(FILES, *MIXED, batch=4)
    (told,) = go_on(other, found, [4, 3])
    assert told == "data: 4 pictures a micro-batch in place of 6; those that were not shown yet come next"
    assert other.order.begins == (60, found.order["at"])
    later = progress(other, 30)  # whose step 30 is micro-batch 60 of accumulations of 2
    assert later.order["since"] == 60 and later.order["from"] == found.order["at"]
    again: Any = rows(FILES, *MIXED, batch=4)
    assert go_on(again, later, [4, 2]) == []
    assert again.order.samples(90).tolist() == other.order.samples(90).tolist()
    changed: Any = rows((3, *FILES), *MIXED, batch=4)
    assert go_on(changed, found, [4, 2]) == [
        "data: other pictures, captions or batches than before, in another order"
    ]
    found.order = {"since": 0, "from": [0, 0], "at": [0, 0]}
    with pytest.raises(ValueError, match="there are 3 buckets"):
        go_on(rows(FILES, *MIXED, batch=6), found, [6, 2])
