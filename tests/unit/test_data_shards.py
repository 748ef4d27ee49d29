"""Sources of many files: tar files of samples, patterns, data sets saved by Hugging Face's datasets."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from data_setup import paint
from PIL import Image

from hydit_core.data.config import DataConfig
from hydit_core.data.dataset import TrainData, open_dataset
from hydit_core.data.gathering import gather
from hydit_core.data.prepared import open_many, prepared_layout
from hydit_core.errors import DataError


def picture(number: int, size: tuple[int, int] = (48, 32), kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (number * 9 % 256, 40, 99)).save(content, kind)
    return content.getvalue()


def write_tar(path: Path, files: dict[str, bytes], kind: int = tarfile.GNU_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def samples(first: int, count: int) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for number in range(first, first + count):
        files[f"{number:04}.png"] = picture(number)
        files[f"{number:04}.txt"] = f"picture {number}, 图".encode()
    return files


def config(path: Path, source: dict[str, Any] | None = None, **options: Any) -> DataConfig:
    return DataConfig(sources=[{"path": path, **(source or {})}], resolution=32, **options)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_pictures_of_a_tar_file_are_found_again(tmp_path: Path, kind: int) -> None:
    files = samples(0, 3)
    if kind != tarfile.USTAR_FORMAT:
        long = "图" * 90
        files |= {f"{long}.png": picture(3), f"{long}.txt": b"long"}
    write_tar(tmp_path / "a.tar", files, kind)
    manifest, _ = gather(config(tmp_path / "a.tar"))
    assert len(manifest) == len(files) // 2
    assert [manifest[0].key, manifest[2].captions] == ["a/a.tar/0000.png", ("picture 2, 图",)]
    with tarfile.open(tmp_path / "a.tar") as archive:
        for row, name in enumerate(name for name in files if name.endswith(".png")):
            extracted = archive.extractfile(name)
            assert extracted is not None and manifest.picture(row).read() == extracted.read()
            assert manifest.size(row) == (48, 32)


def test_a_sample_as_img2dataset_writes_it(tmp_path: Path) -> None:
    told = {
        "caption": "of the json",
        "width": 64,
        "height": 48,
        "url": "http://x",
        "file": "x.jpg",
        "status": "success",
    }
    write_tar(
        tmp_path / "00000.tar",
        {
            "000000.jpg": picture(1, (64, 48), "JPEG"),
            "000000.txt": b"of the txt",
            "000000.json": json.dumps(told).encode(),
            "000001.webp": picture(2, (64, 48), "WEBP"),
            "000001.json": json.dumps(told).encode(),
            "000002.json": json.dumps(told).encode(),
            "._000003.jpg": b"of a mac",
            "sub/000000.JPG": picture(3, (64, 48), "JPEG"),
            "sub/000000.json": json.dumps(told | {"text_en": "another"}).encode(),
        },
    )
    manifest, findings = gather(config(tmp_path / "00000.tar"))
    assert [r.key for r in manifest] == [
        f"00000/00000.tar/{n}" for n in ("000000.jpg", "000001.webp", "sub/000000.jpg")
    ]
    assert [r.captions for r in manifest] == [("of the txt",), ("of the json",), ("of the json", "another")]
    assert findings.passed_over.alone.count == 1
    chosen = config(tmp_path / "00000.tar", {"caption_fields": ["text_en"], "caption": "none"})
    assert [r.captions for r in gather(chosen)[0]] == [("none",), ("none",), ("another",)]


def test_masks_and_control_pictures_in_a_tar_file(tmp_path: Path) -> None:
    files = {
        "a.mask.png": picture(7),
        "a.jpg": picture(1, kind="JPEG"),
        "a.pose.png": picture(9),
        "a.txt": b"a",
    }
    write_tar(tmp_path / "t.tar", files)
    source = {"mask_field": "mask.png", "control_field": "pose.png"}
    asked = config(tmp_path / "t.tar", source, mask={"kind": "files"}, control={"kind": "files"})
    manifest, _ = gather(asked)
    extra = manifest.extra(0)
    assert [extra["mask"].read(), extra["control"].read()] == [files["a.mask.png"], files["a.pose.png"]]
    assert manifest.picture(0).read() == files["a.jpg"]
    assert open_dataset(asked, seed=0, batch_size=1).batch(0).control is not None


def test_a_pattern_is_all_of_its_files_in_order(tmp_path: Path) -> None:
    for shard in range(3):
        write_tar(tmp_path / f"part{shard % 2}" / f"{shard:05}.tar", samples(4 * shard, 4))
    asked = config(tmp_path / "part*" / "*.tar", cache={"dir": tmp_path / "cache"})
    data = open_dataset(asked, seed=1, batch_size=3)
    shards = [record.picture.path.name for record in data.manifest]
    assert shards == ["00000.tar"] * 4 + ["00002.tar"] * 4 + ["00001.tar"] * 4
    mapped = open_many(asked)
    other = TrainData(
        asked, mapped, mapped.findings, seed=1, batch_size=3, layout=prepared_layout(asked, mapped)
    )
    for step in range(5):
        assert data.batch(step).keys == other.batch(step).keys
        assert (data.batch(step).pixels == other.batch(step).pixels).all()
    assert open_many(asked).folder == mapped.folder
    write_tar(tmp_path / "part0" / "00009.tar", samples(50, 2))
    assert len(open_many(asked)) == 14
    (tmp_path / "part0" / "00009.tar").unlink()
    assert len(open_many(asked)) == 12
    with pytest.raises(DataError, match=r"no such file"):
        gather(config(tmp_path / "none*.tar"))


@pytest.mark.parametrize("pattern", ["*/0.tar", "**/*.tar", "[pq]*/0.tar"])
def test_shards_of_one_name_in_several_folders(tmp_path: Path, pattern: str) -> None:
    """Their pictures have names of their own, by which validation chooses."""
    for part in ("p1", "q2"):
        write_tar(tmp_path / "shards" / part / "0.tar", samples(0, 2))
    keys = [record.key for record in gather(config(tmp_path / "shards" / pattern))[0]]
    assert keys == [f"shards/{part}/0.tar/{name}.png" for part in ("p1", "q2") for name in ("0000", "0001")]


def test_parquet_shards_are_one_source(tmp_path: Path) -> None:
    for shard in range(3):
        cells = [{"bytes": picture(10 * shard + i), "path": None} for i in range(2)]
        pa.parquet.write_table(
            pa.table({"image": cells, "caption": ["a", "b"]}), tmp_path / f"t-{shard}.parquet"
        )
    for place in (tmp_path / "t-*.parquet", tmp_path):
        manifest, _ = gather(config(place, {"kind": "parquet"}))
        assert [manifest.picture(i).read() for i in range(6)] == [picture(n) for n in (0, 1, 10, 11, 20, 21)]
    renamed = pa.table({"img_path": [picture(3)], "caption": ["c"]})
    pa.parquet.write_table(renamed, tmp_path / "t-9.parquet")
    with pytest.raises(DataError, match=r"t-9.parquet: its pictures are in 'img_path', .* before in 'image'"):
        gather(config(tmp_path / "t-*.parquet"))


def save_to_disk(folder: Path, **state: Any) -> None:
    """What Hugging Face's datasets 5.2 write: streams, and two JSON files."""
    folder.mkdir()
    names = [f"data-{number:05}-of-00002.arrow" for number in range(2)]
    for number, name in enumerate(names):
        cells = [{"bytes": picture(10 * number + i), "path": "x.png"} for i in range(3)]
        table = pa.table({"image": cells, "text": ["a", "b", "c"]})
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    told = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(told | state))
    (folder / "dataset_info.json").write_text("{}")


