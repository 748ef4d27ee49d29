"""Quantised weights in ComfyUI's formats: they are read as their scales say, kept, converted, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quantised_files import E5M2, FP8, fp8_layer, int8_layer, metadata_of, note_tensor, rewrite
from safetensors.torch import load_file, save_file
from tiny import write_tiny_model
from torch.nn.functional import linear

from hydit_core.errors import HyditError, WeightsError
from hydit_core.offload.copier import Copier
from hydit_core.offload.guests import Streamed
from hydit_core.text.loading import load_text_encoders
from hydit_core.weights import kitchen
from hydit_core.weights.__main__ import main as weights
from hydit_core.weights.bundle import bundle
from hydit_core.weights.convert import convert
from hydit_core.weights.files import open_tensors
from hydit_core.weights.frozen import FrozenLinear
from hydit_core.weights.load import load_dit
from hydit_core.weights.packed import INT8, Scheme, group_for, is_group, pack

DIT = "model.diffusion_model."
BERT = "text_encoders.hydit_clip.transformer.bert."
MT5 = "text_encoders.mt5xl.transformer."
FC1, QKV = f"{DIT}blocks.1.mlp.fc1", f"{DIT}blocks.0.attn1.Wqkv"
QUERY, WO = f"{BERT}encoder.layer.0.attention.self.query", f"{MT5}encoder.block.0.layer.1.DenseReluDense.wo"
LAYERS = (FC1, QKV, QUERY, WO)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("quantised") / "tiny.safetensors")


@pytest.fixture(scope="module")
def full(tiny) -> dict[str, torch.Tensor]:
    return load_file(tiny)


def _layers(full, spelling: str):
    if spelling == "scaled_fp8":
        return {name: fp8_layer(full[f"{name}.weight"], E5M2 if name == QKV else FP8) for name in LAYERS}
    return {
        FC1: int8_layer(full[f"{FC1}.weight"], group=16),
        QKV: int8_layer(full[f"{QKV}.weight"]),
        QUERY: fp8_layer(full[f"{QUERY}.weight"]),
        WO: int8_layer(full[f"{WO}.weight"], rows=False),
    }


@pytest.mark.parametrize("spelling", ["tensors", "metadata", "scaled_fp8"])
def test_every_spelling_is_read_as_its_scales_say(tiny, full, tmp_path, spelling):
    path = tmp_path / "q.safetensors"
    meaning = rewrite(tiny, path, _layers(full, spelling), spelling)
    source = open_tensors(path)
    assert set(source) == set(full)
    for key, weight in meaning.items():
        assert source.dtype(key) == torch.float32  # as its neighbours
        assert torch.allclose(source.get(key).double(), weight, rtol=0, atol=1e-6 * weight.abs().max())
    dit, _ = load_dit(path)
    text = load_text_encoders(path, text_len=12, t5_len=16)
    found = {
        FC1: dit.blocks[1].mlp.fc1,
        QKV: dit.blocks[0].attn1.Wqkv,
        QUERY: text.bert.encoder.layer[0].attention.self.query,
        WO: text.t5.encoder.block[0].layer[1].DenseReluDense.wo,
    }
    for name, module in found.items():
        assert torch.allclose(module.weight.double(), meaning[f"{name}.weight"], rtol=0, atol=1e-6)


def test_parts_in_files_of_their_own_are_read_too(tiny, full, tmp_path):
    for prefix, name in ((BERT, QUERY), (MT5, WO), (DIT, FC1)):
        alone = {key.removeprefix(prefix): value for key, value in full.items() if key.startswith(prefix)}
        save_file(alone, tmp_path / "part.safetensors", metadata_of(tiny))
        short = name.removeprefix(prefix)
        layers = {short: fp8_layer(alone[f"{short}.weight"])}
        meaning = rewrite(tmp_path / "part.safetensors", tmp_path / "q.safetensors", layers)
        opened = bundle(tmp_path / "q.safetensors")
        part = {BERT: opened.bert, MT5: opened.mt5, DIT: opened.dit}[prefix]
        assert part is not None
        assert torch.equal(part.get(f"{short}.weight").double(), meaning[f"{short}.weight"].float().double())


def test_what_is_packed_is_what_comfy_kitchen_packs():
    tensor = pytest.importorskip("comfy_kitchen.tensor")
    weight = torch.randn(24, 192, generator=torch.Generator().manual_seed(1))
    for group in (0, 64):
        ours = pack(weight, Scheme(INT8, rows=True, group=group))
        options = {"convrot": True, "convrot_groupsize": group} if group else {}
        options |= {"layout_cls": "TensorWiseINT8Layout", "per_channel": True}
        theirs = tensor.QuantizedTensor.from_float(weight, **options)
        assert torch.equal(ours.values, theirs._qdata) and torch.equal(ours.scale, theirs._params.scale)
        assert torch.equal(ours.dense(), theirs.dequantize())
    ours = pack(weight, Scheme("float8_e4m3fn"))
    theirs = tensor.QuantizedTensor.from_float(weight, "TensorCoreFP8Layout")
    assert torch.equal(ours.values.float(), theirs._qdata.float()) and ours.scale == theirs._params.scale


def test_groups_of_rotation():
    assert [n for n in range(2000) if is_group(n)] == [4, 16, 64, 256, 1024]
    assert [group_for(n) for n in (1408, 6144, 160, 4, 6, 1024)] == [64, 256, 16, 4, 0, 256]


@pytest.mark.parametrize("group", [0, 16])
def test_kept_weights_compute_what_they_mean(tiny, full, tmp_path, group):
    """Against float64: products in int8, rows of the input in 8 bits; gradients with the exact weight."""
    path = tmp_path / "q.safetensors"
    meaning = rewrite(tiny, path, {FC1: int8_layer(full[f"{FC1}.weight"], group=group)})[f"{FC1}.weight"]
    dit, _ = load_dit(path, keep_quantised=True)
    layer = dit.blocks[1].mlp.fc1
    assert isinstance(layer, FrozenLinear) and kitchen.is_quantised(layer.weight) and layer.in_8_bits
    assert layer.weight.dtype == torch.float32 and not layer.weight.requires_grad
    assert kitchen.packed_of(layer.weight).values.dtype == torch.int8
    x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        exact = linear(x.double(), meaning, layer.bias.double())
        found = layer(x)
    error = (found - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.02  # the input is rounded to 8 bits
    x.requires_grad_(True)
    out = layer(x)
    assert torch.allclose(out.double(), exact, atol=1e-5)  # not where a gradient is asked for
    out.square().sum().backward()
    expected = 2 * exact @ meaning
    assert torch.allclose(x.grad.double(), expected, atol=1e-4)


def test_kept_models_move_between_dtypes_and_draw_alike(tiny, full, tmp_path):
    path = tmp_path / "q.safetensors"
    keys = [key for key in full if key.startswith(f"{DIT}blocks.") and full[key].dim() == 2]
    rewrite(tiny, path, {key.removesuffix(".weight"): int8_layer(full[key], group=16) for key in keys})
    plain, kept = load_dit(path)[0], load_dit(path, keep_quantised=True)[0]
    config = plain.config
    generator = torch.Generator().manual_seed(3)
    x, t = torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([500.0])
    text = torch.randn(1, config.text_len, config.text_dim, generator=generator)
    t5 = torch.randn(1, config.t5_len, config.t5_dim, generator=generator)
    masks = torch.ones(1, config.text_len).long(), torch.ones(1, config.t5_len).long()

    def run(dit, dtype):
        with torch.no_grad():
            context = dit.encode_context(text.to(dtype), masks[0], t5.to(dtype), masks[1])
            return dit(x.to(dtype), t, context).float()

    exact = run(plain, torch.float32)
    assert (run(kept, torch.float32) - exact).norm() < 0.02 * exact.norm()
    size = sum(p.nbytes for p in kept.parameters())
    assert size < 0.5 * sum(p.nbytes for p in plain.parameters())
    kept.to(torch.bfloat16)
    assert (run(kept, torch.bfloat16) - exact).norm() < 0.04 * exact.norm()
    assert kitchen.packed_of(kept.blocks[0].mlp.fc1.weight).values.dtype == torch.int8


class Cloning(Copier):
    """A device of its own, as far as the CPU can be one."""

    def start(self, tensors):
        return [tensor.clone() for tensor in tensors], None


def test_kept_layers_visit_a_device(tiny, full, tmp_path):
    path = tmp_path / "q.safetensors"
    rewrite(
        tiny, path, {FC1: int8_layer(full[f"{FC1}.weight"], group=16), QKV: fp8_layer(full[f"{QKV}.weight"])}
    )
    dit = load_dit(path, keep_quantised=True)[0]
    layer, x = dit.blocks[1], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    config = dit.config
    text, t5 = torch.zeros(1, config.text_len, config.text_dim), torch.zeros(1, config.t5_len, config.t5_dim)
    masks = torch.ones(1, config.text_len).long(), torch.ones(1, config.t5_len).long()
    with torch.no_grad():
        context = dit.encode_context(text, masks[0], t5, masks[1])
        expected = dit(x, torch.tensor([500.0]), context)
        weight = layer.mlp.fc1.weight
        streamed = Streamed(dit, dit.blocks, Cloning(torch.device("cpu")))
        streamed.enter()
        found = dit(x, torch.tensor([500.0]), context)
        streamed.leave()
    # Not to the bit: on some CPUs a product depends on where in memory its matrices begin.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert layer.mlp.fc1.weight is weight


def test_without_comfy_kitchen_weights_are_unpacked_and_it_is_said(tiny, full, tmp_path, monkeypatch):
    path = tmp_path / "q.safetensors"
    rewrite(tiny, path, {FC1: int8_layer(full[f"{FC1}.weight"])})
    monkeypatch.setattr(kitchen, "is_available", lambda: False)
    with pytest.warns(UserWarning, match=r"1 quantised layers are unpacked.*hydit\[quant\]"):
        dit, _ = load_dit(path, keep_quantised=True)
    assert type(dit.blocks[1].mlp.fc1.weight.data) is torch.Tensor


def _broken(full):
    parts, note, _ = int8_layer(full[f"{FC1}.weight"], group=16)
    rows = len(parts["weight"])
    yield "no scale", {"weight": parts["weight"]}, note, f"its scale {FC1}.weight_scale is missing"
    yield "half of the scales", {**parts, "weight_scale": torch.ones(rows // 2)}, note, "or one for each row"
    yield "scales of columns", {**parts, "weight_scale": torch.ones(1, 64)}, note, "or one for each row"
    yield "whole scales", {**parts, "weight_scale": torch.ones(rows).long()}, note, "expected one number"
    yield "scales not finite", {**parts, "weight_scale": torch.full((rows,), torch.nan)}, note, "not fin"
    yield "not 8 bits", {**parts, "weight": full[f"{FC1}.weight"]}, note, "its weight is fp32; the format"
    yield "another dtype", parts, {"format": "float8_e4m3fn"}, "its weight is int8; the format float8"
    for group in (8, 24, 0, -4, "16", True, 1 << 61, None):
        yield f"group {group!r}", parts, {**note, "convrot_groupsize": group}, "expected a power of 4"
    yield "group too large", parts, {**note, "convrot_groupsize": 256}, "256 does not divide the columns"
    yield "a huge group", parts, {**note, "convrot_groupsize": 1 << 62}, "does not divide the columns"
    yield "group untold", parts, {"format": note["format"], "convrot": True}, "256 does not divide"
    for form in ("nvfp4", "mxfp8", "convrot_w4a4", "asym_w4a8_int8", "svdquant", None, 7, [1]):
        yield f"format {form}", parts, {"format": form}, f"it is quantised (ComfyUI's {form}): {FC1}"
    yield "a list", parts, [1], "holds a list; expected an object"


def test_broken_descriptions_are_one_line_of_error_at_every_door(tiny, full, tmp_path, capsys):
    path, out = tmp_path / "bad.safetensors", tmp_path / "out.safetensors"
    for what, parts, note, words in _broken(full):
        tensors = {**full, **{f"{FC1}.{suffix}": tensor for suffix, tensor in parts.items()}}
        save_file({**tensors, f"{FC1}.comfy_quant": note_tensor(note)}, path, metadata_of(tiny))
        for door in (load_dit, bundle, lambda place: convert(place, out, layout="comfy")):
            if what.endswith("finite") and door is bundle:
                continue  # which reads no tensor
            with pytest.raises(WeightsError) as error:
                door(path)
            said = str(error.value)
            assert said.startswith(str(path)) and words in said and "\n" not in said, (what, said)
        assert not out.exists()


def test_notes_of_strangers_are_bounded(tiny, full, tmp_path):
    parts, note, _ = int8_layer(full[f"{FC1}.weight"])
    tensors = {**full, **{f"{FC1}.{suffix}": tensor for suffix, tensor in parts.items()}}
    deep = b'{"format": "int8_tensorwise", "x": ' + b"[" * 500 + b"]" * 500 + b"}"
    cases = {
        "up to 100 levels": torch.tensor(list(deep), dtype=torch.uint8),
        "at most 10,000 bytes": torch.full((10_001,), 32, dtype=torch.uint8),
        "bytes of text": torch.ones(3),
        "not valid JSON": torch.tensor(list(b"{"), dtype=torch.uint8),
        "occurs twice": torch.tensor(list(b'{"format": 1, "format": 2}'), dtype=torch.uint8),
    }
    for words, tensor in cases.items():
        save_file({**tensors, f"{FC1}.comfy_quant": tensor}, tmp_path / "x.safetensors")
        with pytest.raises(WeightsError, match=words):
            open_tensors(tmp_path / "x.safetensors")
    for words, text in (
        ("expected an object for each", json.dumps({"layers": {FC1: 1}})),
        ("no layers", "{}"),
        ("not valid JSON", "{"),
        ("there is no nowhere.weight", json.dumps({"layers": {"nowhere": note}})),
    ):
        save_file(tensors, tmp_path / "x.safetensors", {"_quantization_metadata": text})
        with pytest.raises(WeightsError, match=words):
            open_tensors(tmp_path / "x.safetensors")


def test_convert_keeps_what_is_quantised_bit_for_bit(tiny, full, tmp_path, capsys):
    path = tmp_path / "q.safetensors"
    meaning = rewrite(tiny, path, _layers(full, "tensors"), "metadata")
    stored = load_file(path)
    done = convert(path, tmp_path / "comfy.safetensors", layout="comfy")
    assert any("still quantised: int8, int8_convrot" in note for note in done.notes)
    written = load_file(tmp_path / "comfy.safetensors")
    assert "_quantization_metadata" not in metadata_of(tmp_path / "comfy.safetensors")
    for key, tensor in stored.items():
        assert torch.equal(written[key].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), key
    assert set(written) == set(stored) | {f"{name}.comfy_quant" for name in LAYERS}
    convert(path, tmp_path / "alone.safetensors", layout="tencent", dtype=torch.float16)
    assert f"{FC1}.comfy_quant".removeprefix(DIT) not in load_file(tmp_path / "alone.safetensors")
    folder = convert(path, tmp_path / "folder", layout="diffusers")
    assert any("unpacked from int8, int8_convrot into fp32; diffusers" in note for note in folder.notes)
    again = bundle(tmp_path / "folder").dit
    assert again is not None and not again.schemes()
    key = f"{FC1}.weight"
    assert torch.allclose(again.get(key.removeprefix(DIT)).double(), meaning[key], atol=1e-6)


def test_inspect_tells_what_is_quantised(tiny, full, tmp_path, capsys):
    rewrite(tiny, tmp_path / "q.safetensors", _layers(full, "tensors"))
    assert weights(["inspect", str(tmp_path / "q.safetensors")]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("quantised"))
    assert all(part in line for part in ("2 in int8", "1 in int8_convrot", "1 in fp8_scaled"))
    assert "int8_convrot (8,192 values)" in out


def test_gguf_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(60))
    with pytest.raises(HyditError, match=r"GGUF file.*hydit_core\.weights quantize"):
        open_tensors(tmp_path / "x.gguf")
