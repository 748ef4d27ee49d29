"""Folders that peft itself writes, read here and applied as peft applies them; and those of strangers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY, randomize
from torch import Tensor, nn

from hydit_core.errors import LoraError
from hydit_core.lora.adapter import changed
from hydit_core.lora.extract import combine
from hydit_core.lora.merge import apply
from hydit_core.lora.reading import from_tensors, read
from hydit_core.lora.summary import describe
from hydit_core.lora.writing import FORMATS, to_tensors, write
from hydit_core.model.config import DIT_G2_V11, DiTConfig
from hydit_core.model.dit import DiT

ATTENTION = ["Wqkv", "q_proj", "kv_proj", "out_proj"]
pytestmark = pytest.mark.filterwarnings("ignore")


def trained(config: Any, model: nn.Module, folder: Path, **options: Any) -> dict[str, Tensor]:
    """Random values in every tensor that peft adds, written by peft; what it merges them to."""
    theirs = peft.get_peft_model(model, config, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + torch.rand(parameter.shape, generator=generator))
            elif any(word in name for word in ("lora_", "hada_", "lokr_")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return theirs


def merged(theirs: Any) -> dict[str, Tensor]:
    return theirs.merge_and_unload().state_dict()


def same(path: Path, base: DiT, expected: dict[str, Tensor]) -> None:
    before = copy.deepcopy(base.state_dict())
    match = apply(read(path), base)
    assert not match.unmatched
    for key, value in base.state_dict().items():
        torch.testing.assert_close(value, expected[key], atol=2e-6 * float(value.abs().max()), rtol=0)
    assert any(not torch.equal(before[key], value) for key, value in base.state_dict().items())


CONFIGS: dict[str, Any] = {
    "plain": lambda: peft.LoraConfig(r=4, lora_alpha=2, target_modules=ATTENTION),
    "all linear layers": lambda: peft.LoraConfig(
        r=2, target_modules=[*ATTENTION, "fc1", "fc2", "skip_linear", "linear"]
    ),
    "a pattern of targets": lambda: peft.LoraConfig(r=2, target_modules=r".*\.attn[12]\.(Wqkv|out_proj)"),
    "rank-stabilized": lambda: peft.LoraConfig(r=4, lora_alpha=2, target_modules=ATTENTION, use_rslora=True),
    "patterns": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=ATTENTION,
        rank_pattern={"attn1.Wqkv": 2, "blocks.0.attn2.q_proj": 3},
        alpha_pattern={"attn1.Wqkv": 8, r"^blocks\.1\.attn2\.kv_proj$": 1, "^out_proj": 100, "proj$": 2},
    ),
    "patterns, rank-stabilized": lambda: peft.LoraConfig(
        r=4, target_modules=ATTENTION, rank_pattern={"Wqkv": 2}, alpha_pattern={"Wqkv": 8}, use_rslora=True
    ),
    "DoRA": lambda: peft.LoraConfig(r=4, lora_alpha=2, target_modules=ATTENTION, use_dora=True),
    "biases of factors": lambda: peft.LoraConfig(r=4, lora_alpha=2, target_modules=ATTENTION, lora_bias=True),
    "an embedder of patches": lambda: peft.LoraConfig(r=4, lora_alpha=2, target_modules=["x_embedder.proj"]),
    "DoRA of an embedder": lambda: peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=["x_embedder.proj"], use_dora=True
    ),
    "LoHa": lambda: peft.LoHaConfig(r=3, alpha=2, target_modules=ATTENTION),
    "LoHa, patterns": lambda: peft.LoHaConfig(
        r=3, alpha=2, target_modules=ATTENTION, rank_pattern={"Wqkv": 2}, alpha_pattern={"q_proj": 5}
    ),
    "LoKr": lambda: peft.LoKrConfig(r=3, alpha=2, target_modules=ATTENTION),
    "LoKr, whole": lambda: peft.LoKrConfig(
        r=64, alpha=16, target_modules=ATTENTION, rank_pattern={"Wqkv": 128}, alpha_pattern={"q_proj": 5}
    ),
    "LoKr, both decomposed": lambda: peft.LoKrConfig(
        r=2, alpha=3, target_modules=ATTENTION, decompose_both=True, decompose_factor=8
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("safe", [True, False])
def test_as_peft_merges_it(name: str, safe: bool, tmp_path: Path) -> None:
    model = randomize(DiT(TINY), 1)
    base = copy.deepcopy(model)
    theirs = trained(CONFIGS[name](), model, tmp_path)
    theirs.save_pretrained(tmp_path, safe_serialization=safe)
    assert (tmp_path / ("adapter_model.safetensors" if safe else "adapter_model.bin")).is_file()
    same(tmp_path, base, merged(theirs))


def test_an_adapter_with_a_name_lies_in_a_folder_of_its_own(tmp_path: Path) -> None:
    model = randomize(DiT(TINY), 1)
    base = copy.deepcopy(model)
    theirs = trained(CONFIGS["plain"](), model, tmp_path, adapter_name="style")
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "style" / "adapter_config.json").is_file()
    expected = merged(theirs)
    same(tmp_path, copy.deepcopy(base), expected)
    same(tmp_path / "style", base, expected)
    (tmp_path / "style").rename(tmp_path / "one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "adapter_config.json").write_text("{}")
    with pytest.raises(LoraError, match="holds 2 adapters of peft; name one of the folders: one, two"):
        read(tmp_path)


def test_an_embedding(tmp_path: Path) -> None:
    """peft keeps the factors of the transpose; v1.1's style embedder is one."""
    assert DIT_G2_V11.style_cond
    config = DiTConfig(**{**TINY.to_dict(), "style_cond": True, "size_cond": True})
    model = randomize(DiT(config), 1)
    base = copy.deepcopy(model)
    targets = ["style_embedder", "q_proj"]
    theirs = trained(peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets), model, tmp_path)
    theirs.save_pretrained(tmp_path)
    expected = merged(theirs)
    assert not torch.equal(expected["style_embedder.weight"], base.state_dict()["style_embedder.weight"])
    same(tmp_path, base, expected)


