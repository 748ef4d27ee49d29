"""Quantised files in the graph: kept where ComfyUI computes with them, else unpacked; saved; refused."""

from __future__ import annotations

from pathlib import Path

import comfy.ops
import numpy as np
import pytest
import torch
from graphs import Graph, text_to_image
from quantised_files import int8_layer, metadata_of, note_tensor
from safetensors.torch import load_file, save_file

import hydit_core
from hydit_core.embedded import embedded_model
from hydit_core.weights.files import open_tensors
from hydit_core.weights.quantise import quantise

NEW = hasattr(comfy.ops, "mixed_precision_ops")
LAYER = "model.diffusion_model.blocks.1.mlp.fc1"


@pytest.fixture(scope="module")
def files(host):
    """The embedded model in each format, its text encoders too in one of them, and the older spelling."""
    folder = host.models_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for name, form, text in (
        ("int8", "int8", False),
        ("rot", "int8_convrot", True),
        ("fp8", "fp8_scaled", True),
    ):
        made[name] = folder / f"quantised-{name}.safetensors"
        quantise(embedded_model(), made[name], format=form, text_encoders=text)
    made["old"] = folder / "quantised-old.safetensors"
    _in_the_older_spelling(made["fp8"], made["old"])
    host.refresh()
    yield made
    for path in made.values():
        path.unlink()
    host.refresh()


