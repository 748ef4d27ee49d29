"""Arrow files as Tencent's scripts write them, their index JSONs, and Parquet."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from hydit_core.data.cache.latents import build_latent_cache, open_latent_cache
from hydit_core.data.config import DataConfig
from hydit_core.data.dataset import TrainData, open_dataset
from hydit_core.data.sources import arrow_table
from hydit_core.errors import DataError
from hydit_core.images import load_picture

ROWS = 5


def encoded(number: int, width: int = 40) -> bytes:
    noise = np.random.RandomState(number).randint(0, 255, (32, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def write_arrow(path: Path, numbers: range, *, stream: bool = False) -> None:
    pictures = [encoded(i) for i in numbers]
    table = pa.table(
        {
            "text_zh": [f"图 {i}" for i in numbers],
            "md5": [hashlib.md5(p).hexdigest() for p in pictures],
            "width": [40] * len(pictures),
            "height": [32] * len(pictures),
            "image": pictures,
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, writer(file, table.schema) as out:
        out.write_table(table, max_chunksize=2)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Tencent's tree: dataset/porcelain/{arrows,jsons}, paths relative to the folder above."""
    for i in range(2):
        write_arrow(tmp_path / f"dataset/porcelain/arrows/{i:05}.arrow", range(ROWS * i, ROWS * i + ROWS))
    return tmp_path


def write_index(project: Path, **content: object) -> Path:
    path = project / "dataset/porcelain/jsons/porcelain.json"
    path.parent.mkdir(exist_ok=True)
    files = [f"./dataset/porcelain/arrows/{i:05}.arrow" for i in range(2)]
    base = {"data_type": ["gold"], "indices_file": "", "arrow_files": files, "cum_length": [5, 10]}
    path.write_text(json.dumps({**base, **content}))
    return path


def open_data(path: Path, **options: object) -> TrainData:
    config = DataConfig(sources=[{"path": path}], resolution=32, **options)
    return open_dataset(config, seed=1, batch_size=2)


def texts(data: TrainData) -> list[str]:
    return [record.captions[0] for record in data.manifest]


@pytest.mark.parametrize("stream", [False, True])
def test_arrow_file(tmp_path: Path, stream: bool) -> None:
    write_arrow(tmp_path / "a.arrow", range(ROWS), stream=stream)
    data = open_data(tmp_path / "a.arrow", crop="center")
    assert texts(data) == [f"图 {i}" for i in range(ROWS)]
    assert data.manifest.size(3) == (40, 32) and data.manifest[3].key == "a/a.arrow#3"
    for batch in data.loader(0, 3, workers=2):
        for caption, pixels in zip(batch.captions, batch.pixels, strict=True):
            picture = np.asarray(load_picture(encoded(int(caption.split()[1])))).astype(np.float32)
            expected = torch.tensor(picture[:, 4:36] / 127.5 - 1).permute(2, 0, 1)
            torch.testing.assert_close(pixels, expected)


