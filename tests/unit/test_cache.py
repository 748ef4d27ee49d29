"""Cached latents and text features: right, never stale, resumable, and out of the pictures' way."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import bert_vocab, spiece_model

from hydit_core.data.cache.fingerprints import module_hash
from hydit_core.data.cache.latents import build_latent_cache, open_latent_cache, require_outside_sources
from hydit_core.data.cache.store import TensorStore, content_key
from hydit_core.data.cache.text import TextCache, build_text_cache
from hydit_core.data.config import DataConfig
from hydit_core.data.dataset import TrainData, open_dataset
from hydit_core.errors import ConfigError, DataError
from hydit_core.text.encoders import TextEncoders


class CountingVAE(torch.nn.Module):
    """Stands for a VAE; tells how many pictures it has encoded, and can break off."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 8, 8)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
        self.encoded = 0
        self.break_after = 10**9

    def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
        if self.encoded + len(images) > self.break_after:
            raise KeyboardInterrupt
        self.encoded += len(images)
        return self.conv(images)


def paint(path: Path, number: int, width: int = 48) -> None:
    noise = np.random.RandomState(number).randint(0, 255, (32, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    long_ago = time.time() - 1000 + number
    os.utime(path, (long_ago, long_ago))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(12):
        paint(folder / f"{i:02}.png", i, 40 + 8 * (i % 2))
        (folder / f"{i:02}.txt").write_text(f"a red apple {i % 4}")
    return folder


def open_data(
    pictures: Path, *, rank: int = 0, world: int = 1, batch_size: int = 3, **options: object
) -> TrainData:
    cache = {
        "dir": pictures.parent / "cache",
        "latents": True,
        "dtype": "float32",
        **options.pop("cache", {}),
    }
    config = DataConfig(sources=[{"path": pictures}], cache=cache, **{"resolution": 32, **options})
    return open_dataset(config, seed=1, batch_size=batch_size, rank=rank, world_size=world)


def cached(data: TrainData, vae: CountingVAE) -> TrainData:
    build_latent_cache(data, vae)
    data.use_latents(open_latent_cache(data, vae))
    return data


def shards(pictures: Path) -> list[Path]:
    return sorted((pictures.parent / "cache").glob("latents-*/shard-*.safetensors"))


@pytest.mark.parametrize("ram_mb", [0, 64])
@pytest.mark.parametrize("workers", [0, 2])
def test_cached_latents_are_those_of_the_centered_pictures(pictures: Path, ram_mb: int, workers: int) -> None:
    vae = CountingVAE()
    options = {"flip": 0.5, "buckets": {"enabled": True, "step": 8}, "validation": 2}
    data = cached(open_data(pictures, cache={"ram_mb": ram_mb}, **options), vae)
    online = open_data(pictures, crop="center", **options)
    for step, batch in enumerate(data.loader(0, 8, workers)):
        expected = online.batch(step)
        assert batch.pixels is None and batch.moments.dtype == torch.float32
        torch.testing.assert_close(batch.moments, vae.conv(expected.pixels).detach())
        assert (batch.keys, batch.captions) == (expected.keys, expected.captions)
        assert torch.equal(batch.crops, expected.crops)
        assert torch.equal(batch.original_sizes, expected.original_sizes)
    for batch, expected in zip(data.validation_batches(), online.validation_batches(), strict=True):
        torch.testing.assert_close(batch.moments, vae.conv(expected.pixels).detach())


def test_a_second_run_encodes_nothing(pictures: Path) -> None:
    vae = CountingVAE()
    cached(open_data(pictures, flip=0.5, validation=2), vae)
    assert vae.encoded == 2 * 10 + 2
    again = CountingVAE()
    data = cached(open_data(pictures, flip=0.5, validation=2), again)
    assert again.encoded == 0
    assert data.summary().pictures == 12


def test_what_others_have_encoded_meanwhile_counts(pictures: Path) -> None:
    data, vae = open_data(pictures), CountingVAE()
    cache = open_latent_cache(data, vae)  # before another process has filled it
    build_latent_cache(data, vae)
    data.use_latents(cache)
    assert data.batch(0).moments is not None


def test_an_edited_picture_is_encoded_anew(pictures: Path) -> None:
    vae = CountingVAE()
    cached(open_data(pictures), vae)
    paint(pictures / "03.png", 77)
    with pytest.raises(DataError, match="lacks 1 of 12 pictures"):
        data = open_data(pictures)
        data.use_latents(open_latent_cache(data, vae))
    cached(open_data(pictures), vae)
    assert vae.encoded == 13
    os.utime(pictures / "03.png")
    os.rename(pictures / "04.png", pictures / "44.png")
    os.rename(pictures / "04.txt", pictures / "44.txt")
    cached(open_data(pictures), vae)
    assert vae.encoded == 13, "a touched or renamed picture has the same content"


def test_edits_within_one_tick_of_the_clock_are_seen(pictures: Path) -> None:
    vae = CountingVAE()
    now = time.time()
    os.utime(pictures / "03.png", (now, now))
    cached(open_data(pictures), vae)
    size = (pictures / "03.png").stat().st_size
    Image.fromarray(np.zeros((32, 48, 3), dtype=np.uint8)).save(pictures / "03.png")
    with open(pictures / "03.png", "ab") as file:
        file.write(bytes(size - (pictures / "03.png").stat().st_size))
    os.utime(pictures / "03.png", (now, now))
    cached(open_data(pictures), vae)
    assert vae.encoded == 13


@pytest.mark.parametrize(
    "change", [{"resolution": 64}, {"alpha_color": "black"}, {"cache": {"dtype": "bfloat16"}}, {"vae": 1}]
)
def test_the_key_holds_everything_that_latents_depend_on(pictures: Path, change: dict) -> None:
    cached(open_data(pictures), CountingVAE())
    vae = CountingVAE(change.pop("vae", 0))
    cached(open_data(pictures, **change), vae)
    assert vae.encoded == 12
    unchanged = CountingVAE()
    cached(open_data(pictures), unchanged)
    assert unchanged.encoded == 0


def test_the_hash_of_a_module_sees_weights_dtypes_and_norms() -> None:
    def norm(groups: int, value: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        module = torch.nn.GroupNorm(groups, 8).to(dtype)
        torch.nn.init.constant_(module.weight, value)
        return module

    hashes = {module_hash(m) for m in (norm(2), norm(4), norm(2, 2.0), norm(2, dtype=torch.bfloat16))}
    assert len(hashes) == 4
    assert module_hash(norm(2)) == module_hash(norm(2))


def test_interrupted_encoding_goes_on_where_it_stopped(pictures: Path) -> None:
    vae = CountingVAE()
    vae.break_after = 7
    with pytest.raises(KeyboardInterrupt):
        build_latent_cache(open_data(pictures), vae, batch_size=2)
    assert vae.encoded == 6
    seen = []
    build_latent_cache(open_data(pictures), after := CountingVAE(), lambda *p: seen.append(p), batch_size=2)
    assert after.encoded == 6 and seen[-1] == (6, 6)


def test_a_killed_writer_leaves_nothing_that_counts(pictures: Path) -> None:
    build_latent_cache(open_data(pictures), CountingVAE())
    (shard,) = shards(pictures)
    whole = shard.read_bytes()
    temporary = shard.with_name(f".{shard.name}.123-0.tmp")
    temporary.write_bytes(whole[: len(whole) // 2])
    shard.write_bytes(whole[: len(whole) - 100])
    old = time.time() - 7200
    os.utime(temporary, (old, old))
    with pytest.warns(UserWarning, match="truncated"):
        data = cached(open_data(pictures), vae := CountingVAE())
    assert vae.encoded == 12 and len(data.batch(0)) == 3
    assert [p.name for p in shard.parent.iterdir()] == [s.name for s in shards(pictures)]
    assert shards(pictures)[0].read_bytes() == whole


def flip_a_bit(shard: Path, entry: int = 0) -> None:
    """Of the numbers of one of a shard's entries."""
    content = bytearray(shard.read_bytes())
    header = int.from_bytes(content[:8], "little")
    offsets = [v["data_offsets"][0] for k, v in json.loads(content[8 : 8 + header]).items() if k[0] != "_"]
    content[8 + header + sorted(offsets)[entry] + 3] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize("ram_mb", [0, 64])
def test_a_flipped_bit_is_found_and_encoded_anew(pictures: Path, ram_mb: int) -> None:
    expected = [cached(open_data(pictures), CountingVAE()).batch(step).moments for step in range(4)]
    (shard,) = shards(pictures)
    flip_a_bit(shard, 2)
    flip_a_bit(shard, 7)
    with pytest.warns(UserWarning, match="2 damaged entries are made anew"):
        data = cached(open_data(pictures, cache={"ram_mb": ram_mb}), vae := CountingVAE())
    assert vae.encoded == 2
    assert all(torch.equal(data.batch(step).moments, expected[step]) for step in range(4))
    again = cached(open_data(pictures), vae := CountingVAE())
    assert vae.encoded == 0, "the damaged ones are still there, and good ones beside them"
    assert all(torch.equal(again.batch(step).moments, expected[step]) for step in range(4))


def test_a_bit_that_flips_during_training_is_an_error_or_skipped(pictures: Path) -> None:
    for choice in ("error", "skip"):
        data = cached(open_data(pictures, cache={"ram_mb": 0}, on_unreadable=choice), CountingVAE())
        flip_a_bit(shards(pictures)[0])
        if choice == "error":
            with pytest.raises(DataError, match=r"shard-.* is damaged: .*made anew"):
                [data.batch(step) for step in range(4)]
            flip_a_bit(shards(pictures)[0])  # back
        else:
            assert len([key for step in range(4) for key in data.batch(step).skipped]) == 1


def test_ranks_repair_their_share(pictures: Path) -> None:
    alone = cached(open_data(pictures, batch_size=6), CountingVAE())
    expected = alone.batch(1).moments
    for entry in range(12):
        flip_a_bit(shards(pictures)[0], entry)
    ranks = [open_data(pictures, rank=rank, world=2) for rank in range(2)]
    with pytest.warns(UserWarning, match="[84] damaged entries"):  # two batches of four, and one
        for data in ranks:
            build_latent_cache(data, CountingVAE())
    for data in ranks:
        data.use_latents(open_latent_cache(data, CountingVAE()))
    assert torch.equal(torch.cat([data.batch(1).moments for data in ranks]), expected)


class SociableVAE(CountingVAE):
    """What it makes of a picture depends on those that it is encoded with, here plainly."""

    def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
        return super().encode_moments(images) + images.mean()


def test_the_same_pictures_are_encoded_together_whoever_does_it(pictures: Path, tmp_path: Path) -> None:
    """So entries are the same bytes from one process and from several, and after an interruption."""

    def entries(name: str, world: int, break_after: int = 10**9) -> dict[str, torch.Tensor]:
        for times in (break_after, 10**9):
            for rank in range(world):
                vae = SociableVAE()
                vae.break_after = times
                cache = {"dir": tmp_path / name}
                options = {"flip": 0.5, "buckets": {"enabled": True, "step": 8}, "validation": 2}
                data = open_data(pictures, rank=rank, world=world, cache=cache, **options)
                with contextlib.suppress(KeyboardInterrupt):
                    build_latent_cache(data, vae)
        found: dict[str, torch.Tensor] = {}
        for shard in (tmp_path / name).glob("latents-*/shard-*.safetensors"):
            found |= load_file(shard)
        return found

    alone = entries("alone", 1)
    assert len(alone) == 22
    for name, world, break_after in (("several", 3, 10**9), ("interrupted", 1, 10)):
        found = entries(name, world, break_after)
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[key], alone[key]) for key in alone), name


def test_shards_of_earlier_releases_have_no_checksums(pictures: Path) -> None:
    expected = cached(open_data(pictures), CountingVAE()).batch(0).moments
    (shard,) = shards(pictures)
    save_file(load_file(shard), shard)
    data = cached(open_data(pictures), vae := CountingVAE())
    assert vae.encoded == 0 and torch.equal(data.batch(0).moments, expected)


@pytest.mark.parametrize(
    ("key", "metadata"),
    [("é", None), ("x" * 32, None), ("A" * 32, None), ("0" * 32, {"hydit.crc32": "["}),
     ("0" * 32, {"hydit.crc32": "[]"}), ("0" * 32, {"hydit.crc32": '{"0": -5}'}),
     ("0" * 32, {"hydit.crc32": '{"0": "a"}'})],
)  # fmt: skip
def test_what_is_no_shard_of_ours_is_left_out(tmp_path: Path, key: str, metadata: dict | None) -> None:
    path = tmp_path / f"shard-{'0' * 32}.safetensors"
    save_file({key: torch.zeros(2)}, path, metadata)
    with pytest.warns(UserWarning, match="left out of the cache"):
        store = TensorStore(tmp_path)
    assert not store.contains(["0" * 32]).any()
    store.clean()
    assert not path.exists()


def test_features_of_texts_have_checksums_too(pictures: Path, encoders: TextEncoders) -> None:
    data = open_data(pictures, cache={"text": True})
    cache = build_text_cache(data, encoders)
    (shard,) = cache.store.folder.iterdir()
    flip_a_bit(shard)
    done = []
    with pytest.warns(UserWarning, match="1 damaged entries"):
        cache = build_text_cache(data, encoders, lambda *p: done.append(p))
    assert done[-1] == (1, 1)
    cache.store.refresh()
    for text in set(data.captions()):
        for found, wanted in zip(cache(text), encoders.encode(text), strict=True):
            assert torch.equal(found, wanted)


def test_damaged_lines_of_hashes_are_hashed_again(pictures: Path) -> None:
    cached(open_data(pictures), CountingVAE())
    (file,) = (pictures.parent / "cache").glob("pictures-*.jsonl")
    lines = file.read_bytes().split(b"\n")
    name = str(pictures / "00.png").encode()
    damaged = [b"[]", b"{}", b"7", b"\xff\xfe", b"[" * 10**5, b'["a", 1, 2]', b'[["a"], 1, 2, "b"]']
    damaged += [b'["%s", 1, 2, 3]' % name, b'{"a": NaN}', lines[1][:-9]]
    file.write_bytes(b"\n".join([*damaged, *lines[3:]]))
    cached(open_data(pictures), vae := CountingVAE())
    assert vae.encoded == 0


def test_a_writer_that_finishes_meanwhile_is_no_fault(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    (tmp_path / ".shard-00.safetensors.1-0.tmp").symlink_to(tmp_path / "renamed")  # listed, but gone
    store.clean()


def test_ranks_share_the_work(pictures: Path) -> None:
    vaes = [CountingVAE(), CountingVAE()]
    ranks = [open_data(pictures, rank=rank, world=2) for rank in range(2)]
    for data, vae in zip(ranks, vaes, strict=True):
        build_latent_cache(data, vae)
    assert [vae.encoded for vae in vaes] == [8, 4]  # whole batches of 4
    for data, vae in zip(ranks, vaes, strict=True):
        data.use_latents(open_latent_cache(data, vae))
    alone = cached(open_data(pictures, batch_size=6), CountingVAE())
    both = torch.cat([data.batch(3).moments for data in ranks])
    assert torch.equal(both, alone.batch(3).moments)


def test_the_cache_stays_out_of_picture_folders(pictures: Path) -> None:
    inside = open_data(pictures, cache={"dir": pictures / "deep" / "cache"})
    with pytest.raises(ConfigError, match="inside the picture folder"):
        build_latent_cache(inside, CountingVAE())
    assert not (pictures / "deep").exists()
    with pytest.raises(ConfigError, match="the output would be written"):
        require_outside_sources(pictures / "runs", inside.config, "the output")
    require_outside_sources(pictures.parent / "pictures-cache", inside.config, "the output")


def test_without_a_configured_place_the_cache_is_the_users(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", str(tmp_path / "user"))
    build_latent_cache(open_data(pictures, cache={"dir": None}), CountingVAE())
    assert list((tmp_path / "user" / "hydit").glob("latents-*/shard-*"))


def test_unreadable_pictures(pictures: Path) -> None:
    whole = (pictures / "03.png").read_bytes()
    (pictures / "03.png").write_bytes(whole[: len(whole) // 2])
    vae = CountingVAE()
    with pytest.raises(DataError, match=r"03\.png"):
        build_latent_cache(open_data(pictures), vae, batch_size=1)
    data = cached(open_data(pictures, on_unreadable="skip", validation=1), vae)
    assert vae.encoded == 11, "what was encoded before the error is kept"
    batches = [data.batch(step) for step in range(4)]
    assert [key for b in batches for key in b.skipped] == ["pictures/03.png"]
    assert all(b.moments.shape == (3, 8, 4, 4) for b in batches)


def test_nan_from_the_vae_is_refused(pictures: Path) -> None:
    vae = CountingVAE()
    torch.nn.init.constant_(vae.conv.weight, float("nan"))
    with pytest.raises(DataError, match="not finite"):
        build_latent_cache(open_data(pictures), vae)
    assert not shards(pictures)


def test_data_with_latents_travels_to_worker_processes(pictures: Path) -> None:
    data = cached(open_data(pictures), CountingVAE())
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.batch(2).moments, data.batch(2).moments)


def test_store_writes_shards_as_they_fill(tmp_path: Path) -> None:
    store = TensorStore(tmp_path / "store", shard_bytes=1000)
    keys = [content_key("entry", str(i)) for i in range(25)]
    for i, key in enumerate(keys):
        store.put(key, torch.full((50,), float(i)))
    assert len(list(store.folder.iterdir())) == 5
    store.refresh()
    assert store.contains(keys).all() and not store.contains([content_key("other")])[0]
    assert [int(store.get(key)[0]) for key in keys] == list(range(25))
    assert store.nbytes(keys) == 25 * 200
    with pytest.raises(KeyError):
        store.get(content_key("other"))


def test_a_cache_that_cannot_be_written_says_so(pictures: Path) -> None:
    (pictures.parent / "cache").write_text("a file where the folder should be")
    with pytest.raises(DataError, match="cannot write"):
        build_latent_cache(open_data(pictures), CountingVAE())


@pytest.fixture(scope="module")
def encoders() -> TextEncoders:
    bert = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    built = TextEncoders.build(bert, t5, bert_vocab(), spiece_model(), text_len=10, t5_len=12)
    return built.eval().requires_grad_(False)


def test_text_features_are_kept_and_equal(pictures: Path, encoders: TextEncoders) -> None:
    data = open_data(pictures, cache={"text": True})
    done = []
    build_text_cache(data, encoders, lambda *p: done.append(p))
    assert done[-1] == (5, 5)  # four captions and the empty one
    cache = TextCache(data.config, encoders)
    for text in ("a red apple 2", "", "not in the data"):
        for found, expected in zip(cache(text), encoders.encode(text), strict=True):
            assert torch.equal(found, expected) and found.dtype == expected.dtype
    build_text_cache(data, encoders, lambda *p: done.append(p))
    assert len(done) == 5
    shutil.rmtree(cache.store.folder)


def test_text_cache_follows_the_encoders(pictures: Path, encoders: TextEncoders) -> None:
    config = open_data(pictures, cache={"text": True}).config
    key = TextCache(config, encoders).keys("a")[0]
    assert TextCache(config, encoders).keys("a")[0] == key != TextCache(config, encoders).keys("b")[0]
    weight = encoders.bert.embeddings.word_embeddings.weight
    weight[0, 0] += 1
    changed = TextCache(config, encoders).keys("a")[0]
    weight[0, 0] -= 1
    assert changed != key
    encoders.t5.shared.weight.requires_grad_(True)
    try:
        with pytest.raises(ConfigError, match="they are to be trained"):
            TextCache(config, encoders)
    finally:
        encoders.requires_grad_(False)
