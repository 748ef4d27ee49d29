"""Kinds of adapters: LoHa and LoKr, and layers with ranks and alphas of their own."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lora_setup import losses, objective_of, shake, write_lora_run
from published_loras import lycoris
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import TINY
from torch import Tensor, nn
from train_setup import records, run_training

from hydit_core.errors import ConfigError
from hydit_core.lora import reading, writing
from hydit_core.lora.cli import main
from hydit_core.train.adapter_kinds import divided
from hydit_core.train.adapter_layers import AdaptedLinear
from hydit_core.train.config import load_config
from hydit_core.train.dryrun import describe
from hydit_core.train.parts import build
from hydit_core.weights.bundle import bundle
from hydit_core.weights.frozen import FrozenLinear

LOHA = ["lora.kind=loha"]
LOKR = ["lora.kind=lokr", "lora.factor=4"]
KINDS = {
    "loha": LOHA,
    "loha, rslora": [*LOHA, "lora.rslora=true"],
    "lokr": LOKR,
    "lokr of like halves": ["lora.kind=lokr"],
    "lokr of four factors": ["lora.kind=lokr", "lora.rank=1", "lora.decompose_both=true"],
    "lokr, whole": ["lora.kind=lokr", "lora.full_matrix=true"],
    "lora": ["lora.kind=lora"],
    "lora, patterns": ['lora.rank_pattern={"dit.*.attn2.*"=2, "Wqkv"=5}', 'lora.alpha_pattern={"Wqkv"=1.5}'],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_model_file: Path) -> Path:
    return write_lora_run(tmp_path_factory.mktemp("lora"), tiny_model_file)


def as_defined(file: dict[str, Tensor]) -> dict[str, Tensor]:
    """The change of each layer in float64, by the definitions of lycoris-lora's files."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in file.items():
        name, _, rest = key.removeprefix("diffusion_model.").partition(".lora_up")
        for mark in (".lora_", ".hada_", ".lokr_", ".alpha"):
            name, found, rest = key.removeprefix("diffusion_model.").partition(mark)
            if found:
                layers.setdefault(name, {})[(found + rest).removeprefix(".")] = value.double()
                break
    return {name: _change(tensors) for name, tensors in layers.items()}


