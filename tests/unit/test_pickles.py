"""torch files are read by our own reader: what it reads is what torch reads, and it refuses what can hurt."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import fractions
import io
import os
import pathlib
import pickle
import time
import types
import uuid
import zipfile
from typing import Any

import numpy as np
import pytest
import torch

from hydit_core.errors import WeightsError
from hydit_core.weights.__main__ import main as weights
from hydit_core.weights.files import open_tensors

FORMATS = [pytest.param(new, protocol, id=f"{'zip' if new else 'pickles'}-{protocol}")
           for new in (True, False) for protocol in (2, 4)]  # fmt: skip


def shared() -> dict[str, torch.Tensor]:
    base = torch.arange(24.0).reshape(4, 6)
    return {"rows": base[1:3], "columns": base[:, 2:4], "turned": base.T, "whole": base, "again": base}


EVERY: dict[str, torch.Tensor] = {
    **{str(dtype): (torch.arange(6) % 2).to(dtype).reshape(2, 3) for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.uint16,
    )},
    "parameter": torch.nn.Parameter(torch.randn(3, 5)),
    "number": torch.tensor(4.5),
    "nothing": torch.empty(0, 7),
    "strided": torch.randn(8, 9)[::2, ::3],
    "image": torch.randn(1, 3, 4, 5).to(memory_format=torch.channels_last),
    **shared(),
}  # fmt: skip


@pytest.mark.parametrize("new, protocol", FORMATS)
def test_every_tensor_is_what_torch_reads(tmp_path, new, protocol):
    path = tmp_path / "w.pt"
    torch.save(EVERY, path, _use_new_zipfile_serialization=new, pickle_protocol=protocol)
    expected = torch.load(path, weights_only=True) if new and protocol == 2 else EVERY
    source = open_tensors(path)
    assert list(source) == list(EVERY)
    for name, value in expected.items():
        found = source[name]
        assert (
            (found.dtype, found.shape)
            == (value.dtype, value.shape)
            == (source.dtype(name), source.shape(name))
        )
        left, right = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found, value))
        assert torch.equal(left, right), name


BESIDE = {
    "numbers of numpy": np.float64(0.1),
    "whole numbers of numpy": [np.int64(3), np.bool_(True), np.uint8(1), np.float16(2)],
    "arrays": {"a": np.arange(5), "b": np.array(["x", "y"]), "c": np.zeros((2, 3), np.float32)},
    "dtypes": np.dtype("float32"),
    "paths": [pathlib.Path("/x"), pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("C:\\x")],
    "a command line": argparse.Namespace(lr=1e-4, out=pathlib.Path("/x"), size=[1024], when=None),
    "namespaces": types.SimpleNamespace(a=1),
    "sizes": torch.Size([3, 4]),
    "devices": torch.device("cpu"),
    "torch's dtypes": torch.bfloat16,
    "sets": [{1, 2}, frozenset({"a"}), set()],
    "dictionaries": [collections.OrderedDict(a=1), collections.defaultdict(list), collections.Counter("ab")],
    "deques": collections.deque([1, 2], maxlen=3),
    "dates": [datetime.datetime(2024, 5, 1, tzinfo=datetime.timezone.utc), datetime.date(2024, 5, 1),
              datetime.timedelta(1), datetime.time(1)],
    "exact numbers": [decimal.Decimal("0.1"), fractions.Fraction(1, 3), complex(1, 2), 2**63 - 1],
    "ids": uuid.UUID(int=5),
    "bytes": [b"abc", bytearray(b"abc"), range(5), slice(1, 2)],
    "random states": np.random.RandomState(0).get_state(),
}  # fmt: skip


@pytest.mark.parametrize("what", BESIDE)
@pytest.mark.parametrize("new, protocol", FORMATS)
def test_plain_things_beside_the_weights_do_not_matter(tmp_path, new, protocol, what):
    path = tmp_path / "w.pt"
    content = {"args": BESIDE[what], "module": collections.OrderedDict(w=torch.ones(2)), "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=new, pickle_protocol=protocol)
    assert torch.equal(open_tensors(path)["w"], torch.ones(2))


def test_a_windows_path_needs_no_windows(tmp_path):
    """Pickled on Windows, where its class can be made."""
    path = tmp_path / "w.pt"
    torch.save({"w": torch.ones(2), "out": pathlib.PureWindowsPath("C:\\x")}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content.replace(b"PureWindowsPath", b"WindowsPath"))
    assert torch.equal(open_tensors(path)["w"], torch.ones(2))


def test_a_whole_state_dict_with_its_attributes(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(net.state_dict(), tmp_path / "w.pt")
    assert list(open_tensors(tmp_path / "w.pt")) == list(net.state_dict())


class Runs:
    """Pickled as a call."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


