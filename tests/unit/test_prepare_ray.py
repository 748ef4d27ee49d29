"""`train prepare --engine ray` and `--features`, and Ray itself: the same files as from one process."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from data_setup import paint
from safetensors import safe_open
from test_bulk_ray import contents, words  # noqa: F401
from train_setup import write_run

from hydit_core.data import gathering
from hydit_core.data import prepared as prepared_module
from hydit_core.data.config import DataConfig
from hydit_core.data.gathering import Findings
from hydit_core.data.on_ray import Work, pieces_of, take, unpacked
from hydit_core.data.prepared import KnownSizes, ManifestWriter, prepare, prepare_again
from hydit_core.errors import DataError
from hydit_core.generate.__main__ import main as generate
from hydit_core.train import on_ray
from hydit_core.train.__main__ import main
from hydit_core.train.config import load_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows in a batch of the file and in what is looked at together, so that some lie in several."""
    monkeypatch.setattr(prepared_module, "_BATCH", 4)
    monkeypatch.setattr(gathering, "_TOGETHER", 3)


def write_sources(folder: Path) -> list[dict[str, Any]]:
    """Of every kind: pictures in files, in tar files and in cells, with and without sizes and captions."""
    for i in range(8):
        paint(folder / "mine" / ("sub" if i % 3 else "") / f"{i}.png", i, (64, 32 if i % 3 else 64))
    for path in sorted((folder / "mine").rglob("*.png"))[:-1]:
        path.with_suffix(".txt").write_text(f"一只 cat {path.stem}", encoding="utf-8")
    (folder / "mine" / "alone.txt").write_text("nothing", encoding="utf-8")
    cells = [paint(folder / "cells" / f"{i}.png", i, (40 + 8 * i, 32)).read_bytes() for i in range(5)]
    rows = [{"image": f"mine/sub/{i}.png", "caption": ["a", "b"], "width": 64, "height": 32} for i in (1, 2)]
    rows.append({"image": "mine/0.png", "caption": "c"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "shards").mkdir()
    for shard in range(2):
        pa.parquet.write_table(
            pa.table({"image": cells[shard::2], "caption": ["x"] * len(cells[shard::2])}),
            folder / "shards" / f"{shard}.parquet",
        )
        with tarfile.open(folder / "shards" / f"{shard}.tar", "w") as tar:
            for i, cell in enumerate(cells):
                for name, content in ((f"{i}.png", cell), (f"{i}.txt", b"in a tar file")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))
    places = ("mine", "rows.jsonl", "shards/*.tar", "shards/*.parquet")
    return [{"path": folder / place} for place in places]


def asked(folder: Path, cache: str, **options: Any) -> DataConfig:
    common = {"resolution": 32, "allow_missing_captions": True, "cache": {"dir": folder / cache}}
    return DataConfig(sources=options.pop("sources", None) or write_sources(folder), **{**common, **options})


def gather_in_parts(config: DataConfig, rows: ManifestWriter, known: KnownSizes | None) -> list[Findings]:
    """What tasks of Ray do and hand to each other, without Ray."""

    def messages() -> Iterator[Any]:
        for piece in pieces_of(config):
            work = pickle.loads(pickle.dumps(Work(config, known=known is not None)))
            batch = pa.table({"message": pa.array([piece["message"]], pa.binary())})
            for listed in work.listed(batch):
                yield from unpacked(work.looked_at(listed))

    return take(config, rows, messages())


def prepared_files(folder: Path) -> dict[str, bytes]:
    """What the note names, whose folder has a new name each time."""
    (note,) = folder.glob("rows-*/prepared.json")
    told = json.loads(note.read_text("utf-8"))
    rows = note.parent / told.pop("build") / "rows.arrow"
    return {"note": json.dumps(told, sort_keys=True).encode(), "rows": rows.read_bytes()}


