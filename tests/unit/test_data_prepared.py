"""Data that are listed once in a file and mapped: the same rows, order and batches as gathered ones."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
import torch
from data_setup import paint
from PIL import Image
from safetensors.torch import load_file
from train_setup import run_training, write_run

from hydit_core.data import prepared as prepared_module
from hydit_core.data.buckets import bucket_sizes
from hydit_core.data.config import DataConfig, PriorConfig
from hydit_core.data.dataset import TrainData, open_dataset
from hydit_core.data.gathering import gather
from hydit_core.data.layout import Layout
from hydit_core.data.mapped import MappedManifest, newest
from hydit_core.data.prepared import (
    find_prepared,
    gather_few,
    open_many,
    prepare,
    prepare_again,
    prepared_folder,
    prepared_layout,
    unchanged,
)
from hydit_core.errors import ConfigError, DataError
from hydit_core.train import launch
from hydit_core.train.__main__ import main


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record batches of 4 rows, so that a few rows lie in several."""
    monkeypatch.setattr(prepared_module, "_BATCH", 4)


def config(tmp_path: Path, **options: object) -> DataConfig:
    """A folder with captions of all kinds, a table with several captions a row, prior pictures."""
    for i in range(9):
        paint(tmp_path / "mine" / f"{i}.png", i, (64, 32 if i % 3 else 64))
        (tmp_path / "mine" / f"{i}.txt").write_text(f"一只 cat {i}", encoding="utf-8")
    rows = []
    for i in range(7):
        paint(tmp_path / "pictures" / f"ü{i}.png", i, (32, 64))
        rows.append({"image": f"pictures/ü{i}.png", "caption": [f"a {i}", f"b {i}", "c"][: 1 + i % 3]})
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for i in range(5):
        paint(tmp_path / "dogs" / f"{i}.png", i, (64, 64))
    sources = [
        {"path": tmp_path / "mine", "repeats": 2},
        {"path": tmp_path / "table.jsonl"},
        {"path": tmp_path / "dogs", "prior": True, "caption": "a dog"},
    ]
    buckets = {"enabled": True, "step": 16}
    common = {"validation": 3, "cache": {"dir": tmp_path / "p"}}
    return DataConfig(sources=sources, resolution=32, buckets=buckets, **{**common, **options})


def opened(config: DataConfig) -> TrainData:
    manifest = prepare(config)
    layout = prepared_layout(config, manifest)
    return TrainData(config, manifest, manifest.findings, seed=1, batch_size=4, layout=layout)


def test_rows_are_those_that_are_gathered(tmp_path: Path) -> None:
    asked = config(tmp_path)
    gathered, findings = gather(asked)
    mapped = prepare(asked)
    assert len(mapped) == len(gathered) == 21
    assert list(mapped) == list(gathered)
    assert mapped.findings == findings
    for name in ("widths", "heights", "sources"):
        assert getattr(mapped, name).tolist() == getattr(gathered, name).tolist()
    assert mapped.captions.lengths().tolist() == gathered.captions.lengths().tolist()
    assert [mapped.captions[i] for i in range(len(mapped.captions))] == [
        caption for record in gathered for caption in record.captions
    ]
    assert mapped[10].captions == ("a 1", "b 1")
    with pytest.raises(IndexError):
        mapped.keys[21]


def test_batches_are_those_of_gathered_data(tmp_path: Path) -> None:
    asked = config(tmp_path)
    plain, mapped = open_dataset(asked, seed=1, batch_size=4), opened(asked)
    assert isinstance(mapped.layout.own, np.memmap)
    for data in (mapped, pickle.loads(pickle.dumps(mapped))):
        assert isinstance(data.manifest, MappedManifest) and isinstance(data.layout.own, np.memmap)
        for step in range(20):
            a, b = plain.batch(step), data.batch(step)
            assert (a.keys, a.captions, a.size) == (b.keys, b.captions, b.size)
            assert (a.pixels == b.pixels).all() and a.weights.tolist() == b.weights.tolist()
        pairs = zip(plain.validation_batches(), data.validation_batches(), strict=True)
        assert all(a.keys == b.keys for a, b in pairs)
    assert plain.summary() == mapped.summary()