@pytest.mark.parametrize("compiled", ["whole", "blocks"])
def test_a_model_under_torch_compile(compiled: str, tmp_path: Path) -> None:
    model = randomize(DiT(TINY), 1)
    base = copy.deepcopy(model)
    theirs = trained(CONFIGS["patterns"](), model, tmp_path)
    expected = merged(copy.deepcopy(theirs))
    if compiled == "whole":
        torch.compile(theirs).save_pretrained(tmp_path)
        tensors = {
            f"_orig_mod.{key}": value
            for key, value in load_file(tmp_path / "adapter_model.safetensors").items()
        }
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    else:
        blocks = theirs.base_model.model.blocks
        for index in range(len(blocks)):
            blocks[index] = torch.compile(blocks[index])
        theirs.save_pretrained(tmp_path)
    assert any("_orig_mod" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    same(tmp_path, base, expected)


WHOLE: dict[str, dict[str, Any]] = {
    "a module": {"modules_to_save": ["final_layer.linear", "mlp_t5.0"]},
    "a module of diffusers' fused rows": {
        "modules_to_save": ["blocks.0.attn1.Wqkv"],
        "target_modules": ["q_proj"],
    },
    "biases of adapted layers": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "both, DoRA": {"bias": "lora_only", "modules_to_save": ["final_layer.linear"], "use_dora": True},
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_weights_and_biases(name: str, tmp_path: Path) -> None:
    """What peft saves whole takes the base's place, at a strength: so much of the way there."""
    model = randomize(DiT(TINY), 1)
    base = copy.deepcopy(model)
    options = {"target_modules": ATTENTION, **WHOLE[name]}
    theirs = trained(peft.LoraConfig(r=2, lora_alpha=3, **options), model, tmp_path)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if parameter.requires_grad and "lora_" not in key:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    biases = [key for key in saved if "attn" in key and key.endswith(".bias")]
    if options.get("bias") == "lora_only" and not biases:
        pytest.skip("this release of peft forgets the biases when it saves")
    before, expected = copy.deepcopy(base.state_dict()), merged(theirs)
    half = copy.deepcopy(base)
    apply(read(tmp_path), half, 0.25)
    same(tmp_path, base, expected)
    if "use_dora" in WHOLE[name]:
        return
    for key, value in half.state_dict().items():
        wanted = before[key] + 0.25 * (expected[key] - before[key])
        torch.testing.assert_close(value, wanted, atol=2e-6 * float(value.abs().max()), rtol=0)


def test_what_cannot_be_done_with_whole_weights(tmp_path: Path) -> None:
    key = "base_model.model.blocks.0.mlp.fc1"
    tensors = {f"{key}.weight": torch.ones(128, 64), f"{key}.bias": torch.ones(128)}
    tensors |= {f"{KEY}.lora_A.weight": torch.ones(4, 64), f"{KEY}.lora_B.weight": torch.ones(64, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LoraError, match=r"no part of a LoRA that is known here, such as .*fc1"):
        read(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"modules_to_save": ["blocks.0.mlp.fc1"]}')
    adapter = read(tmp_path)
    assert "1 modules with weights or biases that take the place" in describe(adapter)
    with pytest.raises(LoraError, match="has whole weights"):
        combine([(adapter, 0.5)])
    for format in FORMATS:
        with pytest.raises(LoraError, match=r"whole|cannot hold"):
            write(adapter, tmp_path / ("out" if format == "peft" else "out.safetensors"), format=format)
    # ComfyUI's own name of a whole weight comes and goes.
    own = {"diffusion_model.blocks.0.mlp.fc1.set_weight": torch.ones(128, 64)}
    assert torch.equal(to_tensors(from_tensors(own))[next(iter(own))], torch.ones(128, 64))
    weight = torch.zeros(128, 64)
    ((patch,),) = from_tensors(own).modules.values()
    assert torch.equal(changed(weight, [patch], 0.5), torch.full((128, 64), 0.5))


@pytest.mark.parametrize("config", ["IA3Config", "OFTConfig", "VeraConfig"])
def test_other_kinds_of_peft_are_refused_by_name(config: str, tmp_path: Path) -> None:
    options = {"feedforward_modules": ["out_proj"]} if config == "IA3Config" else {}
    if config == "VeraConfig":
        options = {"r": 4}
    targets = ["out_proj"]
    peft.get_peft_model(
        randomize(DiT(TINY), 1), getattr(peft, config)(target_modules=targets, **options)
    ).save_pretrained(tmp_path)
    with pytest.raises(LoraError, match=f"is of peft's {config.removesuffix('Config').upper()}"):
        read(tmp_path)


# -- configurations of others ------------------------------------------------------------------------------

KEY = "base_model.model.blocks.0.attn1.out_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {f"{KEY}.lora_A.weight": torch.ones(4, 64), f"{KEY}.lora_B.weight": torch.ones(64, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    return tmp_path


def scale(folder: Path, content: str | dict[str, Any]) -> float:
    text = content if isinstance(content, str) else json.dumps({"peft_type": "LORA", "r": 4, **content})
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    ((patch,),) = read(folder).modules.values()
    return patch.scale


def test_odd_but_meaningful_configurations(folder: Path) -> None:
    assert scale(folder, '\ufeff{"lora_alpha": 8}') == 2
    assert scale(folder, {"lora_alpha": None}) == scale(folder, {}) == scale(folder, "{}") == 1
    assert scale(folder, {"lora_alpha": 8, "alpha_pattern": None, "rank_pattern": None}) == 2
    assert scale(folder, {"lora_alpha": 8, "auto_mapping": {"base_model_class": "X"}, "peft_version": 3}) == 2
    # What names no module, as a regular expression too.
    names = [
        "proj",
        "attn1",
        "ttn1.out_proj",
        "^attn1.out_proj",
        "^out_proj$",
        "blocks.0.attn1",
        "attn2.out_proj",
    ]
    assert scale(folder, {"lora_alpha": 8, "alpha_pattern": dict.fromkeys(names, 100)}) == 2
    for name in (
        "out_proj",
        "attn1.out_proj",
        r"attn1\.out_proj$",
        r"^blocks\.0\.attn1\.out_proj$",
        r"out\_proj",
    ):
        assert (
            scale(folder, {"alpha_pattern": {name: 2} | ({} if name == "out_proj" else {"out_proj": 9})})
            == 0.5
        )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            {"alpha_pattern": {"(a|aa)+$": 1}},
            r"'\(a\|aa\)\+\$' has \( \| \) \+: regular expressions of a file",
        ),
        ({"alpha_pattern": {".*": 1}}, r"has \*"),
        ({"alpha_pattern": {r"blocks.\d.attn1": 1}}, "not run"),
        ({"alpha_pattern": {"a^b": 1}}, r"has \^ or \$ inside"),
        ({"alpha_pattern": {"[": 1}}, "not run"),
        ({"alpha_pattern": [1]}, "alpha_pattern is a list; expected names with numbers"),
        ({"alpha_pattern": {"out_proj": "x"}}, "out_proj is 'x'; expected a number"),
        ({"alpha_pattern": {"out_proj": None}}, "is null"),
        ({"peft_type": "LOKR", "rank_pattern": {".+": 4}}, r"has \+"),
        ({"peft_type": "LOKR", "rank_pattern": {"out_proj": 0}}, "expected more than 0"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; expected a number"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"r": 0}, "r is 0; expected more than 0"),
        ({"r": [4]}, r"r is \[4\]"),
        ({"peft_type": ["LORA"]}, "is of peft's"),
        ({"peft_type": "ADALORA"}, "is of peft's ADALORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "began as pissa_niter_4"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layers that are repeated"),
        ("[]", "adapter_config.json"),
        ("{", "adapter_config.json"),
    ],
)
def test_bad_configurations(folder: Path, content: str | dict[str, Any], said: str) -> None:
    with pytest.raises(LoraError, match=said) as error:
        scale(folder, content)
    assert "adapter_config.json" in str(error.value) and "\n" not in str(error.value)
