"""Which samples a step sees: each equally often, whatever the ranks, and findable from any step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from hydit_core.data.buckets import assign_buckets, bucket_sizes, generate_buckets
from hydit_core.data.config import BucketConfig, DataConfig, SourceConfig
from hydit_core.data.order import BatchOrder, sample_generator, uniform
from hydit_core.errors import ConfigError

COUNTS = {0: 23, 1: 8, 2: 1, 4: 12}
BUCKETS = [bucket for bucket, count in COUNTS.items() for _ in range(count)]


def steps(order: BatchOrder, first: int, last: int) -> list[list[int]]:
    return [order.samples(step).tolist() for step in range(first, last)]


def test_each_sample_once_an_epoch_when_batches_fit() -> None:
    order = BatchOrder({0: 12, 1: 8}, batch_size=4, seed=3)
    assert order.steps_per_epoch == 5
    for epoch in range(3):
        seen = [s for batch in steps(order, 5 * epoch, 5 * epoch + 5) for s in batch]
        assert sorted(seen) == list(range(20))


def test_ragged_buckets_show_every_sample_equally_often() -> None:
    order = BatchOrder(COUNTS, batch_size=5, seed=1)
    for epochs in (1, 2, 7, 20):
        seen = Counter(s for batch in steps(order, 0, order.steps_before(epochs)) for s in batch)
        for bucket in set(BUCKETS):
            members = [i for i, b in enumerate(BUCKETS) if b == bucket]
            counts = [seen[i] for i in members]
            # At least once an epoch; at most one batch runs ahead into the next epoch.
            assert min(counts) >= epochs
            assert sum(counts) - epochs * len(members) < 5
            assert max(counts) - min(counts) <= 1


def test_a_batch_has_one_bucket() -> None:
    order = BatchOrder(COUNTS, batch_size=3, world_size=2, seed=1)
    for step in range(60):
        found = {BUCKETS[s] for s in order.samples(step)}
        assert found == {order.bucket(step)}


def test_ranks_share_the_batch_of_one_process() -> None:
    alone = BatchOrder(COUNTS, batch_size=6, seed=9)
    ranks = BatchOrder(COUNTS, batch_size=2, world_size=3, seed=9)
    assert alone.steps_before(5) == ranks.steps_before(5)
    for step in range(40):
        parts = [ranks.samples(step)[list(ranks.positions(rank))] for rank in range(3)]
        assert [len(p) for p in parts] == [2, 2, 2]
        assert np.concatenate(parts).tolist() == alone.samples(step).tolist()


def test_any_step_is_found_without_the_steps_before() -> None:
    walked = steps(BatchOrder(COUNTS, 5, seed=1), 0, 80)
    for step in (79, 3, 41, 40):
        assert BatchOrder(COUNTS, 5, seed=1).samples(step).tolist() == walked[step]
    million = BatchOrder({0: 1000}, 7, seed=1)
    assert million.epoch_of(10**9) == 7 * 10**9 // 1000
    assert len(million.samples(10**9)) == 7


def test_epochs_and_seeds_differ() -> None:
    order = BatchOrder({0: 30}, 10, seed=1)
    assert steps(order, 0, 3) != steps(order, 3, 6)
    assert steps(order, 0, 3) != steps(BatchOrder({0: 30}, 10, seed=2), 0, 3)


def test_fewer_samples_than_a_batch() -> None:
    order = BatchOrder({0: 3}, batch_size=8, seed=1)
    seen = Counter(s for batch in steps(order, 0, 3) for s in batch)
    assert sorted(seen.values()) == [8, 8, 8]
    assert order.steps_per_epoch == 1


def test_the_largest_size_runs_first() -> None:
    areas = [100, 400, 900, 50, 100]
    for seed in range(8):
        order = BatchOrder(COUNTS, 5, seed=seed, areas=areas)
        assert order.bucket(0) == 2
        plain = BatchOrder(COUNTS, 5, seed=seed)
        n = order.steps_per_epoch
        assert sorted(steps(order, 0, n)) == sorted(steps(plain, 0, n))


def test_empty_order_is_refused() -> None:
    with pytest.raises(ConfigError, match="no sample"):
        BatchOrder({}, 4)


def test_draws_depend_on_every_part_and_on_nothing_else() -> None:
    def draw(*where: int) -> list[float]:
        return torch.rand(4, generator=sample_generator(*where)).tolist()

    torch.manual_seed(1)
    reference = draw(1, 2, 3)
    torch.manual_seed(2)
    assert draw(1, 2, 3) == reference
    assert all(draw(*other) != reference for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)))
    values = np.array([uniform(1, step, "crop") for step in range(4000)])
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 0.02 and abs(values.var() - 1 / 12) < 0.005


def config(resolution: int = 1024, **buckets: object) -> DataConfig:
    return DataConfig(
        sources=(SourceConfig(path="x"),),
        resolution=resolution,
        buckets=BucketConfig(enabled=True, **buckets),
    )


def test_generated_buckets_are_tencents() -> None:
    sizes = generate_buckets(1024, 64)
    assert len(sizes) == 33 == len(set(sizes))
    assert sizes[0] == (1024, 1024)
    assert {(960, 1088), (512, 1536), (512, 2048), (2048, 512), (1088, 960)} <= set(sizes)
    assert all(w % 64 == h % 64 == 0 and min(w, h) >= 512 and max(w, h) <= 2048 for w, h in sizes)
    assert bucket_sizes(config()) == sizes


def test_pictures_go_to_the_nearest_ratio() -> None:
    sizes = [(1024, 1024), (768, 1280), (1280, 768)]
    widths, heights = np.array([500, 3000, 900, 1000]), np.array([500, 1000, 1600, 1100])
    assert assign_buckets(widths, heights, sizes).tolist() == [0, 2, 1, 0]
    rng = np.random.RandomState(0)
    w, h = rng.randint(50, 4000, 500), rng.randint(50, 4000, 500)
    sizes = generate_buckets(512, 64)
    found = np.array(sizes)[assign_buckets(w, h, sizes)]
    turned = np.array(sizes)[assign_buckets(h, w, sizes)]
    distance = np.abs(np.log(w / h)[:, None] - np.log([a / b for a, b in sizes]))
    np.testing.assert_allclose(np.abs(np.log(w / h) - np.log(found[:, 0] / found[:, 1])), distance.min(1))
    assert (found[:, ::-1] == turned).all()


def test_custom_sizes() -> None:
    assert bucket_sizes(config(sizes=("512x512", "640x384"))) == [(512, 512), (640, 384)]
    with pytest.raises(ConfigError, match="same aspect ratio"):
        bucket_sizes(config(sizes=("512x512", "1024x1024")))
    with pytest.raises(ValueError, match="multiples of 8"):
        config(sizes=("500x500",))
    with pytest.raises(ValueError, match="not a size"):
        config(sizes=("square",))
    with pytest.raises(ConfigError, match="min_side"):
        bucket_sizes(config(resolution=256, min_side=512))
