"""Sources that are URLs: rows and pixels as from a disk, in parts; and what goes wrong on the way."""

from __future__ import annotations

import io
import pickle
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hydit_core.data import remote
from hydit_core.data.config import DataConfig
from hydit_core.data.dataset import open_dataset
from hydit_core.data.remote import RemoteError, RemotePath, place
from hydit_core.data.streams import StreamOrder
from hydit_core.errors import ConfigError, DataError
from hydit_core.train.config import load_config

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")
pyarrow = pytest.importorskip("pyarrow")


def png(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 72, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures as a folder, a tar file, a table of paths and a Parquet file."""
    import pyarrow.parquet

    root = tmp_path_factory.mktemp("files") / "bucket"
    (root / "folder/more").mkdir(parents=True)
    for number in range(6):
        folder = root / ("folder/more" if number > 3 else "folder")
        (folder / f"{number}.png").write_bytes(png(number))
        (folder / f"{number}.txt").write_text(f"picture {number}")
    with tarfile.open(root / "six.tar", "w") as archive:
        for number in range(6):
            for name, content in ((f"{number}.png", png(number)), (f"{number}.txt", b"a tar")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    paths = [f"folder/{'more/' if number > 3 else ''}{number}.png" for number in range(6)]
    lines = [f'{{"image": "{path}", "caption": "a row", "width": 72, "height": 64}}\n' for path in paths]
    (root / "rows.jsonl").write_text("".join(lines))
    table = pyarrow.table({"image": [png(number) for number in range(6)], "caption": ["a cell"] * 6})
    pyarrow.parquet.write_table(table, root / "six.parquet", row_group_size=2)
    return root


class Server(ThreadingHTTPServer):
    """Gives out files in ranges; ``spoil`` may answer in another way: by (path, number of the request)."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[tuple[str, str, str]] = []
        self.spoil: Any = lambda path, number: None
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path, self.headers.get("Range", "")))
        spoiled = self.server.spoil(self.path, len(self.server.asked))
        path = self.server.root / self.path.partition("?")[0].lstrip("/")
        if isinstance(spoiled, int):
            return self.send_error(spoiled)
        if not path.is_file():
            return self.send_error(404)
        content, status = path.read_bytes(), 200
        size = len(content)
        if asked := self.headers.get("Range"):
            first, last = asked.removeprefix("bytes=").split("-")
            content, status = content[int(first) : int(last) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{size}"')
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(content) - 1}/{size}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if spoiled == "breaks" else content)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server(files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(remote, "_stats", {})
    serving = Server(files)
    thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield serving
    serving.shutdown()
    serving.server_close()


@pytest.fixture
def memory(files: Path) -> Iterator[str]:
    system = fsspec.filesystem("memory")
    for path in sorted(files.rglob("*")):
        if path.is_file():
            system.pipe(f"/bucket/{path.relative_to(files).as_posix()}", path.read_bytes())
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


def opened(path: object, **source: Any) -> Any:
    config = DataConfig.model_validate({"sources": [{"path": str(path), **source}], "resolution": 64})
    return open_dataset(config, seed=0, batch_size=2)


@pytest.mark.parametrize("name", ["folder", "six.tar", "rows.jsonl", "six.parquet", "s*.tar", "*.parquet"])
def test_the_same_rows_and_pixels_as_from_a_disk(name: str, files: Path, memory: str) -> None:
    """Of streams, which remote tar and Parquet files are, in the order of streams."""
    streamed = True if name.endswith(("tar", "parquet")) else None
    found, expected = opened(f"{memory}/{name}"), opened(files / name, stream=streamed)
    assert isinstance(found.order, StreamOrder) == bool(streamed)
    assert list(found.manifest.keys) == list(expected.manifest.keys)
    for one, other in zip(found.loader(0, 3), expected.loader(0, 3), strict=True):
        assert one.keys == other.keys and one.captions == other.captions
        assert torch.equal(one.pixels, other.pixels)


@pytest.mark.parametrize("name", ["six.tar", "rows.jsonl", "six.parquet"])
def test_over_http_in_parts_and_in_worker_processes(name: str, files: Path, server: Server) -> None:
    found, expected = opened(f"{server.url}/{name}", stream=False), opened(files / name)
    assert not isinstance(found.order, StreamOrder)
    for workers in (0, 2):
        batches = zip(found.loader(0, 2, workers=workers), expected.loader(0, 2), strict=True)
        assert all(torch.equal(one.pixels, other.pixels) for one, other in batches)
    if name != "rows.jsonl":  # whose size is told, and whose pictures are whole files
        assert all(asked for method, path, asked in server.asked if method == "GET" and path == f"/{name}")


def test_a_row_with_its_size_needs_no_picture_at_the_start(server: Server) -> None:
    opened(f"{server.url}/rows.jsonl")
    assert not [path for method, path, _ in server.asked if path.endswith(".png") and method == "GET"]


def test_what_passes_is_tried_again(server: Server) -> None:
    """A connection that breaks in the middle, and servers that are busy."""
    server.spoil = lambda path, number: {3: "breaks", 5: 503, 7: 429}.get(number)
    data = opened(f"{server.url}/six.tar")
    assert len(data.manifest) == 6 and data.batch(0).pixels is not None
    assert len(server.asked) > 7


@pytest.mark.parametrize(
    ("status", "told"), [(403, "403"), (404, "does not exist"), (410, "does not exist"), (500, "500")]
)
def test_what_does_not_pass_is_one_line_with_url_and_status(status: int, told: str, server: Server) -> None:
    server.spoil = lambda path, number: status
    with pytest.raises(DataError) as caught:
        opened(f"{server.url}/six.tar?signature=secret")
    text = str(caught.value)
    assert told in text and f"{server.url}/six.tar" in text and "\n" not in text
    assert len(server.asked) <= 12


def test_a_picture_that_is_gone_is_unreadable_and_may_be_skipped(server: Server) -> None:
    data = opened(f"{server.url}/rows.jsonl")
    server.spoil = lambda path, number: 404 if path.endswith(("0.png", "1.png")) else None
    with pytest.raises(DataError, match=r"[01]\.png"):
        list(data.loader(0, 3))
    config = data.config.model_copy(update={"on_unreadable": "skip"})
    keys = {key for batch in open_dataset(config, seed=0, batch_size=2).loader(0, 3) for key in batch.keys}
    assert len(keys) == 4


def test_a_server_that_knows_no_ranges_is_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts = Handler.do_GET

    def whole(self: Handler) -> None:
        del self.headers["Range"]
        in_parts(self)

    monkeypatch.setattr(Handler, "do_GET", whole)
    with pytest.raises(RemoteError, match="parts of a file"):
        place(f"{server.url}/six.tar").range(10, 20)  # type: ignore[attr-defined]


def test_another_version_is_another_stamp(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place(f"{memory}/six.tar")
    before = path.stat()
    fsspec.filesystem("memory").pipe("/bucket/six.tar", path.read_bytes())
    assert path.stat() == before  # for a minute
    monkeypatch.setattr(remote, "_stats", {})
    after = path.stat()
    assert after.st_size == before.st_size and after.st_mtime_ns != before.st_mtime_ns


def test_a_url_stays_one_as_a_path() -> None:
    path = place("s3://bucket/shards/0.tar")
    assert isinstance(path, RemotePath) and str(path.parent / "1.tar") == "s3://bucket/shards/1.tar"
    for same in (place("s3:/bucket/shards/0.tar"), place(str(path)), pickle.loads(pickle.dumps(path))):
        assert same == path and hash(same) == hash(path) and isinstance(same, RemotePath)
    assert path.shown == "s3://bucket/shards/0.tar"
    assert place("https://me:word@host/a.tar?key=1").shown == "https://host/a.tar"  # type: ignore[attr-defined]
    for local in ("C:/pictures", "C:\\pictures", "shards/0.tar", "/a:/b", "./s3:/x"):
        assert not isinstance(place(local), RemotePath)


def test_in_a_configuration_and_by_set(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    text = '[model]\ninit_from = "x"\n[data]\nsources = [{path = "s3://b/0.tar"}]\n'
    path.write_text(text + '[run]\nsteps = 1\nbatch_size = 1\noutput_dir = "run"\n')
    (source,) = load_config(path).data.sources
    assert isinstance(source.path, RemotePath) and str(source.path) == "s3://b/0.tar"
    (source,) = load_config(path, ["data.sources=[{path='gs://c/*.tar'}]"]).data.sources
    assert str(source.path) == "gs://c/*.tar"
    assert load_config(path).model_dump(mode="json")["data"]["sources"][0]["path"] == "s3://b/0.tar"


def test_what_is_not_installed_or_unknown_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="does not know nowhere://"):
        opened("nowhere://bucket/0.tar")
    monkeypatch.setattr(remote, "_systems", {})
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(ConfigError, match=r"s3fs.*\[remote\]"):
        opened("s3://bucket/0.tar")


def test_arrow_files_have_to_be_on_a_disk(memory: str) -> None:
    fsspec.filesystem("memory").pipe("/bucket/rows.arrow", b"ARROW1")
    with pytest.raises(DataError, match="mapped"):
        opened(f"{memory}/rows.arrow")