def _in_the_older_spelling(source: Path, out: Path) -> None:
    """``scaled_fp8`` and ``scale_weight``."""
    tensors = {}
    for key, tensor in load_file(source).items():
        if not key.endswith(".comfy_quant"):
            tensors[key.replace(".weight_scale", ".scale_weight")] = tensor
    tensors["model.diffusion_model.scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(tensors, out, metadata_of(source))


def drawn(host, path: Path, **options) -> tuple[np.ndarray, str]:
    """The picture of three steps, 0..255, and what the loader's node shows."""
    ckpt = path.name if path != embedded_model() else "[embedded] hydit-icons-128"
    g = text_to_image(ckpt=ckpt, steps=3, cfg=3.0, save=False, **options)
    g.add("HyDiTTestCapture", _id="tap", value=["6", 0])
    result = host.run(g).check()
    return result.values["tap"][0].numpy() * 255, result.outputs["1"]["hydit_version"][0]


def off(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(((one - other) ** 2).mean()))


@pytest.fixture(scope="module")
def plain(host):
    return drawn(host, embedded_model())[0]


@pytest.mark.parametrize("name", ["int8", "rot", "fp8", "old"])
def test_pictures(host, files, plain, name):
    picture, said = drawn(host, files[name])
    form = {"int8": "int8", "rot": "int8_convrot"}.get(name, "fp8_scaled")
    assert said.endswith(form if NEW else f"{form} (unpacked)")
    assert 0.01 < off(picture, plain) < 8
    unpacked, said = drawn(host, files[name], loader={"weight_dtype": "fp32"})
    assert said.endswith("(unpacked)") and off(unpacked, plain) < 8


def loaded(host, path: Path, kind: int = 0):
    g = Graph()
    node = g.add("HyDiTCheckpointLoader", _defaults=True, ckpt_name=path.name)
    return host.values(g, node.out(kind))[0]


def test_what_is_kept(host, files):
    model = loaded(host, files["rot"]).model.diffusion_model
    clip = loaded(host, files["rot"], 1).cond_stage_model
    layers = (
        model.blocks[1].mlp.fc1,
        clip.hydit_clip.transformer.bert.encoder.layer[0].attention.self.query,
        clip.mt5xl.transformer.encoder.block[0].layer[0].SelfAttention.q,
    )
    for layer in layers:
        assert hasattr(layer.weight, "_qdata") == NEW
        if NEW:
            assert layer.weight._qdata.dtype == torch.int8
    assert not hasattr(model.final_layer.linear.weight, "_qdata")


@pytest.mark.skipif(not NEW, reason="this ComfyUI has no layers for it")
def test_the_same_numbers_as_headless(host, files):
    """One forward: ComfyUI's layers and ours, from the same file."""
    from hydit_core.weights.load import load_dit

    ours, _ = load_dit(files["rot"], dtype=torch.float32, keep_quantised=True)
    theirs, config = loaded(host, files["rot"]).model.diffusion_model, ours.config
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([700.0, 30.0])
    bert = torch.randn(2, config.text_len, config.text_dim, generator=generator)
    t5 = torch.randn(2, config.t5_len, config.t5_dim, generator=generator)
    masks = torch.ones(2, config.text_len).long(), torch.ones(2, config.t5_len).long()
    with torch.no_grad():
        found = theirs(x, t, bert, masks[0], t5, masks[1])
        expected = ours(x, t, ours.encode_context(bert, masks[0], t5, masks[1]))[:, :4]
    # Norms and embedders are in fp16 there, as in the file
    assert (found - expected).std() < 0.01 * expected.std()


def test_loras_work_on_them(host, files, tmp_path):
    generator = torch.Generator().manual_seed(2)
    shapes = {key: tensor.shape for key, tensor in load_file(embedded_model()).items()}
    name = "blocks.2.attn1.Wqkv"
    rows, columns = shapes[f"model.diffusion_model.{name}.weight"]
    lora = {
        f"base_model.model.{name}.lora_A.weight": torch.randn(4, columns, generator=generator),
        f"base_model.model.{name}.lora_B.weight": torch.randn(rows, 4, generator=generator) * 0.2,
    }
    folder = host.models_dir / "loras"
    folder.mkdir(exist_ok=True)
    save_file(lora, folder / "quantised-lora.safetensors")
    host.refresh()

    def with_lora(path: Path) -> np.ndarray:
        ckpt = path.name if path != embedded_model() else "[embedded] hydit-icons-128"
        g = text_to_image(ckpt=ckpt, steps=3, cfg=3.0, save=False)
        node = g.add(
            "HyDiTLoraLoader", _defaults=True, model=["1", 0], lora_name="quantised-lora.safetensors"
        )
        g.set("5", model=node.out(0))
        g.add("HyDiTTestCapture", _id="tap", value=["6", 0])
        return host.run(g).check().values["tap"][0].numpy() * 255

    changed, expected = with_lora(files["rot"]), with_lora(embedded_model())
    without = drawn(host, files["rot"])[0]
    assert off(changed, expected) < 0.5 * off(changed, without)


def test_saving_keeps_them(host, files):
    g = Graph()
    ckpt = g.add("HyDiTCheckpointLoader", _defaults=True, ckpt_name=files["rot"].name)
    node = g.add(
        "HyDiTModelSave",
        model=ckpt.out(0),
        clip=ckpt.out(1),
        vae=ckpt.out(2),
        filename_prefix="checkpoints/q",
    )
    name = host.run(g).check().outputs[node.id]["hydit_saved"][0]
    before, after = open_tensors(files["rot"]), open_tensors(host.output_dir / name)
    assert after.schemes() == (before.schemes() if NEW else {})
    for key in before.schemes():
        assert torch.allclose(after.get(key).float(), before.get(key).float(), atol=2e-3), key
    pipe = hydit_core.load(host.output_dir / name, device="cpu")
    assert pipe("a red apple", steps=1)


def test_controlnets(host, tmp_path):
    net = next((embedded_model().parent / "controlnet").glob("*.safetensors"))
    folder = host.models_dir / "controlnet"
    folder.mkdir(exist_ok=True)
    quantise(net, folder / "quantised-net.safetensors", format="int8_convrot")
    host.refresh()
    found = []
    for name in ("quantised-net.safetensors", f"[embedded] {net.stem}"):
        g = text_to_image(steps=2, cfg=3.0, save=False)
        control = g.add("HyDiTControlNetLoader", _defaults=True, control_net_name=name)
        picture = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(3))
        node = g.add(
            "HyDiTControlNetApply", _defaults=True, positive=["2", 0], negative=["3", 0],
            image=host.give(g, picture), control_net=control.out(0), vae=["1", 2],
        )  # fmt: skip
        g.set("5", positive=node.out(0), negative=node.out(1))
        g.add("HyDiTTestCapture", _id="tap", value=["6", 0])
        found.append(host.run(g).check().values["tap"][0].numpy() * 255)
    assert 0 < off(*found) < 8


def test_errors_are_one_line(host, files):
    tensors = load_file(files["int8"])
    _, note, _ = int8_layer(torch.randn(640, 160), group=16)
    path = host.models_dir / "checkpoints" / "quantised-bad.safetensors"
    cases = {
        "its scale": {f"{LAYER}.weight_scale": None},
        "expected a power of 4": {f"{LAYER}.comfy_quant": note_tensor({**note, "convrot_groupsize": 24})},
        "it is quantised (ComfyUI's nvfp4)": {f"{LAYER}.comfy_quant": note_tensor({"format": "nvfp4"})},
    }
    for words, changes in cases.items():
        bad = {key: tensor for key, tensor in {**tensors, **changes}.items() if tensor is not None}
        save_file(bad, path, metadata_of(files["int8"]))
        host.refresh()
        result = host.run(text_to_image(ckpt=path.name, steps=1))
        assert not result.ok and result.error is not None
        assert words in result.error.exception_message and "\n" not in result.error.exception_message.strip()
    path.unlink()