def test_cells_of_tables_are_found_again(tmp_path: Path) -> None:
    for i in range(6):
        paint(tmp_path / "d" / f"{i}.png", i)
    cells = [(tmp_path / "d" / f"{i}.png").read_bytes() for i in range(6)]
    write_arrow(tmp_path / "t.arrow", cells)
    asked = DataConfig(sources=[{"path": tmp_path / "t.arrow"}], resolution=32, cache={"dir": tmp_path / "p"})
    mapped = prepare(asked)
    assert [mapped.picture(i).read() for i in range(6)] == cells
    assert list(mapped) == list(gather(asked)[0])


def test_the_file_is_plain_arrow(tmp_path: Path) -> None:
    asked = config(tmp_path)
    prepare(asked)
    (path,) = (tmp_path / "p").glob("rows-*/*/rows.arrow")
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    assert table.num_rows == 21
    assert table["key"][0].as_py() == b"mine/0.png"
    assert table["captions"][10].as_py() == [b"a 1", b"b 1"]
    assert table["bytes"][0].as_py() == (tmp_path / "mine" / "0.png").stat().st_size


def test_the_fingerprint_follows_what_changes_the_order(tmp_path: Path) -> None:
    asked = config(tmp_path)
    first = opened(asked).fingerprint()
    assert opened(asked).fingerprint() == first
    for update in ({"validation": 2}, {"prior": PriorConfig(share=0.25)}, {"flip": 0.5}):
        assert opened(asked.model_copy(update=update)).fingerprint() != first
    (tmp_path / "mine" / "3.txt").write_text("a dog", encoding="utf-8")
    assert opened(asked).fingerprint() != first


