"""Writing quantised files: ``weights quantize``, and merging LoRAs into them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quantised_files import fp8_layer, int8_layer, metadata_of
from safetensors.torch import load_file, save_file
from tiny import write_tiny_model

from hydit_core.embedded import embedded_model
from hydit_core.lora.__main__ import main as lora_cli
from hydit_core.lora.merge import apply
from hydit_core.lora.reading import read
from hydit_core.text.loading import load_text_encoders
from hydit_core.weights import kitchen
from hydit_core.weights.__main__ import main as weights
from hydit_core.weights.bundle import bundle
from hydit_core.weights.files import open_tensors
from hydit_core.weights.load import load_controlnet, load_dit
from hydit_core.weights.packed import pack, rotated
from hydit_core.weights.quantise import scheme_for

DIT = "model.diffusion_model."
TEXT = "text_encoders."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("quantise") / "tiny.safetensors")


def quantize(*given: object) -> int:
    return weights(["quantize", *map(str, given)])


def _said(form: str, weight: torch.Tensor) -> dict[str, object]:
    """The layer's note, which the host's code reads."""
    if form == "fp8_scaled":  # without this, 0.33 clips the inputs of products at 448
        return {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    group = next(g for g in (256, 64, 16, 4, 1) if weight.shape[1] % g == 0)
    turned = {"convrot": True, "convrot_groupsize": group} if form == "int8_convrot" and group > 1 else {}
    return {"format": "int8_tensorwise", **turned}


def _expected(form: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    group = next(g for g in (256, 64, 16, 4, 1) if weight.shape[1] % g == 0)
    group = group if form == "int8_convrot" else 0
    return fp8_layer(weight)[0] if form == "fp8_scaled" else int8_layer(weight, group=group)[0]


@pytest.mark.parametrize("form", ["int8", "int8_convrot", "fp8_scaled"])
def test_what_is_written(tiny, tmp_path, capsys, form):
    """Every matrix inside the blocks, to the nearest step; everything else bit for bit."""
    out = tmp_path / "q.safetensors"
    assert quantize(tiny, "-o", out, "--format", form) == 0
    before, after = load_file(tiny), load_file(out)
    blocks = [key for key in before if key.startswith(f"{DIT}blocks.") and before[key].dim() == 2]
    assert len(blocks) == 4 * 8 + 1  # and a skip
    assert f"layers: {len(blocks)} of the network" in capsys.readouterr().out
    for key, tensor in before.items():
        if key not in blocks:
            assert torch.equal(after[key], tensor), key
            continue
        expected = _expected(form, tensor)
        note = bytes(after[f"{key.removesuffix('weight')}comfy_quant"].tolist())
        assert json.loads(note) == _said(form, tensor)
        scale = after[f"{key}_scale"]
        assert torch.allclose(scale, expected["weight_scale"], rtol=1e-5)
        steps = (after[key].float() - expected["weight"].float()).abs()
        assert (steps > 0).float().mean() < 1e-3  # float32 and float64 round a few differently
    assert set(after) == set(before) | {
        f"{key.removesuffix('weight')}{end}" for key in blocks for end in ("weight_scale", "comfy_quant")
    }
    assert out.stat().st_size < tiny.stat().st_size


def test_reading_gives_back_what_was_written(tiny, tmp_path):
    """Quantised again in the same format, by either command, nothing changes."""
    first, second, third = (tmp_path / f"{name}.safetensors" for name in "abc")
    assert quantize(tiny, "-o", first, "--format", "int8_convrot", "--text-encoders") == 0
    assert quantize(first, "-o", second, "--format", "int8_convrot") == 0
    assert weights(["convert", str(first), "-o", str(third), "--layout", "comfy"]) == 0
    tensors = [load_file(path) for path in (first, second, third)]
    for key, tensor in tensors[0].items():
        assert all(torch.equal(other[key], tensor) for other in tensors[1:]), key
    assert metadata_of(first)["hydit.config"] == metadata_of(tiny)["hydit.config"]


def test_text_encoders_only_when_asked_and_controlnets(tiny, tmp_path, capsys):
    out = tmp_path / "q.safetensors"
    assert quantize(tiny, "-o", out, "--format", "int8", "--text-encoders") == 0
    said = capsys.readouterr().out
    assert "of BERT" in said and "of mT5" in said and "own loaders do not read text encoders" in said
    before, after = load_file(tiny), load_file(out)
    packed = {key for key, tensor in after.items() if tensor.dtype == torch.int8 and key.startswith(TEXT)}
    assert packed and all("encoder.layer." in key or "encoder.block." in key for key in packed)
    assert not any("relative_attention_bias" in key or "embeddings" in key for key in packed)
    text, exact = (load_text_encoders(path, text_len=12, t5_len=16) for path in (out, tiny))
    for part in ("bert", "t5"):
        found, true = (getattr(one.encode("a red apple"), part) for one in (text, exact))
        assert (found - true).norm() < 0.02 * true.norm()
    for prefix in ("text_encoders.hydit_clip.transformer.bert.", "text_encoders.mt5xl.transformer."):
        alone = {key.removeprefix(prefix): value for key, value in before.items() if key.startswith(prefix)}
        save_file(alone, tmp_path / "part.safetensors", {"hydit.config": metadata_of(tiny)["hydit.config"]})
        assert (
            quantize(
                tmp_path / "part.safetensors", "-o", tmp_path / "p.safetensors", "--format", "fp8_scaled"
            )
            == 0
        )
        assert bundle(tmp_path / "p.safetensors").source.schemes()
        (tmp_path / "p.safetensors").unlink()
    net = next((embedded_model().parent / "controlnet").glob("*.safetensors"))
    assert quantize(net, "-o", tmp_path / "net.safetensors", "--format", "int8_convrot") == 0
    assert "own loaders do not read ControlNets" in capsys.readouterr().out
    kept, _ = load_controlnet(tmp_path / "net.safetensors", keep_quantised=True)
    assert kitchen.is_quantised(kept.blocks[0].mlp.fc1.weight)


def test_layers_that_are_kept(tiny, tmp_path, capsys):
    out = tmp_path / "q.safetensors"
    assert (
        quantize(tiny, "-o", out, "--format", "int8", "--keep", "mlp.fc2", "dit.blocks.0.*", "--keep", "Wqkv")
        == 0
    )
    for key in load_file(out):
        if key.endswith(".comfy_quant"):
            assert "mlp.fc2" not in key and "Wqkv" not in key and "blocks.0." not in key
    for given, words in (
        (("--keep", "fc9"), "--keep fc9: no layer of"),
        (("--keep", "*"), "no layer is left to quantise"),
        (("--keep", "c2"), "--keep c2: no layer of"),  # not a whole word
    ):
        assert quantize(tiny, "-o", tmp_path / "no.safetensors", "--format", "int8", *given) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "no.safetensors").exists()


def test_errors(tiny, tmp_path, capsys):
    bad = load_file(tiny)
    bad[f"{DIT}blocks.1.mlp.fc1.weight"][3, 3] = torch.inf
    save_file(bad, tmp_path / "inf.safetensors", metadata_of(tiny))
    save_file({"w": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    (tmp_path / "there.safetensors").write_bytes(b"x")
    for given, words in (
        (
            (tmp_path / "inf.safetensors", "-o", tmp_path / "o.safetensors"),
            "blocks.1.mlp.fc1.weight has values that",
        ),
        ((tmp_path / "other.safetensors", "-o", tmp_path / "o.safetensors"), "expected"),
        ((tiny, "-o", tmp_path / "there.safetensors"), "exists"),
        ((tiny, "-o", tiny, "--overwrite"), "is the input itself"),
        ((tiny, "-o", tmp_path / "o.pt"), "one .safetensors file"),
        ((tiny,), "no output"),
    ):
        assert quantize(*given, "--format", "int8") == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and said[0].startswith("error: ") and words in said[0], said
    assert not (tmp_path / "o.safetensors").exists()


def _lora(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer, rows, columns in (("attn1.Wqkv", 192, 64), ("mlp.fc1", 128, 64)):
        for block in range(4):
            name = f"base_model.model.blocks.{block}.{layer}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.1
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    save_file(tensors, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


@pytest.mark.parametrize("form", ["int8", "int8_convrot", "fp8_scaled"])
def test_merging_into_quantised_weights_is_merging_before_quantising(tiny, tmp_path, capsys, form):
    """Within a step of the quantiser: half a step from each of the two roundings."""
    lora, small, merged, before = _lora(tmp_path), *(tmp_path / f"{n}.safetensors" for n in ("q", "m", "b"))
    assert quantize(tiny, "-o", small, "--format", form) == 0
    assert lora_cli(["merge", str(small), str(lora), "-o", str(merged)]) == 0
    assert f"quantised again ({form}): 8 layers" in capsys.readouterr().out
    assert lora_cli(["merge", str(tiny), str(lora), "-o", str(before)]) == 0
    found, exact, old = open_tensors(merged), open_tensors(before), open_tensors(small)
    raw, raw_old = load_file(merged), load_file(small)
    for key, scheme in found.schemes().items():
        assert scheme == scheme_for(form, found.shape(key))
        if torch.equal(exact.get(key), open_tensors(tiny).get(key)):
            assert torch.equal(raw[key].float(), raw_old[key].float())  # not touched
            continue
        moved = (found.get(key) - old.get(key)).norm()
        off = (found.get(key) - exact.get(key)).norm()
        assert off < 0.25 * moved, key
        if form != "fp8_scaled":  # before the rotation back
            one, two = found.packed(key), pack(exact.get(key), scheme)
            values, others = (packed.values * packed.scale for packed in (one, two))
            true = rotated(exact.get(key).float(), scheme.group) if scheme.group else exact.get(key)
            step = torch.maximum(one.scale, old.packed(key).scale)
            assert ((values - true).abs() <= 1.001 * step).all(), key
            # Rounded once more, the other way; a row whose largest value moved has another step.
            apart = (values - others).abs() / torch.maximum(step, two.scale)
            assert apart.max() < 1.5 and (apart < 1.01).float().mean() > 0.95, key
    # A model in memory takes the same way.
    dit, _ = load_dit(small, keep_quantised=True)
    match = apply(read(lora), dit)
    assert len(match.matched) == 8
    for key in ("blocks.0.attn1.Wqkv", "blocks.3.mlp.fc1"):
        weight = dit.get_submodule(key).weight
        assert kitchen.is_quantised(weight)
        packed = kitchen.packed_of(weight)
        assert torch.equal(packed.values.float(), raw[f"{DIT}{key}.weight"].float())
        assert torch.equal(packed.scale, raw[f"{DIT}{key}.weight_scale"])


def test_a_merge_into_another_dtype_unpacks(tiny, tmp_path, capsys):
    lora, small, merged = _lora(tmp_path), tmp_path / "q.safetensors", tmp_path / "m.safetensors"
    assert quantize(tiny, "-o", small, "--format", "int8") == 0
    assert lora_cli(["merge", str(small), str(lora), "-o", str(merged), "--dtype", "fp16"]) == 0
    assert "quantised again" not in capsys.readouterr().out
    tensors = load_file(merged)
    assert not any(key.endswith("comfy_quant") for key in tensors)
    assert tensors[f"{DIT}blocks.0.mlp.fc1.weight"].dtype == torch.float16