def entries(folder: Path) -> dict[tuple[str, str], bytes]:
    """Every entry of the caches: its store and key, and its bytes."""
    found = {}
    for shard in folder.glob("*/shard-*.safetensors"):
        with safe_open(shard, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                found[shard.parent.name, key] = file.get_tensor(key).contiguous().numpy().tobytes()
    return found


# -- rows ---------------------------------------------------------------------------------------------


def test_rows_that_are_read_in_parts_are_the_same_file(tmp_path: Path) -> None:
    sources = write_sources(tmp_path)
    alone, parts = (asked(tmp_path, name, sources=sources) for name in ("alone", "parts"))
    one, other = prepare(alone), prepare(parts, gathering=gather_in_parts)
    assert len(one) == 8 + 3 + 10 + 5
    assert prepared_files(tmp_path / "parts") == prepared_files(tmp_path / "alone")
    assert other.findings == one.findings
    assert one.findings.missing_captions.count == 1 and one.findings.passed_over.alone.count == 1


def test_parts_open_no_picture_that_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = asked(tmp_path, "p", sources=[*write_sources(tmp_path)[:1]])
    before = prepare(config)
    paint(tmp_path / "mine" / "0.png", 1, (48, 64))
    opened = []
    real = gathering.probe_size
    monkeypatch.setattr(gathering, "probe_size", lambda path, **how: opened.append(path) or real(path, **how))
    after, changes = prepare_again(config, gathering=gather_in_parts)
    assert opened == [tmp_path / "mine" / "0.png"] and str(changes) == "0 new, 1 changed, 0 gone"
    assert after.digest != before.digest


def damaged(folder: Path) -> None:
    (folder / "mine" / "sub" / "2.png").write_bytes(b"no picture")
    (folder / "mine" / "sub" / "4.png").write_bytes(b"")


def another_column(folder: Path) -> None:
    table = pa.table({"picture": [(folder / "cells" / "0.png").read_bytes()], "caption": ["x"]})
    pa.parquet.write_table(table, folder / "shards" / "1.parquet")


def no_tar(folder: Path) -> None:
    (folder / "shards" / "1.tar").write_bytes(b"no tar file" * 100)


def no_text(folder: Path) -> None:
    (folder / "mine" / "0.txt").write_bytes(b"\xff\xfe\xfd")


@pytest.mark.parametrize("change", [damaged, another_column, no_tar, no_text])
def test_what_is_wrong_is_told_in_the_same_words(tmp_path: Path, change: Any) -> None:
    sources = write_sources(tmp_path)
    change(tmp_path)
    said = []
    for name, how in (("alone", {}), ("parts", {"gathering": gather_in_parts})):
        with pytest.raises(DataError) as caught:
            prepare(asked(tmp_path, name, sources=sources), **how)
        said.append(str(caught.value))
        assert not list((tmp_path / name).glob("rows-*/*"))
    assert said[0] == said[1] and said[0]


def test_damaged_pictures_are_left_out_in_parts_too(tmp_path: Path) -> None:
    sources = write_sources(tmp_path)
    damaged(tmp_path)
    for name, how in (("alone", {}), ("parts", {"gathering": gather_in_parts})):
        config = asked(tmp_path, name, sources=sources, on_unreadable="skip")
        assert prepare(config, **how).findings.unreadable.count == 2
    assert prepared_files(tmp_path / "parts") == prepared_files(tmp_path / "alone")


# -- features -----------------------------------------------------------------------------------------


CACHED = ["data.cache.latents=true", "data.cache.text=true", "objective.train_text_encoders=false"]


def settings(run: Path, cache: Path) -> list[str]:
    sets = [*CACHED, "data.flip=0.5", f"data.cache.dir={cache}"]
    return [str(run), *(word for one in sets for word in ("--set", one))]


def test_features_are_those_that_a_training_encodes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path)
    (tmp_path / "pictures" / "3.txt").write_text("cat " * 30, encoding="utf-8")
    assert main(["cache", *settings(run, tmp_path / "cache")]) == 0
    capfd.readouterr()
    assert main(["prepare", *settings(run, tmp_path / "ahead"), "--features"]) == 0
    said = capfd.readouterr().err
    assert "up to 32 tokens, room for 12" in said and "1 of 8 captions are cut, for example: 'cat cat" in said
    wanted = entries(tmp_path / "cache")
    assert len(wanted) == 6 * 2 + 2 + 4 * 9  # two are held out; texts: those of pictures, and the empty one
    assert entries(tmp_path / "ahead") == wanted

    # Workers of Ray, without Ray: the same pictures are encoded together, whoever does it.
    arguments = settings(run, tmp_path / "parts")
    assert main(["prepare", *arguments]) == 0
    config = load_config(run, arguments[2::2])
    worker = on_ray.Encoder(os.getcwd(), pickle.loads(pickle.dumps(config)), 3)
    answers = [worker({"id": [number]})["answer"][0] for number in (2, 0, 1)]
    assert entries(tmp_path / "parts") == wanted
    fits = [fit for answer in answers for fit in json.loads(answer)["fits"]]
    assert sum(fit["cut"] for fit in fits if fit["encoder"] == "BERT") == 1
    shards = {path: path.stat() for path in (tmp_path / "parts").rglob("shard-*")}
    assert main(["cache", *arguments]) == 0
    assert {path: path.stat() for path in (tmp_path / "parts").rglob("shard-*")} == shards

    (tmp_path / "pictures" / "5.png").write_bytes(b"no picture")
    told = json.loads(worker({"id": [1]})["answer"][0])
    assert told["error"][0] == "DataError" and "5.png" in told["error"][1]