def opened_pictures(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes of the pictures that are opened from now on."""
    looked: list[tuple[int, int]] = []
    real = Image.open

    def open_(file: Any, *arguments: Any, **options: Any) -> Any:
        picture = real(file, *arguments, **options)
        looked.append(picture.size)
        return picture

    monkeypatch.setattr(Image, "open", open_)
    return looked


def test_pictures_that_did_not_change_are_not_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(tmp_path)
    before, first = prepare_again(asked)
    assert first is None
    paint(tmp_path / "mine" / "4.png", 4, (48, 64))
    paint(tmp_path / "mine" / "new.png", 1, (64, 64))
    (tmp_path / "mine" / "new.txt").write_text("new", encoding="utf-8")
    (tmp_path / "mine" / "5.txt").write_text("another caption", encoding="utf-8")
    (tmp_path / "dogs" / "0.png").unlink()
    looked = opened_pictures(monkeypatch)
    after, changes = prepare_again(asked)
    assert sorted(looked) == [(48, 64), (64, 64)]
    assert str(changes) == "1 new, 2 changed, 1 gone"
    assert list(after) == list(gather(asked)[0])
    assert after.digest != before.digest
    assert len(list(after.folder.parent.iterdir())) == 2  # the older version is gone
    assert not prepare_again(asked)[1]
    looked.clear()
    few = gather_few(asked)
    assert few is not None and list(few[0]) == list(after) and not looked


def new_picture(folder: Path) -> None:
    paint(folder / "mine" / "new.png", 1, (64, 64))
    (folder / "mine" / "new.txt").write_text("new", encoding="utf-8")


def another_size(folder: Path) -> None:
    paint(folder / "mine" / "0.png", 1, (64, 16))


def another_caption(folder: Path) -> None:
    (folder / "mine" / "0.txt").write_text("another", encoding="utf-8")


def picture_gone(folder: Path) -> None:
    (folder / "dogs" / "0.png").unlink()


def row_gone(folder: Path) -> None:
    table = folder / "table.jsonl"
    table.write_text("".join(table.read_text(encoding="utf-8").splitlines(True)[1:]), encoding="utf-8")


def picture_of_a_row(folder: Path) -> None:
    paint(folder / "pictures" / "ü1.png", 1, (32, 32))


def not_read(folder: Path) -> None:
    (folder / "mine" / "x.heic").write_bytes(b"")


@pytest.mark.parametrize(
    "change",
    [new_picture, another_size, another_caption, picture_gone, row_gone, picture_of_a_row, not_read],
)
def test_a_start_finds_what_has_changed(tmp_path: Path, change: Callable[[Path], None]) -> None:
    asked = config(tmp_path)
    first = open_many(asked)
    assert open_many(asked).folder == first.folder  # nothing is written again
    change(tmp_path)
    said: list[str] = []
    second = open_many(asked, say=said.append)
    assert second.folder != first.folder
    assert (list(second), second.findings) == (list(gather(asked)[0]), gather(asked)[1])
    assert ("1 new" in said[0]) == (change is new_picture) and ("1 gone" in said[0]) == (
        change in (picture_gone, row_gone)
    )


def test_a_table_that_changes_makes_its_rows_anew(tmp_path: Path) -> None:
    """Also one that an index names; of pictures in tables alone, nothing else is read."""
    for i in range(3):
        paint(tmp_path / "d" / f"{i}.png", i)
    cells = [(tmp_path / "d" / f"{i}.png").read_bytes() for i in range(3)]
    for number in (1, 2):
        write_arrow(tmp_path / f"{number}.arrow", cells)
    index = {"arrow_files": ["1.arrow", "2.arrow"], "cum_length": [3, 6], "indices": [0, 2, 4]}
    (tmp_path / "i.json").write_text(json.dumps(index))
    asked = DataConfig(sources=[{"path": tmp_path / "i.json"}], resolution=32, cache={"dir": tmp_path / "p"})
    first = prepare(asked)
    assert unchanged(asked, first)
    write_arrow(tmp_path / "2.arrow", cells[::-1])
    assert not unchanged(asked, first)
    write_arrow(tmp_path / "3.arrow", cells)  # not in the index
    assert unchanged(asked, prepare(asked))


def write_arrow(path: Path, cells: list[bytes]) -> None:
    table = pa.table({"image": cells, "text_zh": [f"图 {i}" for i in range(len(cells))]})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def test_many_files_are_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sources of many files, until one is read; tables and smaller sources are not."""
    asked = config(tmp_path)
    monkeypatch.setattr(prepared_module, "FEW", 8)
    assert gather_few(asked) is None and not (tmp_path / "p").exists()
    first = open_many(asked)
    another_size(tmp_path)  # one of nine
    assert open_many(asked).folder == first.folder
    data = TrainData(asked, first, first.findings, seed=1, batch_size=4)
    with pytest.raises(DataError, match=r"0\.png is 64x16 .* expected to be 64x64"):
        for step in range(10):
            data.batch(step)
    picture_gone(tmp_path)  # one of five
    second = open_many(asked)
    assert second.folder != first.folder and second.size(0) == (64, 16)


def test_an_unreadable_picture_that_is_new_is_told(tmp_path: Path) -> None:
    asked = config(tmp_path)
    open_many(asked)
    (tmp_path / "mine" / "x.png").write_bytes(b"no picture")
    (tmp_path / "mine" / "x.txt").write_text("x")
    with pytest.raises(DataError, match="cannot be read: 1"):
        open_many(asked)


def test_only_what_decides_the_rows_names_their_folder(tmp_path: Path) -> None:
    asked = config(tmp_path)
    same = [{"resolution": 64}, {"flip": 0.5}, {"validation": 2}]
    other = [{"min_side": 48}, {"on_unreadable": "skip"}, {"mask": {"kind": "files"}}]
    place = prepared_folder(asked)
    assert {prepared_folder(asked.model_copy(update=update)) for update in same} == {place}
    for update in other:
        assert prepared_folder(config(tmp_path, **update)) != place


@pytest.mark.parametrize(
    "damage", ["cut", "longer", "zeros", "note", "version", "elsewhere", "gone", "empty"]
)
def test_what_is_damaged_counts_as_absent(tmp_path: Path, damage: str) -> None:
    asked = config(tmp_path)
    folder = prepared_folder(asked)
    first = prepare(asked)
    path, note = first.folder / "rows.arrow", folder / "prepared.json"
    content = path.read_bytes()
    contents = {"cut": content[:-300], "longer": content + b"x", "zeros": bytes(len(content))}
    notes = {
        "version": {"version": 99},
        "elsewhere": {"build": f"../{folder.name}/{first.folder.name}"},
        "note": {"sources": [{"rows": []}]},
    }
    if damage in contents:
        path.write_bytes(contents[damage])
    elif damage == "gone":
        path.unlink()
    elif damage == "empty":
        note.write_text("")
    else:
        note.write_text(json.dumps(json.loads(note.read_text()) | notes[damage]))
    assert find_prepared(asked) is None
    with pytest.raises(DataError):
        newest(folder)
    assert list(open_many(asked)) == list(gather(asked)[0])
    assert find_prepared(asked) is not None


def test_a_damaged_layout_is_made_anew(tmp_path: Path) -> None:
    data = opened(config(tmp_path))
    own = data.layout.own.tolist()
    (folder,) = data.manifest.folder.glob("layout-*")
    (folder / "own.npy").unlink()  # what is mapped must not shrink
    (folder / "own.npy").write_bytes(b"")
    again = prepared_layout(data.config, newest(prepared_folder(data.config)))
    assert again.own.tolist() == own and again.folder == folder


def test_a_worker_maps_the_same_version_or_none(tmp_path: Path) -> None:
    asked = config(tmp_path)
    sent = pickle.dumps(prepare(asked))
    assert len(sent) < 10_000
    another_caption(tmp_path)
    prepare(asked)
    with pytest.raises(DataError, match="prepare them anew"):
        pickle.loads(sent)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = config(tmp_path)
    mapped = prepare(asked)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refused)
    own = Layout.of(asked, mapped, bucket_sizes(asked)).own
    assert prepared_layout(asked, mapped).own.tolist() == own.tolist()
    assert open_many(asked).folder == mapped.folder
    with pytest.raises(DataError, match=r"prepared data to .*: Permission denied.*data\.cache\.dir"):
        prepare(asked)
    assert open_many(asked).folder == mapped.folder and len(list(mapped.folder.parent.iterdir())) == 2


