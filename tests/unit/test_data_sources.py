"""From folders and lists to batches: what is found, what is refused, and what a step gives."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from data_setup import open_data, paint, paint_folder
from PIL import Image

from hydit_core.data.config import DataConfig
from hydit_core.data.dataset import TrainData
from hydit_core.data.sources import PictureFile
from hydit_core.data.sources.entry import Entry
from hydit_core.errors import DataError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return paint_folder(tmp_path / "pictures")


def all_captions(data: TrainData) -> set[str]:
    return set(data.captions())


def test_folder(pictures: Path) -> None:
    (pictures / ".hidden").mkdir()
    paint(pictures / ".hidden" / "x.png", 99)
    (pictures / "notes.md").write_text("not a picture")
    data = open_data(pictures)
    assert [record.key for record in data.manifest][:2] == ["pictures/00.png", "pictures/03.png"]
    record = data.manifest[5]
    assert record.captions == ("picture 2 in two lines",)
    assert (record.width, record.height) == (56, 32)
    assert data.summary().pictures == 12


def test_caption_lines_are_alternatives(pictures: Path) -> None:
    data = open_data({"path": pictures, "caption_lines": True}, batch_size=12)
    assert data.manifest[0].captions == ("picture 0", "in two lines")
    drawn = [caption for step in range(20) for caption in data.batch(step).captions]
    assert 80 < drawn.count("in two lines") < 160


def test_missing_captions_are_named_with_a_hint(pictures: Path) -> None:
    (pictures / "00.txt").rename(pictures / "00.caption")
    (pictures / "03.txt").rename(pictures / "03.png.txt")
    (pictures / "06.txt").write_text(" \n")
    (pictures / "09.txt").unlink()
    with pytest.raises(DataError) as error:
        open_data(pictures)
    for part in (
        "pictures without a caption: 4",
        "00.caption, expected 00.txt",
        "03.png.txt",
        "06.txt is empty",
    ):
        assert part in str(error.value)
    assert "allow_missing_captions" in str(error.value)
    data = open_data(pictures, allow_missing_captions=True, empty_caption="an icon")
    assert data.summary().missing_captions == 4
    assert data.manifest[0].captions == ("an icon",)


def test_what_a_run_does_without_is_told(pictures: Path) -> None:
    for name in ("a.heic", "b.HEIF", "c.jxl", "birds/d.tga", "e.unheard-of", "f"):
        (pictures / name).write_bytes(b"\0" * 9)
    for name in ("a", "b", "birds/d", "e", "f", "lost", "birds/also lost"):
        (pictures / f"{name}.txt").write_text("a caption")
    (pictures / "notes.md").write_text("of no picture")
    (pictures / "notes.json").write_text("{}")
    (pictures / "00.heic").write_bytes(b"\0")  # 00.png has the caption, and this is no picture that is used
    summary = open_data(pictures).summary()
    assert summary.pictures == 12
    text = "\n".join(summary.lines())
    kinds = "2 .heic, 1 .heif, 1 .jxl, 1 .unheard-of, 1 without suffix, ..."
    assert f"not read, of other formats: 7 ({kinds}); save them as PNG or JPEG" in text
    assert "  00.heic\n  a.heic\n  b.HEIF\n  c.jxl\n  e.unheard-of\n  ... and 2 more" in text
    assert "captions without a picture: 2\n  lost.txt\n  birds/also lost.txt" in text


def test_a_folder_of_nothing_that_is_read_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"no pictures found .*\n.*1 \.heic.*\n  a\.heic"):
        open_data(tmp_path)


def test_a_table_beside_the_pictures_may_hold_the_captions(pictures: Path, tmp_path: Path) -> None:
    """As in the folders that `datasets` loads."""
    (pictures / "metadata.jsonl").write_text(json.dumps({"file_name": "00.png", "text": "x"}))
    (pictures / "00.txt").unlink()
    with pytest.raises(DataError, match=r"without a caption: 1\n.*\nThere is metadata\.jsonl: "):
        open_data(pictures)
    assert open_data(pictures / "metadata.jsonl").summary().pictures == 1
    assert open_data(pictures, allow_missing_captions=True).summary().passed_over == []
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "train-00000-of-00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"no pictures found .*\nThere is train-00000-of-00002\.parquet: "):
        open_data(tmp_path / "shards")


def test_nothing_is_told_of_a_plain_folder(pictures: Path) -> None:
    (pictures / "mask").mkdir()
    paint(pictures / "mask" / "00.png", 0)
    (pictures / "00.txt").rename(pictures / "00.png.txt")
    data = open_data(pictures, allow_missing_captions=True)
    assert data.summary().passed_over == []


@pytest.mark.parametrize("picture", ["NFC", "NFD"])
@pytest.mark.parametrize("caption", ["NFC", "NFD"])
def test_accents_in_either_spelling_of_unicode(tmp_path: Path, picture: str, caption: str) -> None:
    name, other = (unicodedata.normalize(form, "café が") for form in (picture, caption))
    folder = paint(tmp_path / "d" / f"{name}.png", 1).parent
    (folder / f"{other}.txt").write_text("right")
    (folder / "mask").mkdir()
    Image.new("L", (40, 32), 255).save(folder / "mask" / f"{other}.png")
    data = open_data(folder, mask={"kind": "files"}, batch_size=1)
    assert data.manifest[0].captions == ("right",) and data.batch(0).mask is not None
    assert data.summary().passed_over == []
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({"image": f"d/{other}.png", "caption": "x"}), encoding="utf-8")
    assert open_data(file).summary().pictures == 1


def test_of_two_spellings_the_exact_one_counts(tmp_path: Path) -> None:
    names = {form: unicodedata.normalize(form, "é") for form in ("NFC", "NFD")}
    for number, (form, name) in enumerate(names.items()):
        paint(tmp_path / "d" / f"{name}.png", number).with_suffix(".txt").write_text(form)
    if len(list((tmp_path / "d").iterdir())) == 2:
        pytest.skip("this file system takes them for one")
    found = {record.key: record.captions for record in open_data(tmp_path / "d").manifest}
    assert found == {f"d/{name}.png": (form,) for form, name in names.items()}


def test_long_lists_of_missing_captions_are_shortened(pictures: Path) -> None:
    for text in pictures.rglob("*.txt"):
        text.unlink()
    with pytest.raises(DataError, match=r"without a caption: 12(.|\n)*\n  \.\.\. and 7 more\n") as error:
        open_data(pictures)
    assert str(error.value).count(".png") == 5


def test_unreadable_pictures_are_named_or_skipped(pictures: Path) -> None:
    (pictures / "03.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"pictures that cannot be read: 1\n.*03\.png"):
        open_data(pictures)
    data = open_data(pictures, on_unreadable="skip")
    summary = data.summary()
    assert (summary.pictures, summary.skipped) == (11, 1)
    assert "03.png" in "\n".join(summary.lines())


def test_a_picture_that_breaks_off_is_found_when_it_is_decoded(pictures: Path) -> None:
    whole = (pictures / "03.png").read_bytes()
    (pictures / "03.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"03\.png"):
        for batch in open_data(pictures).loader(0, 3):
            del batch
    data = open_data(pictures, on_unreadable="skip")
    batches = list(data.loader(0, 3))
    assert [key for b in batches for key in b.skipped] == ["pictures/03.png"]
    assert all(len(set(b.keys)) and "pictures/03.png" not in b.keys and len(b) == 4 for b in batches)


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    told = {"width": 32, "height": 32}
    for name in ("a\0b.png", "x" * 5000, "."):
        for row in ({"image": name, "text": "x"}, {"image": name, "text": "x", **told}):
            file.write_text(json.dumps(row))
            with pytest.raises(DataError, match="cannot read picture"):
                open_data(file, batch_size=1).batch(0)


@pytest.mark.parametrize("name", ["00.txt", "data.jsonl"])
def test_texts_in_other_encodings_are_named(pictures: Path, name: str) -> None:
    text = json.dumps({"image": "00.png", "caption": "一只鸟"}, ensure_ascii=False)
    (pictures / name).write_bytes(text.encode("gb18030"))
    with pytest.raises(DataError, match=rf"{name}.* is not UTF-8 .*GB18030"):
        open_data(pictures if name == "00.txt" else pictures / name)


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_data(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures found"):
        open_data(tmp_path / "empty")
    (tmp_path / "data.xlsx").write_text("")
    with pytest.raises(DataError, match=r"\.jsonl, \.ndjson, \.csv"):
        open_data(tmp_path / "data.xlsx")


def test_control_pictures_are_looked_at_and_handed_on(pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"image": "pictures/00.png", "caption": "x", "pose": "pictures/birds/04.png"}))
    data = open_data({"path": file, "control_field": "pose"})
    assert data.manifest[0].extra == {"control": PictureFile(pictures / "birds" / "04.png")}
    (pictures / "birds" / "04.png").unlink()
    with pytest.raises(DataError, match=r"04\.png: no such file"):
        open_data({"path": file, "control_field": "pose"})


def test_repeats_and_several_sources(pictures: Path, tmp_path: Path) -> None:
    paint(tmp_path / "more" / "a.png", 50).with_suffix(".txt").write_text("more")
    data = open_data(pictures, {"path": tmp_path / "more", "repeats": 4}, batch_size=4)
    assert data.summary().samples_per_epoch == 16
    keys = [key for step in range(data.steps_per_epoch) for key in data.batch(step).keys]
    assert keys.count("more/a.png") == 4 and keys.count("pictures/00.png") == 1
    assert data.summary().sources == {str(pictures): 12, str(tmp_path / "more"): 1}


def test_validation_split_depends_on_names_alone(pictures: Path) -> None:
    def held_out(**options: object) -> set[str]:
        data = open_data(pictures, **options)
        assert not set(data.layout.validation) & set(data.layout.own)
        assert len(data.layout.validation) + len(set(data.layout.own)) == len(data.manifest)
        return {data.manifest.keys[row] for row in data.layout.validation}

    three = held_out(validation=3)
    assert len(three) == 3 and three == held_out(validation=3, seed=99)
    fraction = held_out(validation=0.3)
    assert 0 < len(fraction) < 8
    for i in range(100, 130):
        paint(pictures / f"{i}.png", i).with_suffix(".txt").write_text("new")
    assert fraction == {key for key in held_out(validation=0.3) if int(Path(key).stem) < 100}
    with pytest.raises(DataError, match="validation = 42"):
        open_data(pictures, validation=42)


def test_too_small_pictures_are_left_out_and_counted(pictures: Path) -> None:
    paint(pictures / "tiny.png", 1, (8, 8)).with_suffix(".txt").write_text("tiny")
    summary = open_data(pictures).summary()
    assert summary.enlarged == 1
    assert "smaller than their training size, so enlarged: 1" in summary.lines()
    summary = open_data(pictures, min_side=32).summary()
    assert (summary.pictures, summary.too_small, summary.enlarged) == (12, 1, 0)


def same(a: object, b: object) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def test_batches_are_functions_of_the_step(pictures: Path) -> None:
    options = {"flip": 0.5, "buckets": {"enabled": True, "step": 8}, "validation": 2}
    data = open_data(pictures, **options)
    one = list(data.loader(0, 7))
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    two = list(open_data(pictures, **options).loader(0, 7, workers=2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(same(a, b) for a, b in zip(one, two, strict=True))
    assert same(open_data(pictures, **options).batch(5), one[5])
    assert not same(open_data(pictures, **options, seed=2).batch(5), one[5])
    assert len({batch.size for batch in one}) > 1
    for batch in one:
        assert batch.pixels.shape == (4, 3, batch.size[1], batch.size[0])
        assert batch.pixels.min() >= -1 and batch.pixels.max() <= 1


def test_ranks_together_see_the_batch_of_one_process(pictures: Path) -> None:
    alone = open_data(pictures, flip=0.5, validation=3)
    ranks = [open_data(pictures, flip=0.5, validation=3, batch_size=2, rank=r, world=2) for r in range(2)]
    for step in range(6):
        parts = [data.batch(step) for data in ranks]
        whole = alone.batch(step)
        assert torch.equal(torch.cat([p.pixels for p in parts]), whole.pixels)
        assert torch.equal(torch.cat([p.positions for p in parts]), whole.positions)
        assert parts[0].captions + parts[1].captions == whole.captions


def test_crops_and_flips_vary_and_tell_what_they_did(pictures: Path) -> None:
    data = open_data(pictures, flip=0.5, batch_size=12)
    seen = {}
    for step in range(6):
        batch = data.batch(step)
        for key, crop, size, pixels in zip(
            batch.keys, batch.crops, batch.original_sizes, batch.pixels, strict=True
        ):
            seen.setdefault(key, set()).add((tuple(crop.tolist()), bytes(pixels.numpy().tobytes())))
            left, top = crop.tolist()
            picture = np.asarray(Image.open(pictures.parent / key)).astype(np.float32) / 127.5 - 1
            assert size.tolist() == [picture.shape[1], picture.shape[0]]
            window = torch.tensor(picture[top : top + 32, left : left + 32]).permute(2, 0, 1)
            assert min((pixels - window).abs().max(), (pixels - window.flip(-1)).abs().max()) < 1e-6
    assert any(len({crop for crop, _ in v}) > 2 for v in seen.values())
    centered = open_data(pictures, crop="center", batch_size=12).batch(0)
    assert {tuple(c) for c in centered.crops.tolist()} == {(4, 0), (8, 0), (12, 0), (16, 0)}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_validation_picture_counts_once(pictures: Path, world: int) -> None:
    options = {"validation": 7, "buckets": {"enabled": True, "step": 8}, "flip": 0.5}
    shares = [
        list(open_data(pictures, rank=rank, world=world, batch_size=3, **options).validation_batches())
        for rank in range(world)
    ]
    assert len({len(share) for share in shares}) == 1
    batches = [batch for share in shares for batch in share]
    assert all(len(batch) == 3 for batch in batches)
    counted = [
        (position, key)
        for batch in batches
        for position, key, weight in zip(
            batch.positions.tolist(), batch.keys, batch.weights.tolist(), strict=True
        )
        if weight
    ]
    assert sorted(position for position, _ in counted) == list(range(7))
    data = open_data(pictures, **options)
    assert {key for _, key in counted} == {data.manifest.keys[row] for row in data.layout.validation}
    assert list(open_data(pictures).validation_batches()) == []


def test_the_fingerprint_follows_the_data(pictures: Path) -> None:
    before = open_data(pictures).fingerprint()
    assert before == open_data(pictures).fingerprint()
    assert before != open_data(pictures, seed=2).fingerprint()
    assert before != open_data(pictures, batch_size=3).fingerprint()
    (pictures / "00.txt").write_text("another caption")
    assert before != open_data(pictures).fingerprint()


def test_looking_writes_nothing(pictures: Path, tmp_path: Path) -> None:
    before = sorted((str(p), os.stat(p).st_mtime_ns) for p in tmp_path.rglob("*"))
    data = open_data(pictures, validation=2, cache={"latents": True, "dir": tmp_path / "cache"})
    lines = "\n".join(data.summary().lines())
    assert "pictures: 12 (10 to train, 2 for validation)" in lines and "32x32: 10" in lines
    assert sorted((str(p), os.stat(p).st_mtime_ns) for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 100}, "multiples of 8"),
        ({"resolution": (64, 32), "buckets": {"enabled": True}}, "one base edge"),
        ({"alpha_color": "whitish"}, "whitish"),
        ({"validation": 1.5}, "fraction below 1.0"),
        ({"crop": "random", "cache": {"latents": True}}, "fixed crop"),
        ({"buckets": {"sizes": ["64x64"]}}, "enabled = true"),
        ({"flips": 0.5}, "flips"),
        ({"sources": []}, "sources"),
    ],
)
def test_configurations_that_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"sources": [{"path": "x"}], **options})


def test_relative_paths_start_at_the_configuration_file(tmp_path: Path) -> None:
    config = DataConfig(sources=[{"path": "a", "root": "/b"}], cache={"dir": "c"}).resolved(tmp_path)
    assert (config.sources[0].path, config.cache.dir) == (tmp_path / "a", tmp_path / "c")
    assert config.sources[0].root == Path("/b")


def test_a_size_is_known_when_both_sides_are() -> None:
    for sides in ({}, {"width": 64}, {"height": 64}):
        assert not Entry("a", Path("a.png"), ("text",), **sides).complete
    assert Entry("a", Path("a.png"), ("text",), width=64, height=64).complete
