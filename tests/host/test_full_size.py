"""Files of the published sizes in a real server: what loading them holds in memory at most."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from comfy_server import ComfyServer
from full_size_files import random_file
from graphs import Graph
from key_lists import key_list
from memory import STATUS, Peak
from text_models import grown_spiece, write_published

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not STATUS.exists(), reason="reads Linux's /proc"),
]


@pytest.fixture
def server() -> Iterator[ComfyServer]:
    """A fresh one for each: what the last model leaves in the C library's heap would count for the next."""
    running = ComfyServer(name="server-full-size")
    yield running
    running.close()


def load(server: ComfyServer, size: int, kind: str, **names: str) -> tuple[str, float]:
    """What a loader's node shows after a run, and the peak above the idle server over the files' size."""
    graph = Graph()
    graph.add("PreviewAny", source=graph.add(kind, weight_dtype="default", **names).out(0))
    with Peak(server.process.pid) as peak:
        result = server.run(graph, timeout=600).check()
    print(f"{names}: {size / 1e9:.2f} GB, peak {peak.grown / size:.2f} x")
    return result.outputs["1"]["hydit_version"][0], peak.grown / size


@pytest.mark.parametrize(("layout", "version"), [("g2_v12", "v1.2"), ("g2_v11", "v1.1 or v1.0")])
def test_a_dit(server, layout, version):
    """v1.2 has 1,499,952,032 values, v1.1 1,516,534,048: 3.0 GB."""
    path = random_file(server.models_dir / "diffusion_models" / f"{layout}.safetensors", key_list(layout))
    size = path.stat().st_size
    assert 2.99e9 < size < 3.04e9
    found, peak = load(server, size, "HyDiTDiTLoader", model_name=path.name)
    assert found == f"HunyuanDiT-g/2 {version}, fp16"
    assert peak <= 1.2


def test_split_text_encoders(server):
    """BERT, 0.7 GB, and mT5-XL, 3.3 GB, from two files."""
    folder = server.models_dir / "text_encoders"
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "bert.safetensors", folder / "mt5.safetensors"
    write_published(*files)
    (folder / "spiece.model").write_bytes(grown_spiece(250100))
    size = sum(file.stat().st_size for file in files)
    names = {"bert_name": files[0].name, "mt5_name": files[1].name}
    found, peak = load(server, size, "HyDiTTextEncoderLoader", **names)
    assert found == "BERT fp16, mT5 fp16"
    assert peak <= 1.2


@pytest.mark.parametrize(("layout", "version"), [("cn_v12", "v1.2"), ("cn_v11", "v1.1 or v1.0")])
def test_a_controlnet(server, layout, version):
    """v1.2 has 744,223,296 values, v1.1 760,805,312: 1.5 GB."""
    path = random_file(server.models_dir / "controlnet" / f"{layout}.safetensors", key_list(layout))
    size = path.stat().st_size
    assert 1.48e9 < size < 1.53e9
    found, peak = load(server, size, "HyDiTControlNetLoader", control_net_name=path.name)
    assert found == f"HunyuanDiT-g/2 {version} ControlNet, fp16"
    assert peak <= 1.2