def test_nothing_is_left_of_what_failed(tmp_path: Path) -> None:
    asked = config(tmp_path)
    (tmp_path / "mine" / "0.txt").unlink()
    with pytest.raises(DataError, match="without a caption: 1"):
        prepare(asked)
    assert not list(prepared_folder(asked).iterdir())


def test_names_in_no_known_encoding(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("this system's names are Unicode")
    asked = config(tmp_path)
    odd = os.fsdecode(b"\xff\xfe")
    paint(tmp_path / "mine" / f"{odd}.png", 1)
    (tmp_path / "mine" / f"{odd}.txt").write_text("odd")
    (tmp_path / "mine" / f"{odd}2.heic").write_bytes(b"")
    (tmp_path / "table.jsonl").rename(tmp_path / f"{odd}.jsonl")
    table = asked.sources[1].model_copy(update={"path": tmp_path / f"{odd}.jsonl"})
    asked = asked.model_copy(update={"sources": (asked.sources[0], table)})
    mapped = open_many(asked)
    assert list(mapped) == list(gather(asked)[0]) and mapped.findings == gather(asked)[1]
    assert open_many(asked).folder == mapped.folder


def test_pictures_do_not_lie_beside_what_is_prepared(tmp_path: Path) -> None:
    inside = config(tmp_path, cache={"dir": tmp_path / "mine" / "p"})
    with pytest.raises(ConfigError, match="inside the picture folder"):
        prepare(inside)
    assert gather_few(inside) is not None


# -- the command -------------------------------------------------------------------------------------


def test_train_prepare_and_train(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings, cache = write_run(tmp_path), f"data.cache.dir={tmp_path / 'cache'}"
    command = [str(settings), "--set", cache]
    assert main(["prepare", *command]) == 0
    assert "prepared 8 pictures, in " in capfd.readouterr().err
    (tmp_path / "pictures" / "7.png").unlink()
    assert main(["prepare", *command]) == 0
    assert "prepared 7 pictures (0 new, 0 changed, 1 gone), in " in capfd.readouterr().err
    (tmp_path / "pictures" / "0.txt").unlink()
    assert main(["prepare", *command]) == 2
    assert capfd.readouterr().err.count("error: ") == 1


def test_a_training_of_mapped_rows_is_one_of_rows_that_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = write_run(tmp_path)
    common = [f"data.cache.dir={tmp_path / 'cache'}", "run.steps=2", "schedule.warmup_steps=0"]
    assert run_training(settings, *common, f"run.output_dir={tmp_path / 'kept'}")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(prepared_module, "FEW", 3)
    monkeypatch.setattr(launch, "FEW", 3)
    assert not run_training(settings, *common, f"run.output_dir={tmp_path / 'mapped'}", stop_after_micro=3)
    capfd.readouterr()
    assert run_training(settings, *common, f"run.output_dir={tmp_path / 'mapped'}", resume="auto")
    assert "changed since the checkpoint" not in capfd.readouterr().err
    for name, tensor in load_file(tmp_path / "kept" / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "mapped" / "model.safetensors")[name], tensor)
    (tmp_path / "pictures" / "0.txt").write_text("another", encoding="utf-8")
    assert main(["prepare", str(settings), "--set", common[0]]) == 0
    assert run_training(
        settings, *common, f"run.output_dir={tmp_path / 'mapped'}", "run.steps=3", resume="auto"
    )
    said = capfd.readouterr().err
    assert "prepared 8 pictures (0 new, 1 changed, 0 gone)" in said
    assert "changed since the checkpoint: data: other pictures, captions or batches" in said
    assert main([str(settings), "--set", common[0], "--dry-run"]) == 0
    assert "pictures: 8 (6 to train, 2 for validation)" in capfd.readouterr().out


def test_a_million_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a file of 1000, a thousand times: each is found, and nothing is kept of them."""
    monkeypatch.setattr(prepared_module, "_BATCH", 1000)
    lines = [
        {"image": f"{i}.png", "caption": [f"a{i}", "b", f"c{i}"][: 1 + i % 3], "width": 64 + i, "height": 64}
        for i in range(1000)
    ]
    table = tmp_path / "t.jsonl"
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = DataConfig(sources=[{"path": table}], resolution=32, cache={"dir": tmp_path / "p"})
    small = prepare(asked)
    (batch,) = pa.ipc.open_file(pa.memory_map(str(small.folder / "rows.arrow"))).read_all().to_batches()
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        for _ in range(1000):
            writer.write_batch(batch)
    (tmp_path / "rows.arrow").replace(small.folder / "rows.arrow")
    note = small.folder.parent / "prepared.json"
    size = (small.folder / "rows.arrow").stat().st_size
    note.write_text(json.dumps(json.loads(note.read_text()) | {"rows": 10**6, "bytes": size, "digest": "x"}))

    manifest = open_many(asked)
    assert len(manifest) == 10**6 and len(manifest.captions) == 1000 * len(small.captions)
    for row in (0, 999, 1000, 1999, 500_003, 999_999):
        line = lines[row % 1000]
        assert manifest[row].captions == tuple(line["caption"])
        assert (manifest[row].key, manifest.size(row)) == (f"t/{line['image']}", (line["width"], 64))
    data = TrainData(
        asked, manifest, manifest.findings, seed=1, batch_size=500, layout=prepared_layout(asked, manifest)
    )
    seen = np.concatenate([data.order.samples(step) for step in range(2000)])
    assert (np.bincount(seen) == 1).all() and len(seen) == 10**6
    assert len(pickle.dumps(data)) < 100_000