def _change(t: dict[str, Tensor]) -> Tensor:
    def matrix(name: str) -> Tensor:
        return t[name] if name in t else t[f"{name}_a"] @ t[f"{name}_b"]

    if "lora_up.weight" in t:
        rank, change = t["lora_down.weight"].shape[0], t["lora_up.weight"] @ t["lora_down.weight"]
    elif "hada_w1_a" in t:
        rank, change = t["hada_w1_b"].shape[0], matrix("hada_w1") * matrix("hada_w2")
    else:
        rank = next((t[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in t), 0)
        change = torch.einsum("ab,cd->acbd", matrix("lokr_w1"), matrix("lokr_w2"))
        change = change.reshape(change.shape[0] * change.shape[1], -1)
    return change * (t["alpha"] / rank if rank else 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_does_what_the_trained_model_does(config: Path, tmp_path: Path, kind: str) -> None:
    """Against weights that get what the file's tensors are by definition."""
    objective = objective_of(config, *KINDS[kind])
    base = losses(objective_of(config), config)
    torch.testing.assert_close(losses(objective, config), base, rtol=1e-5, atol=0)  # fresh: the base
    shake(objective)
    after = losses(objective, config)
    assert (after - base).abs().min() > 1e-5
    objective.export(tmp_path / "lora.safetensors", dtype=torch.float32, all_in_one=False, extra={})
    changes = as_defined(load_file(tmp_path / "lora.safetensors"))
    assert len(changes) == 5 * TINY.depth + 1
    plain = objective_of(config)
    plain.module.dit = build(load_config(config)).dit
    with torch.no_grad():
        for name, change in changes.items():
            layer = plain.module.dit.get_submodule(name)
            layer.weight = nn.Parameter((layer.weight.double() + change).float())
    torch.testing.assert_close(losses(plain, config), after, rtol=1e-5, atol=0)
    adapter = reading.read(tmp_path / "lora.safetensors")  # and the reader says so too
    for name, change in changes.items():
        (patch,) = adapter.modules[f"dit.{name}"]
        torch.testing.assert_close(patch.delta().double(), change, rtol=1e-5, atol=1e-7)
    assert (tmp_path / "lora").is_dir() == kind.startswith("lora")


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr of four factors", "lokr, whole"])
def test_a_trained_file_through_every_command(config: Path, tmp_path: Path, kind: str) -> None:
    """Merged, converted, combined and extracted, it is what its tensors are by definition, in float64."""
    objective = objective_of(config, *KINDS[kind])
    shake(objective)
    trained, model = tmp_path / "lora.safetensors", load_config(config).model.init_from
    objective.export(trained, dtype=torch.float32, all_in_one=False, extra={})
    changes = as_defined(load_file(trained))
    merged, kohya, low, extracted = (
        tmp_path / f"{name}.safetensors" for name in ("merged", "kohya", "low", "extracted")
    )
    for command in (
        ["merge", model, f"{trained}:0.5", "-o", merged, "--dtype", "fp32", "--layout", "tencent"],
        ["convert", trained, kohya, "--format", "kohya"],
        ["combine", f"{trained}:0.5", "--rank", "64", "-o", low],
        ["extract", merged, model, extracted, "--rank", "64", "--dtype", "fp32"],
    ):
        assert main([str(word) for word in command]) == 0
    base, after = bundle(model).dit, load_file(merged)
    assert base is not None and after.keys() == set(base)
    for key, tensor in after.items():
        change = changes.get(key.removesuffix(".weight"))
        expected = base.get(key).double() + (0 if change is None else change / 2)
        torch.testing.assert_close(tensor, expected.float(), rtol=1e-5, atol=1e-6)
    assert all(".hada_" in key or ".lokr_" in key or key.endswith("alpha") for key in load_file(kohya))
    for path, factor in ((kohya, 1.0), (low, 0.5), (extracted, 0.5)):
        found = reading.read(path).modules
        assert {name.removeprefix("dit.") for name in found} == changes.keys()
        for name, change in changes.items():
            (patch,) = found[f"dit.{name}"]
            torch.testing.assert_close(patch.delta().double(), factor * change, rtol=1e-4, atol=1e-5)


PEFTS: dict[str, Any] = {
    "loha": (peft.LoHaConfig(r=3, alpha=6, target_modules=["0"]), LOHA),
    "lokr": (peft.LoKrConfig(r=3, alpha=6, decompose_factor=4, target_modules=["0"]), LOKR),
}


@pytest.mark.parametrize("kind", PEFTS)
def test_values_and_gradients_are_those_of_pefts_layers(config: Path, kind: str) -> None:
    settings, options = PEFTS[kind]
    objective = objective_of(config, *options)
    shake(objective)
    name = "dit.blocks.0.attn1.Wqkv"
    ours = objective.parts.dit.blocks[0].attn1.Wqkv
    assert isinstance(ours, AdaptedLinear)
    ours = copy.deepcopy(ours).double()
    plain = nn.Linear(ours.base_layer.in_features, ours.base_layer.out_features).double()
    plain.weight, plain.bias = ours.base_layer.weight, ours.base_layer.bias
    theirs = peft.get_peft_model(nn.Sequential(plain), settings).double()
    own = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for key, parameter in ours.factors.items():
            (match,) = [p for n, p in own.items() if n.split(".")[-2].endswith(f"_{key}")]
            match.copy_(parameter)
    x = torch.randn(2, 5, plain.in_features, dtype=torch.double)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    results = [ours(inputs[0]), theirs(inputs[1])]
    assert name in {key.rpartition(".")[0] for key in objective.parameters()}
    torch.testing.assert_close(*results)
    for result in results:
        result.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for key, parameter in ours.factors.items():
        (match,) = [p for n, p in own.items() if n.split(".")[-2].endswith(f"_{key}")]
        torch.testing.assert_close(parameter.grad, match.grad)


def test_sides_are_divided_as_lycoris_does() -> None:
    """The table in lycoris-lora's documentation, and sizes of DiT-g/2."""
    table = {
        127: {-1: (1, 127), 2: (1, 127), 16: (1, 127)},
        128: {-1: (8, 16), 2: (2, 64), 4: (4, 32), 8: (8, 16), 16: (8, 16)},
        250: {-1: (10, 25), 2: (2, 125), 4: (2, 125), 8: (5, 50), 16: (10, 25)},
        360: {-1: (18, 20), 2: (2, 180), 4: (4, 90), 16: (15, 24)},
        1024: {-1: (32, 32), 4: (4, 256), 16: (16, 64)},
        1408: {-1: (32, 44), 8: (8, 176), 10: (8, 176)},
        4224: {-1: (64, 66), 8: (8, 528)},
    }
    for size, rows in table.items():
        for factor, pair in rows.items():
            assert divided(size, factor) == pair, (size, factor)


def test_kinds_learn_over_a_base_in_few_bits(config: Path) -> None:
    for options in (LOHA, LOKR):
        objective = objective_of(config, *options, "lora.base_precision=fp8")
        shake(objective)
        with torch.autocast("cpu", torch.bfloat16):
            losses(objective, config).mean().backward()
        for name, parameter in objective.parameters().items():
            assert parameter.dtype == torch.float32 and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name
        assert isinstance(objective.parts.dit.blocks[0].attn1.Wqkv.base_layer, FrozenLinear)


@pytest.mark.parametrize("options", [[*LOHA, "lora.rank_dropout=0.3"], [*LOKR, "ema.enabled=true"]], ids=str)
def test_resuming_gives_the_same_file(config: Path, tmp_path: Path, options: list[str]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*options, "run.steps=3", "run.grad_accumulation=2", "lora.train_bert=true"]
    options += ["samples.every=3", 'samples.prompts=["cat"]', "samples.steps=2"]
    run_training(config, f"run.output_dir={whole}", *options)
    run_training(config, f"run.output_dir={parts}", *options, stop_after_micro=3)
    assert run_training(config, f"run.output_dir={parts}", *options, resume="auto")
    a, b = (load_file(folder / "lora.safetensors") for folder in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert any(name.startswith("text_encoders.hydit_clip.") for name in a)
    sheets = [(folder / "samples" / "step_00000003.png").read_bytes() for folder in (whole, parts)]
    assert sheets[0] == sheets[1]


def test_dropped_rows_are_of_training_alone_and_the_same_in_checkpointing(config: Path) -> None:
    gradients = []
    for fraction in (0.0, 1.0):
        objective = objective_of(config, *LOKR, "lora.rank_dropout=0.5")
        shake(objective)
        objective.use_checkpointing(fraction)
        losses(objective, config).mean().backward()
        gradients.append({name: p.grad for name, p in objective.parameters().items()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name
    layer = objective.parts.dit.blocks[0].attn1.Wqkv
    x = torch.randn(4, layer.base_layer.in_features)
    change = layer(x) - layer.base_layer(x)
    assert 0.2 < float((change == 0).all(0).float().mean()) < 0.8
    layer.eval()
    assert torch.equal(layer(x), layer(x)) and (layer(x) - layer.base_layer(x)).abs().min() > 0


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr of four factors", "lokr, whole"])
def test_continuing_a_file_of_the_kind(config: Path, tmp_path: Path, kind: str) -> None:
    """Also with a higher rank, another alpha, and another spelling of the file: the change is the same."""
    first = objective_of(config, *KINDS[kind])
    shake(first)
    path = tmp_path / "lora.safetensors"
    first.export(path, dtype=torch.float32, all_in_one=False, extra={})
    writing.write(reading.read(path), tmp_path / "kohya.safetensors", format="kohya")
    before = as_defined(load_file(path))
    more = [["lora.alpha=1.5"], [] if "whole" in kind else ["lora.rank=5"]]
    for options, source in zip(more, (path, tmp_path / "kohya.safetensors"), strict=True):
        again = objective_of(config, *KINDS[kind], *options, f"lora.init_from={source}")
        again.export(tmp_path / "again.safetensors", dtype=torch.float32, all_in_one=False, extra={})
        (tmp_path / "again.safetensors").stat()
        after = as_defined(load_file(tmp_path / "again.safetensors"))
        assert after.keys() == before.keys()
        for name, change in before.items():
            torch.testing.assert_close(after[name], change, rtol=1e-4, atol=1e-6)
        losses(again, config).sum().backward()
        for name, parameter in again.parameters().items():
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_continuing_what_lycoris_published(config: Path, tmp_path: Path, kind: str) -> None:
    written = lycoris(kind)(tmp_path)
    wide = ["lora.targets=all-linear", f"lora.init_from={written.place}", f"lora.kind={kind}", "lora.rank=4"]
    objective = objective_of(config, *wide, *(["lora.factor=4"] if kind == "lokr" else []))
    objective.export(tmp_path / "again.safetensors", dtype=torch.float32, all_in_one=False, extra={})
    after = as_defined(load_file(tmp_path / "again.safetensors"))
    for key, change in written.changes.items():
        name = key.removeprefix("dit.").removesuffix(".weight")
        expected = change(torch.zeros(after[name].shape, dtype=torch.double))
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_continued_is_told(config: Path, tmp_path: Path) -> None:
    paths = {}
    for kind in ("loha", "lokr", "lokr, whole"):
        paths[kind] = tmp_path / f"{kind.replace(', ', '_')}.safetensors"
        objective_of(config, *KINDS[kind]).export(
            paths[kind], dtype=torch.float32, all_in_one=False, extra={}
        )
    wrong = [
        (paths["loha"], [], r"is a LoHa: set lora\.kind = 'loha'"),
        (paths["lokr"], LOHA, r"is a LoKr: set lora\.kind = 'lokr'"),
        (paths["loha"], [*LOHA, "lora.rank=2"], r"of rank 3, this run trains 2: set lora\.rank = 3 or more"),
        (paths["lokr"], ["lora.kind=lokr"], r"lora\.factor = -1\) has \d+ x \d+: set lora\.factor = 4"),
        (paths["lokr, whole"], ["lora.kind=lokr", "lora.rank=1"], r"w2 whole: set lora\.full_matrix = true"),
    ]
    for path, options, message in wrong:
        settings = [*options, f"lora.init_from={path}"]
        with pytest.raises(ConfigError, match=message):
            objective_of(config, *settings)
        with pytest.raises(ConfigError, match=message):
            list(describe(load_config(config, settings)))


def test_ranks_and_alphas_by_pattern(config: Path, tmp_path: Path) -> None:
    options = ['lora.rank_pattern={"re:blocks.0.*Wqkv"=5, "Wqkv"=2}', 'lora.alpha_pattern={"out_proj"=1.5}']
    for kind, more in {"lora": [], "loha": LOHA, "lokr": LOKR}.items():
        objective = objective_of(config, *options, *more)
        objective.export(tmp_path / f"{kind}.safetensors", dtype=torch.float32, all_in_one=False, extra={})
        modules = reading.read(tmp_path / f"{kind}.safetensors").modules
        (first,), (second,) = (modules[f"dit.blocks.{i}.attn1.Wqkv"] for i in (0, 1))
        (out,), (other,) = (modules[f"dit.blocks.0.attn1.{name}"] for name in ("out_proj", "out_proj"))
        assert (first.rank, second.rank, out.rank) == (5, 2, 3)
        assert (first.scale, second.scale, out.scale, other.scale) == (6 / 5, 3.0, 0.5, 0.5)
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert '"rank_pattern": {"re:blocks.0.*Wqkv": 5, "Wqkv": 2}' in file.metadata()["hydit.lora"]
    folder = reading.read(tmp_path / "lora").modules
    assert (folder["dit.blocks.0.attn1.Wqkv"][0].rank, folder["dit.blocks.0.attn1.Wqkv"][0].scale) == (5, 1.2)
    text = "\n".join(describe(load_config(config, options)))
    assert "strength 2, but where rank_pattern and alpha_pattern say otherwise" in text
    with pytest.raises(ConfigError, match=r"lora\.rank_pattern: no linear layer fits 'to_q'; names look"):
        objective_of(config, 'lora.rank_pattern={"to_q"=2}')


def test_patterns_may_be_of_a_text_encoder_alone(config: Path) -> None:
    """The dry run measures the DiT without it."""
    options = ["lora.train_bert=true", 'lora.rank_pattern={"query"=2}', 'lora.targets=["Wqkv", "query"]']
    assert "trained: " in "\n".join(describe(load_config(config, options)))


@pytest.mark.parametrize("options", [[], LOHA, LOKR], ids=str)
def test_a_dry_run_counts_what_is_trained(config: Path, options: list[str]) -> None:
    text = "\n".join(describe(load_config(config, options)))
    count = sum(p.numel() for p in objective_of(config, *options).parameters().values())
    assert f"trained: {count:,} parameters" in text
    assert (
        f"{ {'loha': 'LoHa', 'lokr': 'LoKr'}.get(options[0][10:], 'LoRA') if options else 'LoRA' } of" in text
    )


def test_other_strengths_are_not_resumed(config: Path, tmp_path: Path) -> None:
    output = f"run.output_dir={tmp_path / 'run'}"
    run_training(config, output, "run.steps=1", *LOKR)
    for change, message in {
        'lora.alpha_pattern={"Wqkv"=1.0}': r" 2 at dit\.blocks\.0\.attn1\.Wqkv, the .* says 0\.333",
        "lora.full_matrix=true": r"strength \(alpha / rank\) 2, the configuration says 1",
        "lora.kind=loha": r"lora\.kind = 'lokr', the configuration says 'loha'",
        "lora.rank=2": "strength",
    }.items():
        sets = [*LOKR, change] if change != "lora.kind=loha" else [change]
        with pytest.raises(ConfigError, match=message):
            run_training(config, output, *sets, resume="auto")
    assert run_training(config, output, "run.steps=2", *LOKR, resume="auto")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["lora.kind=locon"], "'lora', 'loha' or 'lokr'"),
        ([*LOHA, "lora.dora=true"], "dora is for kind = 'lora', not 'loha'"),
        ([*LOHA, "lora.dropout=0.1"], "dropout is for kind = 'lora', not 'loha'"),
        ([*LOHA, "lora.factor=4"], "factor is for kind = 'lokr', not 'loha'"),
        (["lora.rank_dropout=0.1"], "rank_dropout is for kind = 'loha' or 'lokr', not 'lora'"),
        ([*LOKR, "lora.factor=0"], "use -1, or 1 and more"),
        (['lora.rank_pattern={"Wqkv"=0}'], "rank_pattern.Wqkv"),
        (['lora.rank_pattern={"Wqkv"="8"}'], "rank_pattern.Wqkv"),
        (['lora.rank_pattern={"Wqkv"=true}'], "rank_pattern.Wqkv"),
        (['lora.alpha_pattern={"Wqkv"=0.0}'], "alpha_pattern.Wqkv"),
        (['lora.alpha_pattern={"re:("=1.0}'], "no regular expression"),
        (['lora.targets=["re:("]'], "no regular expression"),
    ],
)
def test_contradictions(config: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config, options)


def test_a_change_is_no_larger_than_its_layers_input(config: Path) -> None:
    """A LoKr never makes the matrix that it stands for: nothing that autograd keeps has its size."""
    objective = objective_of(config, *LOKR)
    layer = objective.parts.dit.blocks[0].attn1.Wqkv
    sizes: list[int] = []
    x = torch.randn(2, layer.base_layer.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        layer(x)
    assert max(sizes) < math.prod(layer.base_layer.weight.shape) / 4


def test_lora_plus(config: Path, tmp_path: Path) -> None:
    """B's first AdamW step is so many times that of A, whatever the gradients are; both rates are told."""
    steps = {}
    for ratio in (1, 16):
        folder = tmp_path / str(ratio)
        options = [f"optimizer.loraplus_lr_ratio={ratio}.0", "optimizer.lr=1e-4", "lora.alpha=3"]
        assert run_training(config, f"run.output_dir={folder}", "run.steps=1", *options)
        steps[ratio] = load_file(folder / "lora" / "adapter_model.safetensors")
        (told,) = [record for record in records(folder) if "lr" in record]
        assert told["lr"] == 1e-4 and told.get("lr_b") == (None if ratio == 1 else 16e-4)
    for name, value in steps[1].items():
        factor = 16 if name.endswith("lora_B.weight") else 1
        torch.testing.assert_close(steps[16][name], factor * value, rtol=1e-4, atol=1e-9)
    for options, message in {
        ("optimizer.name=prodigy",): "prodigy finds one learning rate for all matrices",
        ("optimizer.name=muon",): "muon makes all steps of one size for all matrices",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_config(config, ["optimizer.loraplus_lr_ratio=2.0", *options])
    with pytest.raises(ConfigError, match=r"is for LoRAs .*, and none is trained"):
        list(describe(load_config(config, ["optimizer.loraplus_lr_ratio=2.0", *LOKR])))