def test_what_does_not_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, cache = write_run(tmp_path), ["--set", f"data.cache.dir={tmp_path / 'cache'}"]
    assert main(["prepare", str(run), *cache, "--features"]) == 2
    assert capsys.readouterr().err.startswith("error: nothing to cache: ")
    assert main(["prepare", str(run), *cache, "--engine", "ray", "--workers", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: --workers needs --engine ray and --features")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["prepare", str(run), *cache, "--engine", "ray"]) == 2
    assert capsys.readouterr().err == "error: --engine ray needs Ray: pip install 'hydit[scale]'\n"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["prepare", str(run), *cache, "--engine", "ray"]) == 2
    assert "error: --engine ray needs no torchrun" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


# -- on a cluster -------------------------------------------------------------------------------------


ON_ONE_CLUSTER = """
import json, sys
from hydit_core.data import prepared
from hydit_core.generate.__main__ import main as generate
from hydit_core.ray_cluster import cluster
from hydit_core.train.__main__ import main as train
drawing, preparing = json.loads(sys.argv[1])
prepared._BATCH = 4  # as in this process
with cluster():
    raise SystemExit(generate(drawing) or train(preparing))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: hydit[scale]")
def test_on_a_cluster_of_this_machine_the_files_are_the_same(words: list[str], tmp_path: Path) -> None:  # noqa: F811
    """In a process of its own, which is all that Ray is started in."""
    run = write_run(tmp_path / "run")
    sources = ", ".join(f'{{ path = "{source["path"]}" }}' for source in write_sources(tmp_path))
    sets = [f"data.sources=[{sources}]", "data.resolution=32", "data.allow_missing_captions=true"]
    more = [word for one in sets for word in ("--set", one)]
    on_cluster, alone = ([*settings(run, tmp_path / name), *more, "--features"] for name in ("rays", "one"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    both = [
        [*words, "--out", "drawn-on-ray", "--engine", "ray"],
        ["prepare", *on_cluster, "--engine", "ray", "--workers", "2"],
    ]
    command = [sys.executable, "-c", ON_ONE_CLUSTER, json.dumps(both)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == [f"drawn-on-ray/00000{shard}.tar" for shard in range(3)]
    assert generate([*words, "--out", "alone"]) == 0
    assert contents("drawn-on-ray") == contents("alone")
    assert main(["prepare", *alone]) == 0
    assert prepared_files(tmp_path / "rays") == prepared_files(tmp_path / "one")
    assert entries(tmp_path / "rays") == entries(tmp_path / "one")
    assert "tokens, room for" in done.stderr
