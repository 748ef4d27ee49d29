"""Merging LoRAs, against the arithmetic written out and against peft."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from adapters import whole_adapter
from key_lists import key_list
from safetensors.torch import load_file, save_file
from tiny import TINY, randomize

from hydit_core.errors import ConfigError, LoraError, WeightsError
from hydit_core.facts import ModelInfo
from hydit_core.lora import reading
from hydit_core.lora.adapter import Adapter
from hydit_core.lora.blocks import BlockWeights
from hydit_core.lora.kinds import BiasOnly
from hydit_core.lora.merge import apply, merge_files
from hydit_core.model.config import DiTConfig
from hydit_core.model.dit import DiT
from hydit_core.weights.bundle import bundle
from hydit_core.weights.convert import convert
from hydit_core.weights.save import save_checkpoint

TARGETS = ("attn1.Wqkv", "attn1.out_proj", "attn2.q_proj", "attn2.kv_proj", "attn2.out_proj")
pytestmark = pytest.mark.filterwarnings("ignore:.*far (below|above)")


def low_rank(shapes: dict[str, tuple[int, ...]], rank: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """PEFT's tensors for these modules."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (out, columns) in shapes.items():
        key = f"base_model.model.{module}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / 8
        tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=generator) / 8
    return tensors


def targets(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """What Tencent's training adapts: by the ends of names, so that the pooler's q_proj is among them."""
    ends = ("Wqkv", "q_proj", "kv_proj", "out_proj")
    return {
        key.removesuffix(".weight"): tuple(value.shape)
        for key, value in state.items()
        if key.endswith(tuple(f"{end}.weight" for end in ends))
    }


@pytest.fixture(scope="module")
def full_names(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint with all names of DiT-g/2 v1.2 and little in each, and a PEFT file of 402 tensors."""
    folder = tmp_path_factory.mktemp("forty")
    config = DiTConfig(**{**TINY.to_dict(), "depth": 40, "hidden_size": 16, "num_heads": 2, "mlp_hidden": 32})
    state = randomize(DiT(config), 1).state_dict()
    assert state.keys() == key_list("g2_v12").keys()
    save_checkpoint(folder / "base.safetensors", dit=state, info=ModelInfo.published("v1.2"))
    tensors = low_rank(targets(state))
    assert len(tensors) == 402
    save_file(tensors, folder / "lora.safetensors")
    return folder, state


def loop(state: dict[str, torch.Tensor], lora: dict[str, torch.Tensor], scale: float):
    """The merge as it is written on the project's page: 40 blocks, then the pooler."""
    merged = {key: value.clone() for key, value in state.items()}
    for module in [f"blocks.{i}.{name}" for i in range(40) for name in TARGETS] + ["pooler.q_proj"]:
        key = f"base_model.model.{module}"
        up, down = lora[f"{key}.lora_B.weight"], lora[f"{key}.lora_A.weight"]
        merged[f"{module}.weight"] = merged[f"{module}.weight"] + scale * up @ down
    return merged


@pytest.mark.parametrize("layout", ["tencent", "diffusers", "comfy"])
@pytest.mark.parametrize("base_layout", ["tencent", "diffusers", "comfy"])
def test_the_loop_over_blocks_and_pooler(full_names, tmp_path: Path, layout: str, base_layout: str) -> None:
    folder, state = full_names
    lora, base = folder / "lora.safetensors", folder / "base.safetensors"
    if base_layout != "tencent":
        base = tmp_path / ("base" if base_layout == "diffusers" else "base.safetensors")
        convert(folder / "base.safetensors", base, layout=base_layout)
    out = tmp_path / ("out" if layout == "diffusers" else "out.safetensors")
    done = merge_files(base, [(lora, 0.7)], out, layout=layout)
    assert len(done.matches[0].matched) == 201 and not done.matches[0].unmatched
    expected = loop(state, load_file(lora), 0.7)
    if layout == "diffusers":
        found = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
        for n, thirds in ((0, expected["blocks.0.attn1.Wqkv.weight"].chunk(3)), (39, None)):
            thirds = thirds or expected[f"blocks.{n}.attn1.Wqkv.weight"].chunk(3)
            for name, rows in zip("qkv", thirds, strict=True):
                torch.testing.assert_close(
                    found[f"blocks.{n}.attn1.to_{name}.weight"], rows, atol=1e-6, rtol=0
                )
    dit = bundle(out, only=("dit",)).dit
    assert dit is not None and set(dit.keys()) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(dit.get(key), value, atol=1e-6 * float(value.abs().max()), rtol=0)


def test_the_opposite_strength_restores(full_names, tmp_path: Path) -> None:
    folder, state = full_names
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    merge_files(folder / "base.safetensors", [(folder / "lora.safetensors", 1.3)], there)
    merge_files(there, [(folder / "lora.safetensors", -1.3)], back)
    changed, found = load_file(there), load_file(back)
    for key, value in state.items():
        limit = 1e-6 * float(value.abs().max())
        assert (found[key] - value).abs().max() <= limit, key
        assert ((changed[key] - value).abs().max() > 100 * limit) == (key[:-7] in targets(state)), key


@pytest.mark.parametrize("options", [{}, {"lora_alpha": 2}, {"use_rslora": True}, {"use_dora": True}])
def test_in_memory_as_peft(options: dict, tmp_path: Path) -> None:
    """alpha = rank, another alpha, rank-stabilized, DoRA; trained files, then merge_and_unload."""
    model = randomize(DiT(TINY), 1)
    base = copy.deepcopy(model)
    config = peft.LoraConfig(
        r=4, **{"lora_alpha": 4, **options}, target_modules=["Wqkv", "q_proj", "kv_proj", "out_proj"]
    )
    theirs = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
            elif "magnitude" in name:
                parameter.mul_(1 + torch.rand(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    merged = theirs.merge_and_unload().state_dict()
    match = apply(reading.read(tmp_path), base)
    assert len(match.matched) == 5 * TINY.depth + 1 and not match.unmatched
    for key, value in base.state_dict().items():
        torch.testing.assert_close(value, merged[key], atol=1e-6 * float(value.abs().max()), rtol=0)


def test_block_weights(full_names, tmp_path: Path) -> None:
    folder, state = full_names
    lora, weights = load_file(folder / "lora.safetensors"), [i / 39 for i in range(40)]
    base, out = folder / "base.safetensors", tmp_path / "out.safetensors"
    merge_files(base, [(folder / "lora.safetensors", 0.5)], out, block_weights=weights)
    found, full = load_file(out), loop(state, lora, 0.5)
    for i in range(40):
        key = f"blocks.{i}.attn2.kv_proj.weight"
        torch.testing.assert_close(found[key], torch.lerp(state[key], full[key], i / 39), atol=1e-6, rtol=0)
    key = "pooler.q_proj.weight"
    torch.testing.assert_close(found[key], full[key], atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match="3 block weights for a model with 40 blocks"):
        merge_files(base, [(folder / "lora.safetensors", 0.5)], out, block_weights="1, 2, 3", overwrite=True)
    each = [BlockWeights.parse(0), BlockWeights.parse("only-late")]
    merge_files(base, [(folder / "lora.safetensors", 0.5)] * 2, out, block_weights=each, overwrite=True)
    found = load_file(out)
    assert torch.equal(found["blocks.19.attn1.Wqkv.weight"], state["blocks.19.attn1.Wqkv.weight"])
    key = "blocks.20.attn1.Wqkv.weight"
    torch.testing.assert_close(found[key], full[key], atol=1e-6, rtol=0)


def test_several_are_rounded_once(full_names, tmp_path: Path) -> None:
    """In 16 bits, two LoRAs that undo each other leave every bit as it was."""
    folder, _ = full_names
    half, out = tmp_path / "half.safetensors", tmp_path / "out.safetensors"
    convert(folder / "base.safetensors", half, layout="tencent", dtype=torch.float16)
    lora = folder / "lora.safetensors"
    merge_files(half, [(lora, 1.0), (lora, -1.0)], out)
    before, after = load_file(half), load_file(out)
    assert all(torch.equal(before[key], value) for key, value in after.items())
    # Into a wider dtype, the change is not rounded to the base's first.
    merge_files(half, [(lora, 1.0)], out, dtype=torch.float32, overwrite=True)
    exact = loop({key: value.float() for key, value in before.items()}, load_file(lora), 1.0)
    assert all((exact[key] - value).abs().max() < 1e-6 for key, value in load_file(out).items())


def test_text_encoders_of_an_all_in_one_file(tiny_model_file: Path, tmp_path: Path) -> None:
    adapter, out = whole_adapter(tiny_model_file), tmp_path / "out.safetensors"
    assert adapter.parts() == {"dit", "bert", "t5"}
    done = merge_files(tiny_model_file, [(adapter, 0.5)], out)
    assert done.layout == "comfy" and not done.matches[0].unmatched
    before, after = load_file(tiny_model_file), load_file(out)
    assert before.keys() == after.keys()
    altered = {key for key in before if not torch.equal(before[key], after[key])}
    assert len(altered) == len(adapter.modules)
    bert, t5 = bundle(out).bert, bundle(out).mt5
    assert bert is not None and t5 is not None
    for part, source, prefix in (
        ("bert", bert, "text_encoders.hydit_clip.transformer.bert."),
        ("t5", t5, "text_encoders.mt5xl.transformer."),
    ):
        for module, (patch,) in adapter.part(part).items():
            expected = before[f"{prefix}{module}.weight"] + 0.5 * patch.delta()
            torch.testing.assert_close(source.get(f"{module}.weight"), expected, atol=1e-6, rtol=0)
    # The DiT alone has no text encoders: said, not silent.
    alone = merge_files(tiny_model_file, [(adapter, 0.5)], tmp_path / "dit.safetensors", layout="tencent")
    assert {name.partition(".")[0] for name in alone.matches[0].unmatched} == {"bert", "t5"}
    assert any("not bert." in note for note in alone.notes)


def test_the_file_says_what_went_in(full_names, tmp_path: Path) -> None:
    folder, state = full_names
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    lora = folder / "lora.safetensors"
    steps: list[tuple[int, int]] = []
    merge_files(folder / "base.safetensors", [(lora, 0.25)], one, progress=lambda *step: steps.append(step))
    named = Adapter(reading.read(lora).modules, "mine", metadata={"hydit.trigger": "icn"})
    done = merge_files(one, [(named, -1.0)], two, block_weights="decay(0.9)")
    merged = bundle(two, only=("dit",)).metadata
    first = {"lora": "lora", "strength": 0.25, "modules": 201}
    second = {"lora": "mine", "strength": -1.0, "modules": 201, "block_weights": "decay(0.9)"}
    assert json.loads(merged["hydit.merged"]) == [first, second]
    assert merged["modelspec.merged_from"] == "one.safetensors, mine"
    assert merged["modelspec.trigger_phrase"] == "icn"
    assert done.notes[0] == "mine: 201 of 201 modules"
    size = sum(value.nbytes for value in state.values())
    assert steps[-1] == (size, size) and len(steps) == len(state)


def test_errors_leave_everything_as_it_was(full_names, tmp_path: Path) -> None:
    folder, _ = full_names
    base, lora = folder / "base.safetensors", folder / "lora.safetensors"
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"older")
    half = tmp_path / "half.safetensors"
    convert(base, half, layout="tencent", dtype=torch.float16)
    with pytest.raises(LoraError, match=r"would reach from .* which fp16 does not hold"):
        merge_files(half, [(lora, 1e8)], out, overwrite=True)
    elsewhere = tmp_path / "elsewhere.safetensors"
    save_file({"lora_unet_blocks_77_mlp_fc1.lora_down.weight": torch.ones(1, 4),
               "lora_unet_blocks_77_mlp_fc1.lora_up.weight": torch.ones(4, 1)}, elsewhere)  # fmt: skip
    with pytest.raises(LoraError, match=r"has nothing for .*half\.safetensors"):
        merge_files(half, [(elsewhere, 1.0)], out, overwrite=True)
    with pytest.raises(WeightsError, match="is a HunyuanDiT LoRA"):
        merge_files(lora, [(lora, 1.0)], out, overwrite=True)
    wide = low_rank({"blocks.0.mlp.fc1": (8, 8)})
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(LoraError, match="other dimensions"):
        merge_files(half, [(tmp_path / "wide.safetensors", 1.0)], out, overwrite=True)
    assert out.read_bytes() == b"older"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    copied = tmp_path / "copied.safetensors"
    copied.write_bytes(lora.read_bytes())
    for target in (copied, half):
        with pytest.raises(WeightsError, match="is the input itself"):
            merge_files(half, [(copied, 1.0)], target, overwrite=True)

    model = randomize(DiT(TINY), 1).half()
    before = copy.deepcopy(model.state_dict())
    save_file(low_rank(targets(before)), tmp_path / "tiny.safetensors")
    with pytest.raises(LoraError, match="which fp16 does not hold"):
        apply(reading.read(tmp_path / "tiny.safetensors"), model, 1e8)
    with pytest.raises(ConfigError, match=r"strength 1e\+30 of "):
        apply(reading.read(tmp_path / "tiny.safetensors"), model, 1e30)
    with pytest.raises(ConfigError, match=r"strength 1e\+30 of .*tiny"):
        apply(reading.read(tmp_path / "tiny.safetensors"), model, 1e12, "1e18")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_biases(tmp_path: Path) -> None:
    model = randomize(DiT(TINY), 1)
    before = copy.deepcopy(model.state_dict())
    bias, part = torch.randn(TINY.mlp_hidden), torch.randn(TINY.hidden_size)
    patches = {
        "dit.blocks.0.mlp.fc1": [BiasOnly(bias=bias)],
        "dit.blocks.1.attn2.kv_proj": [BiasOnly(rows=(0, TINY.hidden_size), bias=part)],
    }
    apply(Adapter(patches), model, 0.5)
    after = model.state_dict()
    torch.testing.assert_close(after["blocks.0.mlp.fc1.bias"], before["blocks.0.mlp.fc1.bias"] + bias / 2)
    key = "blocks.1.attn2.kv_proj.bias"
    expected = before[key] + torch.cat([part / 2, torch.zeros_like(part)])
    torch.testing.assert_close(after[key], expected)
    assert sum(not torch.equal(before[key], value) for key, value in after.items()) == 2
    wrong = Adapter({"dit.blocks.0.mlp.fc1": [BiasOnly(bias=part)]})
    with pytest.raises(LoraError, match=r"numbers for dit\.blocks\.0\.mlp\.fc1\.bias, which has 128"):
        apply(wrong, model)


def test_a_lora_that_is_mostly_of_another_model(
    full_names, tiny_model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More than a tenth amiss is an error unless it is asked for; a tenth is not; encoders count if there."""
    folder, state = full_names
    names = list(targets(state))[:10]
    lora = low_rank({name: tuple(state[f"{name}.weight"].shape) for name in names})
    ninth = {key: value for key, value in lora.items() if names[0] not in key}
    odd = low_rank({"blocks.99.attn1.Wqkv": (48, 16)})
    text = low_rank({"query": (16, 16)})
    text = {
        key.replace("base_model.model", "lora_te1_encoder_layer_0_attention_self"): text[key] for key in text
    }
    text = {key.replace("self.query.", "self_query."): value for key, value in text.items()}
    base, out = folder / "base.safetensors", tmp_path / "out.safetensors"
    path = tmp_path / "lora.safetensors"
    for tensors, missing, code in (
        ({**lora, **text}, 0, 0),  # there are no encoders in the base
        ({**ninth, **odd}, 1, 0),
        ({**dict(list(ninth.items())[2:]), **odd}, 1, 2),
    ):
        save_file(tensors, path)
        count = len(tensors) // 2 - (2 if text.keys() <= tensors.keys() else 0) // 2
        assert lora_cli("merge", base, path, "-o", out, "--overwrite") == code
        said = capsys.readouterr()
        if code:
            assert (
                f"{missing} of its {count} modules for the DiT are not in {base}, such as dit.blocks.99"
                in said.err
            )
            assert "--partial" in said.err and said.err.count("\n") == 1
    with pytest.raises(LoraError, match="1 of its 9 modules"):
        apply(reading.read(path), randomize(DiT(TINY), 1))
    before = out.read_bytes()
    assert lora_cli("merge", base, path, "-o", out, "--overwrite", "--partial") == 0
    assert "8 of 9 modules, not dit.blocks.99.attn1.Wqkv" in capsys.readouterr().out
    assert out.read_bytes() != before
    # An encoder that is there counts by itself, however well the DiT fits.
    modules = dict(whole_adapter(tiny_model_file).modules)
    modules |= {
        "bert.encoder.layer.9.attention.self.query": modules["bert.encoder.layer.0.attention.self.query"]
    }
    with pytest.raises(LoraError, match="1 of its 2 modules for BERT are not in"):
        merge_files(tiny_model_file, [(Adapter(modules), 1.0)], tmp_path / "text.safetensors")
    merge_files(tiny_model_file, [(Adapter(modules), 1.0)], tmp_path / "text.safetensors", partial=True)


# -- the command lines ------------------------------------------------------------------------------------


def lora_cli(*arguments: object) -> int:
    from hydit_core.lora.__main__ import main

    return main([str(argument) for argument in arguments])


def test_merge_on_the_command_line(full_names, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, state = full_names
    lora, out = folder / "lora.safetensors", tmp_path / "out.safetensors"
    base = folder / "base.safetensors"
    options = ("-o", out, "--block-weights", "0.5", "--dtype", "bf16")
    assert lora_cli("merge", base, f"{lora}:0.5", lora, *options) == 0
    said = capsys.readouterr().out
    assert "lora: 201 of 201 modules" in said and "in layout tencent" in said
    found, expected = load_file(out), loop(state, load_file(lora), 0.75)
    key = "blocks.7.attn1.Wqkv.weight"
    assert found[key].dtype == torch.bfloat16
    torch.testing.assert_close(found[key], expected[key].bfloat16())
    assert lora_cli("merge", base, *[lora] * 3, "-o", out, *["--block-weights", "1"] * 2) == 2
    assert "given 2 times for 3 LoRAs" in capsys.readouterr().err
    assert lora_cli("merge", base, tmp_path / "none.safetensors", "-o", out, "--overwrite") == 2
    assert "none.safetensors does not exist" in capsys.readouterr().err


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A base in fp32, a LoRA for some of it, and the base's tensors."""
    folder = tmp_path_factory.mktemp("small")
    state = randomize(DiT(TINY), 1).state_dict()
    save_checkpoint(folder / "base.safetensors", dit=state, info=ModelInfo.published("v1.2"))
    save_file(
        low_rank({"blocks.0.mlp.fc1": (TINY.mlp_hidden, TINY.hidden_size)}), folder / "lora.safetensors"
    )
    return folder / "base.safetensors", folder / "lora.safetensors", state


@pytest.mark.parametrize(
    "key", ["blocks.0.mlp.fc1.weight", "blocks.3.mlp.fc2.weight", "blocks.0.mlp.fc1.bias"]
)
@pytest.mark.parametrize("layout", ["tencent", "comfy"])
def test_a_merge_into_fp16_makes_no_infinities(
    small, key: str, layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither in what the LoRA changes nor in the rest of the base."""
    _, lora, state = small
    large = {name: value.clone() for name, value in state.items()}
    large[key].view(-1)[5] = -70000.0
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_checkpoint(base, dit=large, info=ModelInfo.published("v1.2"))
    given = ("merge", base, lora, "-o", out, "--layout", layout, "--dtype")
    assert lora_cli(*given, "fp16") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and key in said and "fp16" in said
    assert not out.exists() and lora_cli(*given, "bf16") == 0


def test_checkpoints_with_scales_that_nothing_describes_are_refused_by_name(
    small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their numbers mean nothing without the scales beside them: nothing is merged, extracted, converted."""
    base, lora, state = small
    quantised, out = tmp_path / "fp8.safetensors", tmp_path / "out.safetensors"
    tensors = {}
    for key, value in state.items():
        tensors[key] = value
        if key.startswith("blocks.") and key.endswith(".weight") and value.dim() == 2:
            scale = value.abs().max() / 448
            tensors[key] = (value / scale).to(torch.float8_e4m3fn)
            tensors[f"{key}_scale"] = scale.reshape(())
    save_file(tensors, quantised)
    for command in (
        ["merge", quantised, lora, "-o", out],
        ["merge", quantised, lora, "-o", out, "--layout", "comfy", "--dtype", "fp16"],
        ["extract", quantised, base, "--rank", "2", "-o", out],
        ["extract", base, quantised, "--rank", "2", "-o", out],
        ["inspect", lora, "--base", quantised],
    ):
        assert lora_cli(*command) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: ") and "fp8.safetensors: it is quantised" in said
        assert not out.exists()
