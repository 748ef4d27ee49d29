"""Files that want to take the server down: each gives one line on its node, soon, and the next graph runs."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import Graph, text_to_image
from loader_files import EMBEDDED, stored
from safetensors.torch import save_file

SECONDS = 20  # of the whole graph, on a shared machine; a hang or a bomb takes minutes


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The embedded model with another header before the same data."""
    content = EMBEDDED.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def saying(text: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header["__metadata__"]["hydit.config"] = text

    return change


def says(**values: Any) -> Callable[[dict[str, Any]], None]:
    """Some values of what the file says of itself; sections are merged."""

    def change(header: dict[str, Any]) -> None:
        said = json.loads(header["__metadata__"]["hydit.config"])
        for name, value in values.items():
            said[name] = {**said.get(name, {}), **value} if isinstance(value, dict) else value
        header["__metadata__"]["hydit.config"] = json.dumps(said)

    return change


def _names(header: dict[str, Any], part: str) -> list[str]:
    return [name for name in header if part in name]


def shaped(part: str, shape: list[int]) -> Callable[[dict[str, Any]], None]:
    """The tensors whose names have ``part`` are empty ones of that shape."""

    def change(header: dict[str, Any]) -> None:
        for name in _names(header, part):
            begin = header[name]["data_offsets"][0]
            header[name].update(shape=shape, data_offsets=[begin, begin])

    return change


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        for name in _names(header, old):
            header[name.replace(old, new)] = header.pop(name)

    return change


CHECKPOINTS = {
    "meta_deep": saying("[" * 100_000),
    "meta_list": saying("[]"),
    "meta_digits": saying('{"format": ' + "1" * 5000 + "}"),
    "meta_pooler0": says(pooler_heads=0),
    "meta_bert_heads0": says(bert={"num_attention_heads": 0}),
    "meta_vae_groups0": says(vae={"norm_num_groups": 0}),
    "meta_vae_scale_str": says(vae={"scaling_factor": "much"}),
    "betas_0": says(diffusion={"beta_start": 0.0, "beta_end": 0.0}),
    "prediction_x": says(diffusion={"prediction": "banana"}),
    "default_steps_bool": says(defaults={"steps": True}),
    "train_steps_1e12": says(diffusion={"num_train_timesteps": 10**12}),
    "head_dim0": shaped("q_norm.weight", [0]),
    "huge_zero_shape": shaped("x_embedder.proj.weight", [10**9, 0]),
    "blocks_1e9": renamed(".blocks.1.", ".blocks.1000000001."),
    "escape": renamed("model.diffusion_model.blocks.0.", "\x1b]0;title\x07blocks.0."),
}


def told(host: Any, graph: Graph, node: str) -> str:
    """The one line on the node, which came soon."""
    begin = time.monotonic()
    result = host.run(graph)
    took = time.monotonic() - begin
    assert not result.ok and not result.interrupted and result.error.node_type == node
    message = result.error.exception_message
    assert ".hydit_core.errors." in result.error.exception_type, result.error
    assert message.isprintable() and len(message) < 3000, message
    assert took < SECONDS, f"{took:.0f} s"
    return message


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(host, name):
    path = host.model_path("checkpoints", f"{name}.safetensors")
    rewritten(path, CHECKPOINTS[name])
    host.refresh()
    try:
        g = Graph()
        g.add("PreviewAny", source=g.add("HyDiTCheckpointLoader", _defaults=True, ckpt_name=path.name))
        assert path.name in told(host, g, "HyDiTCheckpointLoader")
    finally:
        path.unlink()
        host.refresh()


def _torch_files(folder: Path) -> list[Path]:
    from safetensors.torch import load_file

    dit = {
        key.removeprefix("model.diffusion_model."): value
        for key, value in load_file(EMBEDDED).items()
        if key.startswith("model.diffusion_model.")
    }
    integers, expanded = folder / "integers.pt", folder / "expanded.pt"
    torch.save({key: value.to(torch.int8) for key, value in dit.items()}, integers)
    torch.save({key: torch.zeros(()).expand(value.shape) for key, value in dit.items()}, expanded)
    return [integers, expanded]


def test_torch_files(host, tmp_path):
    folder = host.model_path("diffusion_models", "x").parent
    paths = _torch_files(folder)
    host.refresh()
    try:
        for path in paths:
            g = Graph()
            g.add("PreviewAny", source=g.add("HyDiTDiTLoader", _defaults=True, model_name=path.name))
            assert path.name in told(host, g, "HyDiTDiTLoader")
    finally:
        for path in paths:
            path.unlink()
        host.refresh()


def _loras(folder: Path) -> list[str]:
    """What a LoRA loader must refuse, or take, in a moment; by the names in its list."""
    name = "diffusion_model.blocks.0.attn1.Wqkv"
    rows, columns = stored()["blocks.0.attn1.Wqkv.weight"].shape
    up, down = torch.ones(rows, 2), torch.ones(2, columns)
    files = {
        "lora_0d": {f"{name}.lora_{side}.weight": torch.tensor(1.0) for side in ("up", "down")},
        "lora_alpha_vec": {
            f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.ones(7)
        },
        "kron": {f"{name}.lokr_w1": torch.ones(3000, 3000), f"{name}.lokr_w2": torch.ones(3000, 3000)},
        "number": {
            "diffusion_model.blocks.1000000001.attn1.Wqkv.lora_up.weight": up,
            "diffusion_model.blocks.1000000001.attn1.Wqkv.lora_down.weight": down,
        },
    }  # fmt: skip
    for file, tensors in files.items():
        save_file(tensors, folder / f"{file}.safetensors")
    peft = {
        "base_model.model.blocks.0.attn1.Wqkv.lora_A.weight": down,
        "base_model.model.blocks.0.attn1.Wqkv.lora_B.weight": up,
    }
    configs = {
        "regex": '{"r": 2, "lora_alpha": 2, "alpha_pattern": {"(a+)+$": 3}}',
        "list": "[]",
        "deep": "[" * 10**5,
    }
    for file, config in configs.items():
        (folder / file).mkdir()
        save_file(peft, folder / file / "adapter_model.safetensors")
        (folder / file / "adapter_config.json").write_text(config)
    return [*(f"{file}.safetensors" for file in files), *(f"{file}/" for file in configs)]


def test_loras(host):
    folder = host.model_path("loras", "x").parent
    before = set(folder.iterdir())
    names = _loras(folder)
    host.refresh()
    try:
        for name in names:
            g = Graph()
            loaded = g.add("HyDiTCheckpointLoader", _defaults=True)
            g.add("PreviewAny", source=g.add("HyDiTLoraLoader", _defaults=True, model=loaded, lora_name=name))
            assert Path(name).stem in told(host, g, "HyDiTLoraLoader"), name
    finally:
        for path in set(folder.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        host.refresh()


@pytest.mark.parametrize("kind", ["config.json", "tokenizer.json"])
def test_folders_of_encoders(host, kind):
    """JSON of other forms beside good weights."""
    folder = host.model_path("text_encoders", "odd/x").parent
    shutil.copy(EMBEDDED, folder / "model.safetensors")
    (folder / kind).write_text("[]")
    host.refresh()
    try:
        g = Graph()
        g.add("PreviewAny", source=g.add("HyDiTTextEncoderLoader", _defaults=True, bert_name="odd/"))
        result = host.run(g)
        if not result.ok:  # a file that has all of it needs nothing beside it
            assert kind in told(host, g, "HyDiTTextEncoderLoader")
    finally:
        shutil.rmtree(folder)
        host.refresh()


def test_the_next_graph_runs(host):
    host.run(text_to_image(steps=1)).check()
