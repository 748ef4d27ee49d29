"""Pictures that only decoding finds to be broken: replaced, counted, never the end of a run that skips."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hydit_core.data.cache.latents import build_latent_cache, open_latent_cache
from hydit_core.data.config import DataConfig
from hydit_core.data.dataset import TrainData, open_dataset
from hydit_core.data.sources.entry import PictureFile
from hydit_core.errors import DataError


def paint(path: Path, size: tuple[int, int] = (32, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.RandomState(len(path.stem)).randint(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.with_suffix(".txt").write_text(path.stem)
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three square pictures, and a broken one that is alone in its size."""
    for name in ("a", "b", "c"):
        paint(tmp_path / "d" / f"{name}.png")
    cut(paint(tmp_path / "d" / "wide.png", (64, 32)))
    return tmp_path / "d"


def open_data(*sources: object, **options: object) -> TrainData:
    fixed = {"resolution": 32, "buckets": {"enabled": True, "step": 16}, "on_unreadable": "skip"}
    run = {name: options.pop(name) for name in ("batch_size", "world_size", "rank") if name in options}
    listed = [source if isinstance(source, dict) else {"path": source} for source in sources]
    config = DataConfig(sources=listed, **(fixed | options))
    return open_dataset(config, seed=1, **({"batch_size": 2} | run))


class Encoder(torch.nn.Module):
    """In the place of a VAE."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 8, 8)

    def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_alone_in_its_size(folder: Path, tmp_path: Path, cached: bool, batch_size: int) -> None:
    cache = {"latents": True, "dir": tmp_path / "cache"} if cached else {}
    data = open_data(folder, batch_size=batch_size, cache=cache)
    if cached:
        vae = Encoder()
        build_latent_cache(data, vae)
        data.use_latents(open_latent_cache(data, vae))
    batches = list(data.loader(0, data.order.steps_before(3)))
    skipped = [batch for batch in batches if batch.skipped]
    assert len(skipped) >= 2 and all(set(batch.skipped) == {"d/wide.png"} for batch in skipped)
    assert all("d/wide.png" not in batch.keys and len(batch) == batch_size for batch in batches)
    assert {batch.size for batch in batches} == {(32, 32)}
    again = [data.batch(step).keys for step in range(len(batches))]
    assert again == [batch.keys for batch in batches]


def test_ranks_agree_on_the_size(folder: Path) -> None:
    ranks = [open_data(folder, batch_size=1, world_size=2, rank=rank) for rank in (0, 1)]
    for step in range(6):
        first, second = (data.batch(step) for data in ranks)
        assert first.size == second.size


def test_the_most_alike_size_stands_in(folder: Path) -> None:
    for name, size in (("narrow", (16, 64)), ("broad", (48, 32))):
        paint(folder / f"{name}.png", size)
    sizes = ["16x64", "32x32", "64x32", "48x32"]
    data = open_data(folder, batch_size=1, buckets={"enabled": True, "sizes": sizes})
    wide = data.sizes[data.layout.bucket_of_row[-1]]
    assert data.manifest.keys[len(data.manifest) - 1] == "d/wide.png"
    batch = next(batch for batch in data.loader(0, 6) if batch.skipped)
    assert batch.keys == ["d/broad.png"] and wide != batch.size


def test_the_only_prior_picture_of_a_size(folder: Path, tmp_path: Path) -> None:
    """One of the others stands in then, and counts as what it is."""
    cut(paint(tmp_path / "prior" / "p.png"))
    (folder / "wide.png").unlink()
    data = open_data(folder, {"path": tmp_path / "prior", "prior": True}, prior={"weight": 0.25})
    for batch in data.loader(0, 6):
        assert batch.weights.tolist() == [1.0, 1.0] and "prior/p.png" not in batch.keys


def test_held_out_pictures(folder: Path) -> None:
    """What stands in for a held-out picture does not count."""
    for name in ("d", "e", "f", "g"):
        paint(folder / f"{name}.png")
    cut(paint(folder / "broad.png", (64, 32)))
    data = open_data(folder, validation=8)
    keys = {data.manifest.keys[row] for row in data.layout.validation}
    broken = {"d/wide.png", "d/broad.png", "d/e.png"}
    assert broken <= keys, "the names decide which are held out"
    cut(folder / "e.png")
    counted: Counter[str] = Counter()
    for batch in data.validation_batches():
        for key, weight in zip(batch.keys, batch.weights.tolist(), strict=True):
            counted[key] += weight
    assert +counted == Counter(keys - broken), "each once, however often it stands in for another"


def test_where_none_can_be_read_the_first_reason_is_told(folder: Path) -> None:
    data = open_data(folder)
    for path in folder.glob("*.png"):
        if path.stem != "wide":
            cut(path)
    with pytest.raises(DataError, match=r"none of 4 pictures can be read; the first: .*\.png: \S"):
        data.batch(0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_goes_away_is_one_line(folder: Path, workers: int) -> None:
    (folder / "wide.png").unlink()
    data = open_data(folder, on_unreadable="error")
    for path in folder.glob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"^cannot read picture .*\.png: no such file$"):
        list(data.loader(0, 3, workers))


def test_a_worker_that_dies_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data(folder)
    monkeypatch.setattr(TrainData, "batch", lambda *_: os._exit(9))
    with pytest.raises(DataError, match=r"a process that prepares pictures ended .*data\.workers"):
        list(data.loader(0, 3, 1))


def table(path: Path, **row: object) -> Path:
    path.write_text(json.dumps({"image": "d/a.png", "caption": "x"} | row))
    return path


@pytest.mark.parametrize("cached", [False, True])
def test_sizes_in_tables_are_compared_with_the_picture(tmp_path: Path, cached: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = paint(tmp_path / "d" / "a.png", (64, 32))
    Image.open(path).save(path, exif=exif)
    cache = {"latents": True, "dir": tmp_path / "cache"} if cached else {}

    def first(**told: int) -> None:
        file = table(tmp_path / "t.jsonl", **told)
        data = open_data(file, on_unreadable="error", cache=cache, batch_size=1)
        if cached:
            build_latent_cache(data, Encoder())
        else:
            data.batch(0)

    first(width=32, height=64)
    first(width=160, height=318)  # of a larger original, rounded
    with pytest.raises(DataError, match=r"a\.png is 32x64 as it is shown, but was expected to be 64x32"):
        first(width=64, height=32)


def test_a_sample_costs_the_same_in_a_large_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stand-ins are looked for when they are needed, not listed for every sample."""
    for i in range(8):
        paint(tmp_path / "d" / f"{i}.png")
    data = open_data({"path": tmp_path / "d", "repeats": 500}, batch_size=4)
    asked: list[int] = []
    row = data.samples.row
    monkeypatch.setattr(data.samples, "row", lambda sample, epoch: asked.append(sample) or row(sample, epoch))
    data.batch(0)
    assert len(data.order.bucket_members(0)) == 4000 and len(asked) == 4


@pytest.mark.parametrize(
    ("name", "reason"), [("a\0.png", "null"), ("b" * 300 + ".png", "name too long"), ("", "directory")]
)
def test_why_a_picture_cannot_be_read_is_said(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^cannot read picture ") as error:
        PictureFile(tmp_path / name).read()
    assert reason in str(error.value).lower().rpartition(": ")[2]