def test_a_data_set_that_was_saved_to_disk(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "saved")
    manifest, _ = gather(config(tmp_path / "saved"))
    assert [manifest.picture(i).read() for i in range(6)] == [picture(n) for n in (0, 1, 2, 10, 11, 12)]
    assert manifest[3].captions == ("a",)
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"lacks data-00001-of-00002\.arrow"):
        gather(config(tmp_path / "saved"))
    save_to_disk(tmp_path / "strange", _data_files=[{"filename": "../saved/data-00000-of-00002.arrow"}])
    save_to_disk(tmp_path / "chosen", _indices_data_files=[{"filename": "indices.arrow"}])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["saved"]}')
    for place, told in (
        ("strange", "no file: '../saved"),
        ("chosen", "selection"),
        ("", "several data sets"),
    ):
        with pytest.raises(DataError, match=told):
            gather(config(tmp_path / place))


@pytest.mark.parametrize("damage", ["cut", "text", "gzip", "no json", "long", "bytes"])
def test_a_damaged_tar_file_is_one_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.tar"
    files = samples(0, 2)
    if damage == "no json":
        files["0001.json"] = b"{"
    elif damage == "long":
        files["0001.txt"] = b"a" * (2 << 20)
    elif damage == "bytes":
        files["0001.txt"] = b"\xff\xfe\xfd"
    write_tar(path, files)
    if damage == "cut":
        content = path.read_bytes()
        path.write_bytes(content[:700])
    elif damage == "text":
        path.write_text("no tar" * 300)
    elif damage == "gzip":
        with tarfile.open(path, "w:gz"):
            pass
    with pytest.raises(DataError, match=r"a\.tar"):
        gather(config(path))


def test_a_tar_file_that_was_replaced_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples(0, 3))
    manifest, _ = gather(config(tmp_path / "a.tar"))
    (tmp_path / "a.tar").write_bytes(np.random.default_rng(0).bytes(6000))
    for row in range(3):
        with pytest.raises(DataError, match=r"a\.tar.* has it changed"):
            manifest.picture(row).read()
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(DataError, match="has it changed"):
        manifest.picture(0).read()


def test_a_folder_of_tar_files_tells_what_to_do(tmp_path: Path) -> None:
    write_tar(tmp_path / "d" / "a.tar", samples(0, 1))
    with pytest.raises(DataError, match=r"There is a\.tar"):
        gather(config(tmp_path / "d"))
    paint(tmp_path / "d" / "x.png", 1)
    assert len(gather(config(tmp_path / "d", {"kind": "tar"}))[0]) == 1
