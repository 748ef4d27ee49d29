"""Reading is lazy, safe and clear about what is wrong; writing is streamed and atomic."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import warnings
import weakref

import pytest
import safetensors.torch
import torch
from key_lists import key_list, sparse_safetensors

from hydit_core.errors import WeightsError
from hydit_core.new_files import atomic_path
from hydit_core.weights.bundle import open_model
from hydit_core.weights.files import open_tensors
from hydit_core.weights.source import MemorySource, TensorSource
from hydit_core.weights.writer import save_safetensors

EVERY_DTYPE = {
    "half": torch.randn(3, 5, dtype=torch.float16),
    "brain": torch.randn(7, dtype=torch.bfloat16),
    "single": torch.randn(2, 3, 4),
    "double": torch.randn(1, dtype=torch.float64),
    "eight": torch.randn(5, 3).to(torch.float8_e4m3fn),
    "eight_wide": torch.randn(3).to(torch.float8_e5m2),
    "bytes": torch.arange(11, dtype=torch.uint8),
    "long": torch.tensor(-5),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 4),
    "transposed": torch.randn(4, 6).T,
}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    right = right.contiguous()
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
    )


def leftovers(folder) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]


# --- safetensors -----------------------------------------------------------------------------------------


def test_what_we_write_the_official_library_reads(tmp_path):
    path = tmp_path / "new folder" / "file.safetensors"
    save_safetensors(path, EVERY_DTYPE, {"note": "苹果"})
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == EVERY_DTYPE.keys()
    assert all(same(loaded[key], value) for key, value in EVERY_DTYPE.items())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"note": "苹果"}


def test_what_the_official_library_writes_we_read(tmp_path):
    path = tmp_path / "file.safetensors"
    tensors = {key: value.contiguous() for key, value in EVERY_DTYPE.items()}
    safetensors.torch.save_file(tensors, path, metadata={"a": "b"})
    source = open_tensors(path)
    assert source.metadata == {"a": "b"}
    assert sorted(source) == sorted(tensors) and len(source) == len(tensors)
    for key, value in tensors.items():
        assert source.shape(key) == tuple(value.shape) and source.dtype(key) == value.dtype
        assert same(source[key], value), key


def test_unaligned_files_of_older_writers_are_read(tmp_path):
    value = torch.randn(5)
    for spaces in range(8):
        header = json.dumps({"x": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}).encode()
        header += b" " * spaces
        path = tmp_path / f"{spaces}.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + value.numpy().tobytes())
        assert torch.equal(open_tensors(path)["x"], value)


def test_reading_with_a_dtype_casts_floats_only(tmp_path):
    save_safetensors(tmp_path / "f.safetensors", EVERY_DTYPE)
    source = open_tensors(tmp_path / "f.safetensors")
    assert torch.equal(source.get("half", torch.float32), EVERY_DTYPE["half"].float())
    assert source.get("bytes", torch.float32).dtype == torch.uint8


def test_eight_bit_floats_clamp_instead_of_overflowing_to_nan():
    source = MemorySource({"x": torch.tensor([1.0, 1e6, -1e6])})
    eight = source.get("x", torch.float8_e4m3fn).float()
    assert eight.tolist() == [1.0, 448.0, -448.0]


def test_a_loaded_tensor_can_be_written_to_without_touching_the_file(tmp_path):
    path = tmp_path / "f.safetensors"
    save_safetensors(path, {"x": torch.ones(4)})
    before = path.read_bytes()
    open_tensors(path)["x"].zero_()
    assert path.read_bytes() == before
    assert open_tensors(path)["x"].sum() == 4


def test_opening_a_full_size_file_reads_its_header_only(tmp_path):
    shapes = key_list("g2_v12")
    path = sparse_safetensors(tmp_path / "big.safetensors", shapes)
    assert path.stat().st_size > 2_999_000_000
    start = time.process_time()
    source = open_tensors(path)
    assert source.shapes() == shapes
    assert time.process_time() - start < 2


class Counting(TensorSource):
    """Makes tensors when asked and counts how many are alive."""

    def __init__(self, count: int) -> None:
        self.path, self.metadata = "<made>", {}
        self.names = [f"t{i}" for i in range(count)]
        self.alive = self.most = 0

    def keys(self):
        return self.names

    def shape(self, key):
        return (1000,)

    def dtype(self, key):
        return torch.float32

    def get(self, key, dtype=None):
        tensor = torch.full((1000,), float(key[1:]))
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor, self.gone)
        return tensor

    def gone(self):
        self.alive -= 1


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    source = Counting(30)
    save_safetensors(tmp_path / "f.safetensors", source)
    gc.collect()
    assert source.alive == 0 and source.most <= 2
    assert open_tensors(tmp_path / "f.safetensors")["t29"][0] == 29


def test_equal_content_gives_equal_bytes(tmp_path):
    tensors = {f"k{i}": torch.full((i,), i, dtype=torch.float16) for i in range(1, 9)}
    save_safetensors(tmp_path / "a.safetensors", tensors, {"x": "y"})
    save_safetensors(tmp_path / "b.safetensors", dict(reversed(tensors.items())), {"x": "y"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


# --- atomic ----------------------------------------------------------------------------------------------


class Failing(Counting):
    def get(self, key, dtype=None):
        if key == "t20":
            raise RuntimeError("power cut")
        return super().get(key, dtype)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "f.safetensors"
    save_safetensors(path, {"x": torch.ones(3)})
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="power cut"):
        save_safetensors(path, Failing(30))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["f.safetensors"]


def test_the_old_content_is_whole_until_the_new_one_is(tmp_path):
    path = tmp_path / "f.txt"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == path.parent
    assert path.read_text() == "new" and not leftovers(tmp_path)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "out") as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("a")
        raise RuntimeError
    assert not os.listdir(tmp_path)
    with atomic_path(tmp_path / "out") as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("a")
    assert (tmp_path / "out" / "a").read_text() == "a" and not leftovers(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot open folders")
def test_every_folder_of_a_folder_reaches_the_disk_before_it_appears(tmp_path, monkeypatch):
    synced = set()
    monkeypatch.setattr(os, "fsync", lambda handle: synced.add(os.fstat(handle).st_ino))
    with atomic_path(tmp_path / "out") as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "a").write_text("a")
    places = (tmp_path, *(tmp_path / name for name in ("out", "out/inner", "out/inner/a")))
    assert synced == {place.stat().st_ino for place in places}


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match=r"cannot write .*file/x\.safetensors"):
        save_safetensors(tmp_path / "file" / "x.safetensors", {"x": torch.ones(1)})
    (tmp_path / "taken.safetensors").mkdir()
    with pytest.raises(WeightsError, match=r"cannot write .*taken\.safetensors"):
        save_safetensors(tmp_path / "taken.safetensors", {"x": torch.ones(1)})
    with pytest.raises(WeightsError, match=r"cannot write .*xxx: "):
        save_safetensors(tmp_path / ("x" * 300), {"x": torch.ones(1)})
    assert not leftovers(tmp_path)


def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path):
    """A limit on the size of files stands for the disk's."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "f.safetensors"
    save_safetensors(path, {"x": torch.ones(3)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(WeightsError, match=r"cannot write .*f\.safetensors: File too large"):
            save_safetensors(path, {"x": torch.ones(300_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ["f.safetensors"] and open_tensors(path)["x"].sum() == 3


def test_complete_content_is_kept_where_the_old_file_cannot_be_replaced(tmp_path, monkeypatch):
    path = tmp_path / "f.safetensors"
    save_safetensors(path, {"x": torch.zeros(1)})

    def refuse(source, target):
        raise PermissionError(13, "Access is denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(
        WeightsError, match=r"open in another program\?\); the new content is in (.*)$"
    ) as error:
        save_safetensors(path, {"x": torch.ones(1)})
    assert open_tensors(str(error.value).rpartition(" is in ")[2])["x"] == 1
    assert open_tensors(path)["x"] == 0


def test_temporary_names_cannot_be_guessed_and_are_short(tmp_path):
    names = set()
    for _ in range(2):
        with atomic_path(tmp_path / ("é" * 120)) as temporary:
            names.add(temporary.name)
            temporary.write_text("x")
    assert len(names) == 2 and (tmp_path / ("é" * 120)).read_text() == "x"
    assert all(len(name.rpartition("-")[2]) == 16 + len(".tmp") for name in names)


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    temporary = tmp_path / f".f.safetensors.{os.getpid()}-{'0' * 16}.tmp"
    temporary.symlink_to(victim)
    with pytest.raises(WeightsError, match="cannot write"):
        save_safetensors(tmp_path / "f.safetensors", {"x": torch.ones(1)})
    assert victim.read_text() == "precious" and not (tmp_path / "f.safetensors").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no way to ask for a process that harms none")
def test_what_a_killed_process_left_is_named(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f".big.safetensors.{dead.pid}-0123456789abcdef.tmp"
    others = [tmp_path / f".big.safetensors.{os.getpid()}-0123456789abcdef.tmp", tmp_path / ".x.tmp"]
    for path in (left, *others):
        path.write_text("half")
        os.utime(path, (time.time() - 3600,) * 2)
    with pytest.warns(UserWarning, match=rf"1 unfinished files of processes that died; .*{left.name}$"):
        save_safetensors(tmp_path / "f.safetensors", {"x": torch.ones(1)})
    assert left.exists()  # it is the user's to delete
    left.touch()  # perhaps a process of another machine
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_safetensors(tmp_path / "f.safetensors", {"x": torch.ones(1)})


@pytest.mark.skipif(os.name == "nt", reason="Windows ends processes without a signal")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_process_that_is_ended_removes_its_temporary_files(tmp_path, name):
    script = """
import sys, time
from hydit_core.errors import cli_main
from hydit_core.new_files import atomic_path
def run():
    with atomic_path(sys.argv[1]) as temporary:
        temporary.write_text("half")
        print("writing", flush=True)
        time.sleep(60)
sys.exit(cli_main(run))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "f")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "writing\n" and len(os.listdir(tmp_path)) == 1
    process.send_signal(getattr(signal, name))
    assert process.wait(30) == 128 + getattr(signal, name) and not os.listdir(tmp_path)
    process.stdout.close()


# --- damaged ---------------------------------------------------------------------------------------------

WEIGHTS = {"a.weight": torch.randn(3, 4), "b": torch.randn(2, dtype=torch.float16)}


def whole(tmp_path) -> bytes:
    save_safetensors(tmp_path / "whole.safetensors", WEIGHTS)
    return (tmp_path / "whole.safetensors").read_bytes()


def header_of(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


DAMAGED = {
    "truncated data": (lambda good: good[:-5], r"is truncated: .* ends at byte \d+, the file has \d+"),
    "truncated header": (lambda good: good[:40], r"is truncated: its header alone needs"),
    "damaged header": (lambda good: good[:20] + b"\xff\xff" + good[22:], "header is damaged"),
    "empty": (lambda good: b"", r"is empty \(0 bytes\)"),
    "page": (lambda good: b"<!DOCTYPE html><html>404</html>", "HTML"),
    "page with spaces": (lambda good: b"\n\n  <html>login</html>", "HTML"),
    "pointer": (
        lambda good: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "Git LFS pointer",
    ),
    "gguf": (lambda good: b"GGUF\x03\x00\x00\x00" + bytes(60), "GGUF"),
    "noise": (lambda good: bytes(range(200)), "not a weights file"),
    "short": (lambda good: b"abc", "not a weights file"),
    "overlap": (
        lambda good: (
            header_of(
                {
                    "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                    "y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
                }
            )
            + bytes(12)
        ),
        "x and y overlap",
    ),
    "nested": (lambda good: (200_004).to_bytes(8, "little") + b'{"x":' + b"[" * 199_999, "header is damaged"),
    "infinite": (
        lambda good: header_of({"x": {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 8]}}),
        r"header is damaged \(header: Infinity is not a number in JSON\)",
    ),
    "list of dtypes": (
        lambda good: header_of({"x": {"dtype": ["F32"], "shape": [0], "data_offsets": [0, 0]}}),
        "which is not supported",
    ),
    "sizes": (
        lambda good: header_of({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}) + bytes(8),
        "the header entry of x is damaged",
    ),
    "offsets": (
        lambda good: header_of({"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}) + bytes(8),
        "the header entry of x is damaged",
    ),
    "entry": (lambda good: header_of({"x": [1]}) + bytes(8), "the header entry of x is damaged"),
    "dtype": (
        lambda good: header_of({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}) + bytes(8),
        "x has dtype F4, which is not supported",
    ),
    "half a torch file": (None, "cannot be read as a torch file"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_named_with_the_file(tmp_path, what):
    spoil, message = DAMAGED[what]
    path = tmp_path / "model.safetensors"
    if spoil is None:
        torch.save({"x": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:2000])
    else:
        path.write_bytes(spoil(whole(tmp_path)))
    with pytest.raises(WeightsError, match=message) as error:
        open_tensors(path)
    assert str(path) in str(error.value)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(WeightsError, match=r"nothing\.safetensors does not exist"):
        open_tensors(tmp_path / "nothing.safetensors")
    (tmp_path / "readme.md").write_text("hello")
    with pytest.raises(WeightsError, match="holds no weights"):
        open_tensors(tmp_path)
    with pytest.raises(WeightsError, match="neither in itself nor in transformer"):
        open_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"index\.json is damaged"):
        open_tensors(tmp_path)
    torch.save({"epoch": 3}, tmp_path / "no_tensors.pt")
    with pytest.raises(WeightsError, match="holds no tensors"):
        open_tensors(tmp_path / "no_tensors.pt")


def test_what_a_file_says_of_itself_may_be_a_tensor(tmp_path):
    """ComfyUI's own save node writes tensors alone; metadata, where there is some, goes first."""
    path, said = tmp_path / "a.safetensors", '{"format": 1, "version": "v1.0"}'
    tensors = {
        "w": torch.ones(2),
        "hydit.config": torch.frombuffer(bytearray(said.encode()), dtype=torch.uint8),
    }
    safetensors.torch.save_file(tensors, path, {"prompt": "{}"})
    source = open_tensors(path)
    assert source.keys() == ["w"] and "hydit.config" not in source
    assert source.metadata == {"hydit.config": said, "prompt": "{}"}
    safetensors.torch.save_file(tensors, path, {"hydit.config": "other"})
    assert open_tensors(path).metadata == {"hydit.config": "other"}
    safetensors.torch.save_file({**tensors, "hydit.config": torch.ones(3)}, path)
    with pytest.raises(
        WeightsError, match=r"a\.safetensors: tensor hydit\.config is torch\.float32 \(3,\); expected"
    ):
        open_tensors(path)
