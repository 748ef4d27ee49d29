"""LoRAs in `generate`: drawn as the merged file, remembered by the picture, refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from adapters import whole_adapter
from PIL import Image
from workflow_files import backward, linked, overlaps

from hydit_core.generate import __main__ as generate
from hydit_core.lora import writing
from hydit_core.lora.merge import merge_files
from hydit_core.pictures.png import read_parameters


@pytest.fixture
def draw(tiny_model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def draw(*options: object, model: Path = tiny_model_file) -> tuple[int, str, Path]:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        base = ["--model", model, "--prompt", "cat", "--steps", "2", "--device", "cpu", "--out", out]
        code = generate.main([str(option) for option in (*base, *options)])
        return code, capsys.readouterr().err, out

    return draw


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_generate_with_a_lora(draw, tiny_model_file: Path, tmp_path: Path) -> None:
    adapter, file = whole_adapter(tiny_model_file), tmp_path / "style.safetensors"
    writing.write(adapter, file)
    code, said, path = draw("--lora", f"{file}:0.5", "--lora-block-weights", "decay(0.9)")
    assert code == 0 and f"LoRA style.safetensors: {len(adapter.modules)} of" in said
    assert "trigger words: icn" in said
    fact = {"lora": "style.safetensors", "strength": 0.5, "block_weights": "decay(0.9)"}
    assert read_parameters(path)["loras"] == [fact]
    # As the merged file draws it.
    merged = tmp_path / "merged.safetensors"
    merge_files(tiny_model_file, [(adapter, 0.5)], merged, block_weights="decay(0.9)")
    plain = draw()[2]
    assert (pixels(path) == pixels(draw(model=merged)[2])).all()
    assert (pixels(path) != pixels(plain)).any()
    assert (pixels(draw("--lora", f"{file}:0")[2]) == pixels(plain)).all()
    assert "loras" not in read_parameters(plain)
    # The graph in the picture has a node for each, MODEL and CLIP through both.
    two = draw("--lora", f"{file}:0.5", "--lora", f"{file}:-2")[2]
    prompt = json.loads(Image.open(two).text["prompt"])  # type: ignore[attr-defined]
    nodes = {n: node for n, node in prompt.items() if node["class_type"] == "HyDiTLoraLoader"}
    (first, one), (second, other) = nodes.items()
    assert one["inputs"]["strength_model"] == one["inputs"]["strength_clip"] == 0.5
    assert other["inputs"] == {
        "model": [first, 0], "clip": [first, 1], "lora_name": "style.safetensors",
        "strength_model": -2.0, "strength_clip": -2.0, "block_weights": "uniform(1)",
    }  # fmt: skip
    users = [
        node["inputs"]
        for node in prompt.values()
        if node["class_type"] in ("HyDiTTextEncode", "HyDiTKSampler")
    ]
    assert {tuple(u.get("clip") or u.get("model")) for u in users} == {(second, 0), (second, 1)}
    # And on ComfyUI's page: the same links, nothing covered.
    workflow = json.loads(Image.open(two).text["workflow"])  # type: ignore[attr-defined]
    for number, node in linked(workflow).items():
        given = prompt[number]["inputs"]
        assert node["inputs"] == {name: link for name, link in given.items() if isinstance(link, list)}
    assert overlaps(workflow) == [] == backward(workflow)


def test_generate_says_what_is_wrong_with_a_lora(draw, tiny_model_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    writing.write(whole_adapter(tiny_model_file), file)
    for options, message in (
        (["--lora-block-weights", "1"], "--lora-block-weights needs --lora"),
        (["--lora", f"{file}:11"], "strength 11: use -10 to 10"),
        (["--lora", f"{file}:nan"], "strength nan: use -10 to 10"),
        (["--lora", file, "--lora-block-weights", "1, 2"], "2 block weights for a model with 4 blocks"),
        (["--lora", tmp_path / "none.safetensors"], "none.safetensors does not exist"),
    ):
        code, said, path = draw(*options)
        assert code == 2 and message in said and not path.exists()
    odd = whole_adapter(tiny_model_file)
    patch = odd.modules["dit.blocks.0.attn1.Wqkv"]
    odd.modules |= {"dit.blocks.7.attn1.Wqkv": patch, "dit.other": patch}
    writing.write(odd, tmp_path / "odd.safetensors")
    code, said, path = draw("--lora", tmp_path / "odd.safetensors")
    assert code == 2 and "2 of its 6 modules for the DiT are not in" in said and not path.exists()
    assert draw("--lora", tmp_path / "odd.safetensors", "--partial")[0] == 0