class Own:
    pass


FOREIGN = {
    "system": (Runs(os.system, "touch ran"), "system"),
    "getattr": (Runs(getattr, "x", "y"), "builtins.getattr"),
    "eval": (Runs(eval, "1"), "builtins.eval"),
    "open": (Runs(open, "ran", "w"), "io.open"),
    "import": (Runs(__import__, "this"), "builtins.__import__"),
    "torch.load": (Runs(torch.load, "x"), "torch.serialization.load"),
    "a class": (Own(), "Own"),
    "a module": (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    "numpy's loader": (Runs(np.load, "x"), "numpy.load"),
    "in numpy's place": (Runs(np.frombuffer, b"x"), "numpy.frombuffer"),
}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("new, protocol", FORMATS)
def test_names_of_code_are_refused_by_name(tmp_path, monkeypatch, new, protocol, what):
    monkeypatch.chdir(tmp_path)
    bad, name = FOREIGN[what]
    content = {"w": torch.ones(1), "x": bad}
    torch.save(content, "w.pt", _use_new_zipfile_serialization=new, pickle_protocol=protocol)
    with pytest.raises(
        WeightsError, match=r"w\.pt holds objects that only running its code could restore"
    ) as error:
        open_tensors("w.pt")
    assert name in str(error.value)
    assert not (tmp_path / "ran").exists()


EXPANDED = torch.ones(1).expand(1000, 1000)
TENSORS = {
    "sparse": (torch.eye(3).to_sparse(), "a sparse tensor"),
    "compressed": (torch.eye(3).to_sparse_csr(), "a sparse tensor"),
    "meta": (torch.ones(3, device="meta"), "a tensor on the meta device"),
    "quantised": (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "a quantised tensor"),
    "expanded": (EXPANDED, "an expanded tensor: 1,000,000 values out of 1 that are stored"),
    "a little expanded": (torch.ones(4, 1).expand(4, 2), "an expanded tensor: 8 values out of 4"),
    "overlapping": (torch.ones(10).as_strided((5, 5), (1, 1)), "an expanded tensor: 25 values out of 9"),
    "conjugated": (torch.ones(3, dtype=torch.complex64).conj(), "conjugated"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", TENSORS)
@pytest.mark.parametrize("new, protocol", FORMATS)
def test_tensors_that_are_no_plain_numbers_are_refused_by_name(tmp_path, capsys, new, protocol, what):
    tensor, message = TENSORS[what]
    path = tmp_path / "w.pt"
    content = {"w": tensor, "x": torch.ones(2)}
    torch.save(content, path, _use_new_zipfile_serialization=new, pickle_protocol=protocol)
    assert weights(["inspect", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path} holds a")
    with pytest.raises(WeightsError, match=message):
        open_tensors(path)


def test_one_storage_under_many_names(tmp_path):
    base = torch.ones(5000)
    torch.save({f"w{i}": base for i in range(3)}, tmp_path / "tied.pt")
    assert len(open_tensors(tmp_path / "tied.pt")) == 3
    torch.save({f"w{i}": base for i in range(500)}, tmp_path / "bomb.pt")
    with pytest.raises(WeightsError, match="its tensors name 10,000,000 bytes"):
        open_tensors(tmp_path / "bomb.pt")


def archive(
    path: pathlib.Path, content: bytes, storages: dict[str, bytes] | None = None, **options: Any
) -> None:
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("w/data.pkl", content)
        for key, data in (storages or {}).items():
            file.writestr(f"w/data/{key}", data)


def tensor_pickle(size: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: Any = 0) -> bytes:
    """As torch writes {"w": tensor}, with any numbers."""

    class Writer(pickle._Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", size) if value == "STORAGE" else None

    class Made:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, ("STORAGE", offset, shape, stride, False, {})

    stream = io.BytesIO()
    Writer(stream, 2).dump({"w": Made()})
    return stream.getvalue()


BROKEN = {
    "beyond": (tensor_pickle(4, (5,), (1,)), {"0": bytes(16)}, "reaches beyond its storage"),
    "offset": (tensor_pickle(4, (2,), (1,), 3), {"0": bytes(16)}, "reaches beyond its storage"),
    "negative stride": (tensor_pickle(4, (2,), (-1,), 1), {"0": bytes(16)}, "shape, stride or offset"),
    "negative offset": (tensor_pickle(4, (2,), (1,), -1), {"0": bytes(16)}, "shape, stride or offset"),
    "fraction": (tensor_pickle(4, (2,), (1,), 0.0), {"0": bytes(16)}, "shape, stride or offset"),
    "truth": (tensor_pickle(4, (True,), (1,)), {"0": bytes(16)}, "shape, stride or offset"),
    "huge": (tensor_pickle(4, (1 << 62, 0), (1, 1)), {"0": bytes(16)}, "shape, stride or offset"),
    "small entry": (tensor_pickle(8, (2,), (1,)), {"0": bytes(16)}, "storage 0 is larger than its entry"),
    "no entry": (tensor_pickle(4, (2,), (1,)), {}, "cannot be read as a torch file"),
    "no dimensions": (tensor_pickle(4, (1,) * 50, (1,) * 50), {"0": bytes(16)}, "shape, stride or offset"),
    "untyped": (
        tensor_pickle(4, (2,), (1,)).replace(b"ctorch\nFloatStorage", b"ctorch\nUntypedStorage"),
        {"0": bytes(16)},
        "a tensor without a storage of its dtype",
    ),
    "a number for a storage": (
        b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n(K\x05K\x00K\x02\x85K\x01\x85\x89}tRs.",
        {},
        "a tensor without a storage of its dtype",
    ),
    "memo": (b"\x80\x02}r\xff\xff\xff\x7f.", {}, "a memo index beyond the pickle"),
    "long": (b"\x80\x02}\x8a\x20" + b"\x7f" * 32 + b"K\x01s.", {}, "a whole number of more than 64 bits"),
    "extension": (b"\x80\x02\x82\x01.", {}, "the instruction EXT1"),
    "instance": (b"(ios\nsystem\n.", {}, "the instruction INST"),
    "object": (b"\x80\x02(cos\nsystem\no.", {}, "the instruction OBJ"),
    "text": (b"\x80\x02P0\n.", {}, "the instruction PERSID"),
    "next buffer": (b"\x80\x05\x97.", {}, "the instruction NEXT_BUFFER"),
    "no end": (b"\x80\x02}", {}, "cannot be read as a torch file"),
    "empty stack": (b"\x80\x02R.", {}, "cannot be read as a torch file"),
    "empty": (b"", {}, "cannot be read as a torch file"),
    "a function's state": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor\n}X\x01\x00\x00\x00aK\x01sb.",
        {},
        "cannot be",
    ),
    "a class's state": (b"\x80\x02cargparse\nNamespace\n}X\x01\x00\x00\x00aK\x01sb.", {}, "cannot be read"),
    "a list": (b"\x80\x02].", {}, "holds a list; expected a dictionary of tensors"),
    "stack global": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", {}, r"could restore \(os\.system\)"),
    "itself": (b"\x80\x02}q\x00X\x05\x00\x00\x00modelq\x01h\x00s.", {}, "holds no tensors"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_and_hostile_pickles(tmp_path, what):
    content, storages, message = BROKEN[what]
    archive(tmp_path / "w.pt", content, storages)
    with pytest.raises(WeightsError, match=message) as error:
        open_tensors(tmp_path / "w.pt")
    assert str(error.value).startswith(str(tmp_path / "w.pt")) and len(str(error.value)) < 500


def test_dictionaries_of_dictionaries_take_no_time(tmp_path):
    inner: Any = {}
    for _ in range(4):
        inner = {str(i): inner for i in range(2000)}
    began = time.monotonic()
    torch.save(inner, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="holds no tensors"):
        open_tensors(tmp_path / "w.pt")
    assert time.monotonic() - began < 10  # 2000 to the power of 4 otherwise


def test_zip_files_that_torch_does_not_write(tmp_path):
    path = tmp_path / "w.pt"
    good = tensor_pickle(4, (4,), (1,))
    archive(path, good, {"0": bytes(16)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="compressed or encrypted entries"):
        open_tensors(path)
    with zipfile.ZipFile(path, "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("w/data.pkl", good)
        file.writestr("w/data.pkl", good)
    with pytest.raises(WeightsError, match="two entries of one name"):
        open_tensors(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("w/data.pkl", good)
        file.writestr("w/byteorder", "big")
        file.writestr("w/data/0", bytes(16))
    with pytest.raises(WeightsError, match="big-endian"):
        open_tensors(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(WeightsError, match="a TorchScript program"):
        open_tensors(path)


@pytest.mark.parametrize("new", [True, False])
def test_cut_and_flipped_files_are_one_error(tmp_path, new):
    path = tmp_path / "w.pt"
    torch.save({"module": EVERY}, path, _use_new_zipfile_serialization=new)
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for number in torch.randint(1, 1500, (40,), generator=generator).tolist():
        for spoiled in (
            content[:-number],
            content[:number] + bytes([content[number] ^ 0x41]) + content[number + 1 :],
        ):
            path.write_bytes(spoiled)
            try:
                source = open_tensors(path)
                for name in source:
                    source[name].sum() if source.dtype(name).is_floating_point and source[
                        name
                    ].itemsize > 1 else 0
            except WeightsError as error:
                assert str(path) in str(error)


ZERO = {
    "zero_pp_rank_0_mp_rank_00_model_states.pt": "share of a DeepSpeed ZeRO 3 checkpoint.*zero_to_fp32",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt": "optimizer shard of DeepSpeed.*mp_rank_00_model_states.pt",
    "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt": "optimizer shard of DeepSpeed",
}


@pytest.mark.parametrize("name", ZERO)
def test_shards_of_zero_are_named(tmp_path, name):
    for content in ({"module": {"w": torch.empty(0), "b": torch.empty(0)}}, {"epoch": 1}):
        torch.save(content, tmp_path / name)
        with pytest.raises(WeightsError, match=ZERO[name]):
            open_tensors(tmp_path / name)


def test_integers_for_weights_are_refused_when_a_model_loads(tmp_path, capsys):
    from tiny import TINY

    from hydit_core.model.dit import DiT

    state = {key: torch.zeros_like(value, dtype=torch.int64) for key, value in DiT(TINY).state_dict().items()}
    torch.save(state, tmp_path / "int.pt")
    arguments = [
        "convert",
        str(tmp_path / "int.pt"),
        "-o",
        str(tmp_path / "o.safetensors"),
        "--layout",
        "tencent",
    ]
    assert weights(arguments) == 2
    assert "without fractions: text_embedding_padding int64" in capsys.readouterr().err