def test_index_selects_rows_and_finds_the_files(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    path = write_index(project, indices=[1, 4, 5, 9], group_length=[2, 2])
    assert texts(open_data(path)) == ["图 1", "图 4", "图 5", "图 9"]
    assert [r.key for r in open_data(path).manifest][2:] == [
        "porcelain/00001.arrow#0",
        "porcelain/00001.arrow#4",
    ]


def test_index_with_numbers_in_a_file(project: Path) -> None:
    path = write_index(project, indices=[], indices_file="porcelain.index.npz", group_length=[2, 0])
    np.savez(path.with_name("porcelain.index.npz"), x=np.array([0, 3]))
    assert texts(open_data(path)) == ["图 0", "图 3"]


def test_index_of_several_resolutions(project: Path) -> None:
    path = write_index(
        project, indices={}, indices_file="m.npz", group_length={"1024x1024": 2, "768x1280": 1}
    )
    np.savez(path.with_name("m.npz"), **{"1024x1024": np.array([0, 7]), "768x1280": np.array([2])})
    assert texts(open_data(path)) == ["图 0", "图 2", "图 7"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"indices": []}, "selects no rows"),
        ({"indices": [10]}, "do not fit together"),
        ({"indices": [1], "cum_length": [5]}, "do not fit together"),
        ({"indices": [1], "arrow_files": ["gone.arrow", "x.arrow"]}, r"gone\.arrow, which was not found"),
        ({"indices": [1], "arrow_files": None}, "not an index of Arrow files"),
        ({"indices": [1], "cum_length": [10, 5]}, "do not fit together"),
        ({"indices": [7], "cum_length": [8, 20]}, "has 5 rows, row 7 is asked for"),
        ({"indices": [0, 1, 7], "cum_length": [8, 20]}, "has 5 rows, row 7 is asked for"),
        ({"indices": [1.5]}, "no list of whole numbers"),
        ({"indices": [[1]]}, "no list of whole numbers"),
        ({"indices": ["1"]}, "no list of whole numbers"),
        ({"indices": [1], "indices_file": "porcelain.json"}, "not an index of Arrow files"),
        ({"indices": [1], "indices_file": "none.npz"}, "cannot read what .* lists: "),
    ],
)
def test_index_errors(project: Path, content: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(write_index(project, **content))


def test_an_index_with_a_name_that_no_system_takes(project: Path) -> None:
    for name in ("a" * 5000 + ".arrow", "a\0.arrow"):
        index = write_index(project, indices=[0])
        content = json.loads(index.read_text())
        index.write_text(json.dumps({**content, "arrow_files": [name, *content["arrow_files"][1:]]}))
        with pytest.raises(DataError, match="which was not found") as error:
            open_data(index)
        assert len(str(error.value)) < 1000


def test_damaged_tables_and_cells(tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_bytes(b"nothing that arrow knows")
    with pytest.raises(DataError, match=r"cannot read .*a\.arrow"):
        open_data(tmp_path / "a.arrow")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column for pictures; expected one of image"):
        open_data(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["a", "b"], "image": [encoded(0), b""]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet, row 1: column image holds no picture"):
        open_data(tmp_path / "b.parquet")
    assert open_data(tmp_path / "b.parquet", on_unreadable="skip").summary().skipped == 1


@pytest.mark.parametrize("form", ["bytes", "struct", "path"])
def test_parquet(tmp_path: Path, form: str) -> None:
    for i in range(ROWS):
        (tmp_path / f"{i}.png").write_bytes(encoded(i, 32 + 8 * i))
    contents = [encoded(i, 32 + 8 * i) for i in range(ROWS)]
    image = {
        "bytes": contents,
        "struct": [{"bytes": c, "path": f"{i}.png"} for i, c in enumerate(contents)],
        "path": [f"{i}.png" for i in range(ROWS)],
    }[form]
    captions = [["one", f"picture {i}"] for i in range(ROWS)]
    pq.write_table(pa.table({"captions": captions, "image": image}), tmp_path / "a.parquet", row_group_size=2)
    data = open_data(tmp_path / "a.parquet")
    assert [data.manifest.size(i) for i in range(ROWS)] == [(32 + 8 * i, 32) for i in range(ROWS)]
    assert data.manifest[4].captions == ("one", "picture 4")
    assert all(torch.isfinite(b.pixels).all() for b in data.loader(0, 3, workers=1))
    assert data.manifest.picture(3).read() == contents[3]


def test_a_row_group_is_decoded_once_for_neighbors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it fits beside those that were used since; as a stream all of a file are neighbors."""
    contents = [encoded(i % ROWS, 32) + bytes(1000) for i in range(24)]
    table = pa.table({"image": contents, "caption": ["a"] * 24, "width": [32] * 24, "height": [32] * 24})
    for name in ("0.parquet", "1.parquet"):
        pq.write_table(table, tmp_path / name, row_group_size=4)
    source = {"path": tmp_path, "kind": "parquet", "stream": True}
    config = DataConfig(sources=[source], resolution=32, window=64)
    data = open_dataset(config, seed=1, batch_size=2)
    decoded: list[tuple[Any, int]] = []
    real = pq.ParquetFile.read_row_group

    def read_row_group(self: Any, group: int, **options: Any) -> Any:
        decoded.append((self, group))
        return real(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)

    def read(rows: list[int], kept: int) -> int:
        monkeypatch.setattr(arrow_table, "_groups", arrow_table._Groups())
        monkeypatch.setattr(arrow_table, "HELD_BYTES", kept)
        decoded.clear()
        assert [data.manifest.picture(row).read() for row in rows] == [contents[row % 24] for row in rows]
        return len(decoded)

    group = 4 * (max(map(len, contents)) + 20)
    assert read([0, 1, 24, 0, 25, 3], 2 * group) == 2
    assert read([0, 1, 24, 0, 25, 3], group) == 5
    assert read([0, 4, 0, 8, 0, 4], 2 * group) == 4  # what was used last stays
    assert read([3, 2, 1], 0) == 1
    samples = np.concatenate([data.order.samples(step) for step in range(data.steps_per_epoch)])
    seen = [data.samples.row(int(sample), 0) for sample in samples]
    assert sorted(seen) == list(range(48)) and read(seen, 1 << 30) == len(set(decoded)) == 12


def test_cached_latents_follow_the_content_of_a_cell(tmp_path: Path) -> None:
    class VAE(torch.nn.Module):
        encoded = 0

        def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
            self.encoded += len(images)
            return torch.nn.functional.avg_pool2d(images, 8)

    def build() -> int:
        vae = VAE()
        data = open_data(tmp_path / "a.arrow", cache={"latents": True, "dir": tmp_path / "cache"})
        build_latent_cache(data, vae)
        data.use_latents(open_latent_cache(data, vae))
        assert data.batch(0).moments.shape == (2, 3, 4, 4)
        return vae.encoded

    write_arrow(tmp_path / "a.arrow", range(ROWS))
    os.utime(tmp_path / "a.arrow", (1, 1))
    assert [build(), build()] == [5, 0]
    write_arrow(tmp_path / "new.arrow", range(2, ROWS + 2))
    os.replace(tmp_path / "new.arrow", tmp_path / "a.arrow")
    assert build() == 2
