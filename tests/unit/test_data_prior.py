"""Prior pictures among those that are to be learned: how many, which ones, and what their loss counts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_setup import paint
from pydantic import ValidationError

from hydit_core.data.config import DataConfig
from hydit_core.data.dataset import TrainData, open_dataset
from hydit_core.errors import DataError


def folder(path: Path, *sizes: tuple[int, int]) -> Path:
    for i, size in enumerate(sizes):
        paint(path / f"{i:02}.png", i, size)
    return path


def open_data(
    tmp_path: Path, own: int | list[tuple[int, int]], others: int | list[tuple[int, int]], **options: Any
) -> TrainData:
    """Pictures of a dog, each shown three times an epoch, and prior ones of dogs; counts or sizes."""
    own, others = ([(32, 32)] * given if isinstance(given, int) else given for given in (own, others))
    sources = [
        {"path": folder(tmp_path / "mine", *own), "caption": "a sks dog", "repeats": 3},
        {"path": folder(tmp_path / "dogs", *others), "caption": "a dog", "prior": True},
    ]
    return open_dataset(DataConfig(sources=sources, **{"resolution": 32, **options}), seed=1, batch_size=4)


def shown(data: TrainData, epochs: int) -> Counter[str]:
    steps = data.order.steps_before(epochs)
    return Counter(key for step in range(steps) for key in data.batch(step).keys)


@pytest.mark.parametrize(("others", "share", "places"), [(40, 0.5, 12), (5, 0.5, 12), (40, 0.25, 4)])
def test_prior_pictures_have_their_share(tmp_path: Path, others: int, share: float, places: int) -> None:
    data = open_data(tmp_path, 4, others, prior={"share": share})
    assert data.summary().samples_per_epoch == 12 + places
    assert data.summary().prior == places
    assert f"  of prior pictures: {places}" in data.summary().lines()
    counts = shown(data, 1)
    assert {counts[f"mine/{i:02}.png"] for i in range(4)} == {3}
    assert sum(n for key, n in counts.items() if key.startswith("dogs/")) == places


def test_in_the_long_run_all_prior_pictures_are_shown_equally_often(tmp_path: Path) -> None:
    data = open_data(tmp_path, 4, 10)
    first = {key for key in shown(data, 1) if key.startswith("dogs/")}
    assert len(first) == 10
    counts = shown(data, 5)
    assert {counts[f"dogs/{i:02}.png"] for i in range(10)} == {6}  # 5 epochs of 12 places
    assert {counts[f"mine/{i:02}.png"] for i in range(4)} == {15}


def test_each_size_has_its_own(tmp_path: Path) -> None:
    """Buckets have places in proportion to their prior pictures, which are of that size alone."""
    wide, tall = (64, 32), (32, 64)
    data = open_data(
        tmp_path,
        [wide] * 4,
        [wide] * 6 + [tall] * 3,
        resolution=48,
        buckets={"enabled": True, "sizes": ["64x32", "32x64"]},
    )
    batches = [data.batch(step) for step in range(data.order.steps_before(3))]
    for batch in batches:
        for key, weight in zip(batch.keys, batch.weights.tolist(), strict=True):
            if key.startswith("dogs/"):
                assert batch.size == (wide if int(Path(key).stem) < 6 else tall)
            assert weight == 1
    counts = Counter(key for batch in batches for key in batch.keys if key.startswith("dogs/"))
    assert counts == {f"dogs/{i:02}.png": 4 for i in range(9)}  # 3 epochs of 8 + 4 places


def test_sizes_too_rare_for_a_place_are_told(tmp_path: Path) -> None:
    wide, tall = (64, 32), (32, 64)
    sizes = {"enabled": True, "sizes": ["64x32", "32x64"]}
    data = open_data(tmp_path, [wide], [wide] * 9 + [tall], resolution=48, buckets=sizes)
    assert data.summary().prior == 3 and data.summary().prior_left_out == 1
    assert "left out, prior pictures of sizes too rare for the share: 1" in data.summary().lines()
    data = open_data(tmp_path, [wide], [wide] * 10, resolution=48, buckets=sizes)
    assert data.summary().prior_left_out == 0


def test_weights_and_captions(tmp_path: Path) -> None:
    data = open_data(tmp_path, 4, 6, prior={"weight": 0.25})
    for step in range(6):
        batch = data.batch(step)
        for key, caption, weight in zip(batch.keys, batch.captions, batch.weights.tolist(), strict=True):
            assert (caption, weight) == (("a dog", 0.25) if key.startswith("dogs/") else ("a sks dog", 1.0))


def test_prior_pictures_are_not_held_out(tmp_path: Path) -> None:
    data = open_data(tmp_path, 4, 30, validation=3)
    assert {data.manifest.keys[row].split("/")[0] for row in data.layout.validation} == {"mine"}
    assert len(data.layout.validation) == 3
    assert len(data.layout.train_rows) == 31 and not set(data.layout.train_rows) & set(data.layout.validation)
    with pytest.raises(DataError, match="there are 4 pictures in all"):
        open_data(tmp_path, 4, 30, validation=4)


def test_a_picture_that_cannot_be_read_is_replaced_by_one_of_its_kind(tmp_path: Path) -> None:
    data = open_data(tmp_path, 4, 3, on_unreadable="skip")
    for broken in (tmp_path / "dogs" / "01.png", tmp_path / "mine" / "02.png"):
        broken.write_bytes(broken.read_bytes()[:-200])
    for step in range(12):
        batch = data.batch(step)
        assert not {"dogs/01.png", "mine/02.png"} & set(batch.keys)
    counts = shown(data, 2)
    assert sum(n for key, n in counts.items() if key.startswith("dogs/")) == 24


def test_a_stand_in_may_be_any_prior_picture_of_the_size(tmp_path: Path) -> None:
    """Not only those that this epoch has places for: here one, and that one is broken."""
    data = open_data(tmp_path, 1, 5, prior={"share": 0.25}, on_unreadable="skip")
    assert data.summary().prior == 1
    for name in ("01.png", "02.png"):
        broken = tmp_path / "dogs" / name
        broken.write_bytes(broken.read_bytes()[:-200])
    counts = shown(data, 5)
    assert {counts[f"dogs/{i:02}.png"] for i in (1, 2)} == {0}
    assert sum(n for key, n in counts.items() if key.startswith("dogs/")) == 5


def test_workers_and_ranks_see_the_same(tmp_path: Path) -> None:
    data = open_data(tmp_path, 4, 10)
    alone = [data.batch(step).keys for step in range(8)]
    assert [batch.keys for batch in data.loader(0, 8, workers=2)] == alone
    halves = [open_dataset(data.config, seed=1, batch_size=2, world_size=2, rank=rank) for rank in range(2)]
    assert [halves[0].batch(step).keys + halves[1].batch(step).keys for step in range(8)] == alone


def test_the_fingerprint_knows_of_them(tmp_path: Path) -> None:
    prints = [
        open_data(tmp_path, 4, 10).fingerprint(),
        open_data(tmp_path, 4, 10, prior={"share": 0.25}).fingerprint(),
        open_data(tmp_path, 4, 11).fingerprint(),
    ]
    assert len(set(prints)) == 3
    assert open_data(tmp_path, 4, 11).fingerprint() == prints[2]


def test_there_must_be_something_to_learn(tmp_path: Path) -> None:
    source = {"path": folder(tmp_path / "dogs", (32, 32)), "caption": "a dog", "prior": True}
    with pytest.raises(ValidationError, match="every source has prior = true"):
        DataConfig(sources=[source])
    with pytest.raises(ValidationError, match=r"data\.prior needs prompts, or a source with"):
        DataConfig(sources=[{**source, "prior": False}], prior={"share": 0.25})
    with pytest.raises(DataError, match="all pictures that are left are prior ones"):
        open_data(tmp_path, [(16, 16)], [(32, 32)], min_side=32)


def test_a_caption_for_all_of_a_source(tmp_path: Path) -> None:
    path = folder(tmp_path / "mine", (32, 32), (32, 32))
    (path / "01.txt").write_text("a sks dog on grass", encoding="utf-8")
    data = open_dataset(
        DataConfig(sources=[{"path": path, "caption": "a sks dog"}], resolution=32), seed=1, batch_size=1
    )
    assert [record.captions for record in data.manifest] == [("a sks dog",), ("a sks dog on grass",)]
    assert data.summary().missing_captions == 0
    with pytest.raises(DataError, match=r"one for all \(caption = "):
        open_dataset(DataConfig(sources=[{"path": path}], resolution=32), seed=1, batch_size=1)


def test_a_source_can_be_held_out_whole(tmp_path: Path) -> None:
    """In addition to what data.validation holds out of the others."""
    mine, apart, known = (folder(tmp_path / name, *[(32, 32)] * 3) for name in ("mine", "apart", "known"))
    sources = [
        {"path": mine, "caption": "a sks dog", "repeats": 2},
        {"path": apart, "caption": "a sks dog", "validation": True},
        {"path": known, "caption": "a cat", "validation": True, "prior": True},
    ]
    data = open_dataset(DataConfig(sources=sources, resolution=32, validation=1), seed=1, batch_size=2)

    def held_out(prior: bool) -> list[str]:
        batches = list(data.validation_batches(prior=prior))
        weighted = [pair for batch in batches for pair in zip(batch.keys, batch.weights, strict=True)]
        return [key for key, weight in weighted if weight]

    own = held_out(False)
    assert own[-3:] == [f"apart/{i:02}.png" for i in range(3)] and len(own) == 4 and own[0][:5] == "mine/"
    assert held_out(True) == [f"known/{i:02}.png" for i in range(3)]
    assert set(shown(data, 3)) == {f"mine/{i:02}.png" for i in range(3)} - {own[0]}
    assert "pictures: 9 (2 to train, 4 for validation, 3 to see what is forgotten)" in data.summary().lines()
    with pytest.raises(ValidationError, match="one must show what is to be learned"):
        DataConfig(sources=sources[1:], resolution=32)
    with pytest.raises(ValidationError, match=r"data\.prior needs prompts, or a source with"):
        DataConfig(sources=sources, resolution=32, prior={"share": 0.3})


def test_apportioned_places_add_up() -> None:
    from hydit_core.data.layout import Layout
    from hydit_core.data.prior import Samples

    buckets = np.array([0] * 3 + [1] * 5 + [2] * 2)
    for n in range(1, 40):
        own_ends = np.array([0, n // 3, n])
        layout = Layout(
            buckets, np.zeros(n), own_ends, np.arange(10), np.array([3, 8, 10]), np.arange(0), np.arange(0)
        )
        samples = Samples(layout, 0.3)
        assert len(samples) - n == samples.prior == max(1, round(n * 3 / 7))
        places = [i for i in range(len(samples)) if samples.is_prior(i)]
        assert len(places) == samples.prior
        assert len({samples.row(i, 0) for i in places}) == min(10, samples.prior)
        assert all(buckets[samples.row(i, 7)] == samples.bucket(i) for i in places)
        found = [samples.bucket(i) for i in range(len(samples))]
        assert found == [bucket for bucket, count in samples.counts.items() for _ in range(count)]
