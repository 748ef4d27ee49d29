"""Training a LoRA: where adapters go, what is trained, what comes out, and how the base is stored."""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_setup import losses, objective_of, shake, write_lora_run
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import TINY, TINY_V11, write_tiny_model
from torch import nn
from train_setup import command_line, records, run_training

from hydit_core.errors import ConfigError, DataError, HyditError
from hydit_core.lora import reading
from hydit_core.lora.adapter import changed
from hydit_core.model.dit import DiT
from hydit_core.train import distributed
from hydit_core.train.adapters import adapter_parameters, find_targets
from hydit_core.train.config import load_config
from hydit_core.train.dryrun import describe
from hydit_core.train.launch import open_data, prepare_data
from hydit_core.train.loop import Trainer
from hydit_core.train.lora_section import LoraSection
from hydit_core.train.parts import build
from hydit_core.train.validation import validate
from hydit_core.weights import kitchen
from hydit_core.weights.frozen import OPERATIONS, FrozenLinear, dense, store, stored_bytes


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_model_file: Path) -> Path:
    return write_lora_run(tmp_path_factory.mktemp("lora"), tiny_model_file)


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run_training(
        config,
        f"run.output_dir={folder}",
        "validation.every=3",
        "samples.every=3",
        'samples.prompts=["cat"]',
        "samples.steps=2",
        "lora.train_bert=true",
        "lora.train_t5=true",
        "lora.trigger=cat",
    )
    return folder


def test_attention_is_what_published_loras_change() -> None:
    dit = DiT(TINY, device="meta")
    names = set(find_targets({"dit": dit}, LoraSection()))
    blocks = {
        f"dit.blocks.{i}.{name}"
        for i in range(TINY.depth)
        for name in ("attn1.Wqkv", "attn1.out_proj", "attn2.q_proj", "attn2.kv_proj", "attn2.out_proj")
    }
    assert names == blocks | {"dit.pooler.q_proj"}
    with_mlp = set(find_targets({"dit": dit}, LoraSection(targets="attention+mlp")))
    assert with_mlp - names == {
        f"dit.blocks.{i}.mlp.{fc}" for i in range(TINY.depth) for fc in ("fc1", "fc2")
    }
    everything = find_targets({"dit": dit}, LoraSection(targets="all-linear"))
    assert len(everything) == sum(isinstance(m, nn.Linear) for m in dit.modules())
    own = find_targets({"dit": dit}, LoraSection(targets=("dit.blocks.1.*", "re:fc2$")))
    assert "dit.blocks.1.attn1.Wqkv" in own and "dit.blocks.0.mlp.fc2" in own
    assert "dit.blocks.0.attn1.Wqkv" not in own
    with pytest.raises(ConfigError, match=r"no linear layer fits 'to_q'; names look like: dit\."):
        find_targets({"dit": dit}, LoraSection(targets=("Wqkv", "to_q")))
    with pytest.raises(ConfigError, match=r"fits a layer of bert; .* lora\.train_bert = false"):
        find_targets({"dit": dit, "bert": nn.Sequential(nn.Linear(1, 1))}, LoraSection(targets=("Wqkv",)))


def test_both_exports_hold_what_was_trained(finished: Path, tiny_model_file: Path) -> None:
    comfy, peft = reading.read(finished / "lora.safetensors"), reading.read(finished / "lora")
    assert comfy.parts() == {"dit", "bert", "t5"}
    assert set(comfy.modules) == set(peft.modules)
    assert len([name for name in comfy.modules if name.startswith("dit.")]) == 5 * TINY.depth + 1
    for name, (patch,) in comfy.modules.items():
        (other,) = peft.modules[name]
        assert patch.rank == 3 and patch.scale == other.scale == 2.0
        assert torch.equal(patch.delta(), other.delta())
        assert patch.delta().abs().max() > 0, name
    with safe_open(finished / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
        assert sum(key.endswith(".alpha") for key in file.keys()) == len(comfy.modules)  # noqa: SIM118
    assert metadata["hydit.trigger"] == metadata["modelspec.trigger_phrase"] == "cat"
    assert metadata["modelspec.title"] == "a style"
    assert metadata["modelspec.architecture"].endswith("/lora")
    recipe = json.loads(metadata["hydit.lora"])
    assert (recipe["rank"], recipe["alpha"], recipe["base"]) == (3, 6, tiny_model_file.name)
    settings = json.loads((finished / "lora" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (3, 6)
    assert sorted(p.name for p in (finished / "samples").iterdir()) == [
        "step_00000000.png",
        "step_00000003.png",
    ]
    assert len([record for record in records(finished) if "val_loss" in record]) == 2


@pytest.mark.parametrize("options", [[], ["lora.rslora=true"], ["lora.dora=true"]], ids=str)
def test_the_file_does_what_the_trained_model_does(config: Path, tmp_path: Path, options: list[str]) -> None:
    """Against peft reading the folder, and against the weights that ``changed`` gives."""
    objective = objective_of(config, *options)
    before = losses(objective, config)
    shake(objective)
    after = losses(objective, config)
    assert (after - before).abs().min() > 1e-4
    objective.export(tmp_path / "lora.safetensors", dtype=torch.float32, all_in_one=False, extra={})

    base = objective_of(config)
    plain = build(load_config(config)).dit
    PeftModel.from_pretrained(plain, tmp_path / "lora")  # puts its layers into the module
    base.module.dit = plain.eval()
    assert torch.allclose(losses(base, config), after, rtol=1e-5)

    merged = build(load_config(config)).dit
    with torch.no_grad():
        for name, patches in reading.read(tmp_path / "lora.safetensors").modules.items():
            layer = merged.get_submodule(name.removeprefix("dit."))
            layer.weight = nn.Parameter(changed(layer.weight.float(), patches))
    base.module.dit = merged
    assert torch.allclose(losses(base, config), after, rtol=1e-5)


@pytest.mark.parametrize("texts", [[], ["lora.train_bert=true", "lora.train_t5=true"]], ids=["dit", "all"])
@pytest.mark.parametrize("kind", ["lora.rslora=false", "lora.rslora=true", "lora.dora=true"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_fresh_adapter_changes_nothing(config: Path, kind: str, texts: list[str], precision: str) -> None:
    """Of any kind, over any base; DoRA over a base in few bits keeps the rows as long as they were."""
    options = [kind, *texts, "lora.targets=attention+mlp"]
    objective = objective_of(config, *options, f"lora.base_precision={precision}")
    assert any(name.startswith("t5.") for name in objective.parameters()) == bool(texts)
    plain = objective_of(config)
    plain.module.dit = build(load_config(config)).dit.float()
    if precision == "fp32":
        assert torch.allclose(losses(objective, config), losses(plain, config), rtol=1e-5)
        return
    assert torch.allclose(losses(objective, config), losses(plain, config), rtol=0.02)
    if "dora" not in kind:
        bare = objective_of(config, "lora.base_precision=int8")
        assert torch.equal(losses(objective, config), losses(bare, config))


def test_only_adapters_learn(config: Path) -> None:
    objective = objective_of(config, "lora.train_t5=true")
    shake(objective)
    losses(objective, config).mean().backward()
    trained = objective.parameters()
    assert {name.rpartition(".")[2] for name in trained} == {"lora_A", "lora_B"}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    ours = {id(p) for p in trained.values()}
    for module in (objective.module, objective.parts.text):
        assert all(p.grad is None and not p.requires_grad for p in module.parameters() if id(p) not in ours)
    assert any(name.startswith("t5.encoder.block.0.layer.0.SelfAttention.q.") for name in trained)
    assert not any(name.startswith("bert.") for name in trained)


def test_with_cached_captions_no_text_encoder_is_in_memory(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, validation and sample pictures are those of a run with its encoders; prompts are cached too."""
    seen: list[str] = []
    original = Trainer.run

    def run(self: Trainer, **options: Any) -> bool:
        seen.append({p.device.type for p in self.objective.parts.text.parameters()}.pop())
        return original(self, **options)

    monkeypatch.setattr(Trainer, "run", run)
    more = ["run.steps=2", "validation.every=2", "samples.every=2", 'samples.prompts=["no caption", "小鸟"]']
    more += ["samples.steps=2", "samples.cfg=3", 'samples.negative="blurry"']
    for name in ("true", "false"):
        folder = tmp_path / name
        cache = [f"data.cache.text={name}", f"data.cache.dir={tmp_path / 'cache'}"]
        assert run_training(config, *more, *cache, f"run.output_dir={folder}")
    assert seen == ["meta", "cpu"]
    cached, plain = tmp_path / "true", tmp_path / "false"
    assert records(cached) == records(plain)
    sheet = "samples/step_00000002.png"
    assert (cached / sheet).read_bytes() == (plain / sheet).read_bytes()
    assert (cached / "lora.safetensors").stat().st_size == (plain / "lora.safetensors").stat().st_size

    settings = load_config(config, [*more, "data.cache.text=true", f"data.cache.dir={tmp_path / 'cache'}"])
    parts = build(settings)
    prepare_data(settings, open_data(settings), parts, distributed.start("cpu"))
    assert parts.stored_text is not None
    with pytest.raises(DataError, match=r"the text cache .* has no features of 'another text'"):
        parts.stored_text("another text")


def test_first_values_are_those_of_the_seed(config: Path) -> None:
    a, b, c = (objective_of(config, f"run.seed={seed}").parameters() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    name = "dit.blocks.0.attn1.Wqkv.lora_A"
    assert not torch.equal(a[name], c[name])
    assert 0.4 < a[name].std() * (3 * TINY.hidden_size) ** 0.5 < 1.6


@pytest.mark.parametrize("options", [["lora.dropout=0.3", "ema.enabled=true"], ["lora.dora=true"]], ids=str)
def test_resuming_gives_the_same_lora(config: Path, tmp_path: Path, options: list[str]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*options, "run.steps=4", "run.grad_accumulation=2"]
    run_training(config, f"run.output_dir={whole}", *options)
    run_training(config, f"run.output_dir={parts}", *options, stop_after_micro=3)
    assert run_training(config, f"run.output_dir={parts}", *options, resume="auto")
    for file in ("lora.safetensors", "lora/adapter_model.safetensors"):
        a, b = (load_file(folder / file) for folder in (whole, parts))
        assert a and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lora.alpha=12", r"strength \(alpha / rank\) 2, the configuration says 4; .* by lora\.init_from"),
        ("lora.rslora=true", r"strength \(alpha / rank\) 2, the configuration says 3\.46"),
        ("lora.rank=2", r"strength \(alpha / rank\) 2, the configuration says 3"),
        ("lora.targets=all-linear", r"unknown .*to start a new run from these weights use lora\.init_from"),
    ],
)
def test_another_lora_is_not_resumed(config: Path, tmp_path: Path, change: str, message: str) -> None:
    """With another strength what was learned would count differently all at once."""
    output = f"run.output_dir={tmp_path / 'run'}"
    run_training(config, output, "run.steps=1")
    with pytest.raises(ConfigError, match=message):
        run_training(config, output, change, resume="auto")
    assert run_training(config, output, "lora.alpha=6.0", "run.steps=2", resume="auto")


def test_checkpointing_computes_the_same_dropout_again(config: Path) -> None:
    gradients = []
    for fraction in (0.0, 1.0):
        objective = objective_of(config, "lora.dropout=0.5")
        shake(objective)
        objective.use_checkpointing(fraction)
        losses(objective, config).mean().backward()
        gradients.append({name: p.grad for name, p in objective.parameters().items()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


@pytest.mark.parametrize(
    ("precision", "dtype", "error"),
    [
        ("fp32", torch.float32, 1e-6),
        ("bf16", torch.bfloat16, 2e-2),
        ("fp16", torch.float16, 3e-3),
        ("fp8", torch.float8_e4m3fn, 0.2),
    ],
)
@pytest.mark.parametrize("dora", ["true", "false"])
def test_the_base_is_stored_in_few_bits(
    config: Path, precision: str, dtype: torch.dtype, error: float, dora: str
) -> None:
    whole, small = (
        objective_of(config, f"lora.dora={dora}", f"lora.base_precision={p}") for p in ("fp32", precision)
    )
    for objective in (whole, small):
        shake(objective)
    layer = small.parts.dit.blocks[0].mlp.fc1
    assert isinstance(layer, FrozenLinear) and layer.weight.dtype == dtype
    assert small.parts.dit.blocks[0].norm1.weight.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in small.parameters().values())
    one, other = losses(whole, config), losses(small, config)
    assert torch.allclose(one, other, rtol=error)
    assert precision == "fp32" or not torch.equal(one, other)
    other.mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in small.parameters().values())


@pytest.mark.parametrize(("precision", "levels", "error"), [("int8", 255, 0.02), ("nf4", 16, 0.2)])
def test_quantized_bases(config: Path, precision: str, levels: int, error: float) -> None:
    """The matrices of the blocks really are stored so, with the errors that so many levels make."""
    objective = objective_of(config, f"lora.base_precision={precision}")
    shake(objective)
    whole = objective_of(config)
    shake(whole)
    originals = dict(whole.parts.dit.named_modules())
    for name, layer in objective.parts.dit.named_modules():
        if not isinstance(layer, FrozenLinear):
            continue
        exact = originals[name].weight.float()
        if not name.startswith("blocks."):
            assert type(layer.weight.data) is torch.Tensor and layer.weight.dtype == torch.bfloat16, name
            continue
        library = "comfy_kitchen" if precision == "int8" else "torchao"
        assert type(layer.weight.data).__module__.startswith(library), name
        stored = dense(layer.weight, torch.float32)
        blocks = stored if precision == "int8" else stored.reshape(-1, 64)  # what shares a scale
        assert max(len(block.unique()) for block in blocks) <= levels, name
        assert error / 20 < (stored - exact).std() / exact.std() < error, name
    loss, exact = losses(objective, config), losses(whole, config)
    assert torch.allclose(loss, exact, rtol=error) and not torch.equal(loss, exact)
    loss.mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters().values())


def test_quantized_bases_ask_for_their_libraries(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    monkeypatch.setattr(kitchen, "is_available", lambda: False)
    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)
    for start in (
        lambda: objective_of(config, "lora.base_precision=int8"),
        lambda: list(describe(load_config(config, ["lora.base_precision=nf4"]))),
    ):
        with pytest.raises(ConfigError, match=r"needs (comfy-kitchen|torchao): pip install \1"):
            start()


def test_frozen_layers_pass_gradients_on() -> None:
    torch.manual_seed(0)
    plain, frozen = nn.Linear(6, 5), FrozenLinear(6, 5)
    frozen.load_state_dict(plain.state_dict())
    a, b = (torch.linspace(-1, 1, 24).reshape(2, 2, 6).requires_grad_() for _ in range(2))
    one, other = plain(a), frozen(b)
    assert torch.equal(one, other)
    one.square().sum().backward()
    other.square().sum().backward()
    assert torch.allclose(a.grad, b.grad, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(a), frozen(b))


def test_bf16_training_with_a_low_base(config: Path, tmp_path: Path) -> None:
    options = ["run.precision=bf16", "lora.base_precision=fp8", "lora.train_bert=true", "ema.enabled=true"]
    assert run_training(config, f"run.output_dir={tmp_path}", *options, "run.gradient_checkpointing=true")
    assert {t.dtype for t in load_file(tmp_path / "lora" / "adapter_model.safetensors").values()} == {
        torch.float32
    }
    assert all(record["loss"] > 0 for record in records(tmp_path) if "loss" in record)


def test_continuing_a_lora(config: Path, finished: Path, tmp_path: Path) -> None:
    wide = ["lora.train_bert=true", "lora.train_t5=true"]
    for source in ("lora.safetensors", "lora"):
        for alpha in (6, 12):
            objective = objective_of(
                config, *wide, f"lora.init_from={finished / source}", f"lora.alpha={alpha}"
            )
            objective.export(tmp_path / "again.safetensors", dtype=torch.float32, all_in_one=False, extra={})
            before = reading.read(finished / "lora.safetensors").modules
            after = reading.read(tmp_path / "again.safetensors").modules
            assert set(before) == set(after)
            for name in before:
                assert torch.allclose(before[name][0].delta(), after[name][0].delta(), atol=1e-7)
    with pytest.raises(ConfigError, match="layers that this run does not train"):
        objective_of(config, f"lora.init_from={finished / 'lora'}")
    with pytest.raises(ConfigError, match=r"of rank 3, this run trains 2: set lora\.rank = 3"):
        objective_of(config, *wide, "lora.rank=2", f"lora.init_from={finished / 'lora'}")
    with pytest.raises(ConfigError, match=r"set lora\.dora = false"):
        objective_of(config, *wide, "lora.dora=true", f"lora.init_from={finished / 'lora'}")


def test_a_higher_rank_than_that_of_the_lora_learns_too(config: Path, finished: Path, tmp_path: Path) -> None:
    """The ranks beyond its own begin as those of a new LoRA: they change nothing yet, and get gradients."""
    wide = [
        "lora.train_bert=true",
        "lora.train_t5=true",
        "lora.rank=5",
        f"lora.init_from={finished / 'lora'}",
    ]
    objective = objective_of(config, *wide)
    objective.export(tmp_path / "again.safetensors", dtype=torch.float32, all_in_one=False, extra={})
    before = reading.read(finished / "lora.safetensors").modules
    after = reading.read(tmp_path / "again.safetensors").modules
    for name, patches in before.items():
        assert (
            torch.allclose(patches[0].delta(), after[name][0].delta(), atol=1e-7) and after[name][0].rank == 5
        )
    losses(objective, config).sum().backward()
    found = objective.parameters()["dit.blocks.0.attn1.Wqkv.lora_B"]
    assert found[:, 3:].abs().max() == 0 < found.grad[:, 3:].abs().max()


def test_a_dry_run_counts_adapters_and_a_base_in_few_bits(config: Path) -> None:
    lines = command_line(config, "--dry-run", "--set", "lora.base_precision=fp8").stdout
    count = sum(p.numel() for p in objective_of(config).parameters().values())
    assert f"trained: {count:,} parameters" in lines
    assert f"LoRA of rank 3 on {5 * TINY.depth + 1} layers, strength 2; " in lines
    assert "the DiT's matrices are stored in fp8" in lines
    assert not (config.parent / "run").exists()


def test_a_dry_run_refuses_what_training_would(config: Path, finished: Path, tmp_path: Path) -> None:
    """Also what is only found with the LoRA to continue at hand, and without a package."""
    wrong = {
        f"lora.init_from={tmp_path / 'none'}": "none does not exist",
        f"lora.init_from={finished / 'lora'}": "layers that this run does not train",
        f"run.output_dir={config.parent / 'pictures' / 'run'}": "inside the picture folder",
    }
    for change, message in wrong.items():
        with pytest.raises(HyditError, match=message):
            list(describe(load_config(config, [change])))
    same = ["lora.train_bert=true", "lora.train_t5=true", f"run.output_dir={finished}"]
    lines = "\n".join(describe(load_config(config, [*same, f"lora.init_from={finished / 'lora'}"])))
    assert f"it starts from {finished / 'lora'}" in lines
    assert "that folder holds a run already (step_00000003)" in lines
    with pytest.raises(ConfigError, match=r"of rank 3, this run trains 2: set lora\.rank = 3"):
        list(describe(load_config(config, [*same, f"lora.init_from={finished / 'lora'}", "lora.rank=2"])))


def test_the_estimate_is_what_is_stored() -> None:
    for precision in ("fp32", "bf16", "fp8"):
        dit = DiT(TINY, operations=OPERATIONS)
        expected = stored_bytes(dit, precision)
        store(dit, precision)
        assert sum(p.nbytes for p in dit.parameters()) == pytest.approx(expected, rel=0.03)


def test_models_with_sizes_train_too(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "old.safetensors", TINY_V11)
    assert run_training(write_lora_run(tmp_path / "run", model), "run.steps=1")


def test_a_trigger_that_no_caption_holds_is_told(config: Path, tmp_path: Path, capsys) -> None:
    run_training(config, f"run.output_dir={tmp_path}", "run.steps=1", "lora.trigger=zqx")
    warning = "warning: no caption holds lora.trigger = 'zqx'"
    assert warning in capsys.readouterr().err
    assert f"  {warning}" in "\n".join(describe(load_config(config, ["lora.trigger=zqx"])))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.kind=full"], "needs objective.kind = 'lora'"),
        (["objective.train_text_encoders=true"], "lora.train_bert"),
        (["lora.targets=attentoin"], "attention, attention.mlp, all-linear"),
        (["lora.targets=[]"], "empty list"),
        (["lora.train_t5=true", "data.cache.text=true"], "turn one of the two off"),
        (["lora.rnak=3"], "did you mean rank"),
    ],
)
def test_contradictions_are_told_before_anything_is_loaded(
    config: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config, overrides)


def test_a_run_is_not_written_over(config: Path, finished: Path) -> None:
    with pytest.raises(ConfigError, match="already holds a run"):
        run_training(config, f"run.output_dir={finished}")


def test_peft_names_the_same_layers(config: Path) -> None:
    """peft's own matching of the published target list finds the layers that ours finds."""
    dit = build(load_config(config)).dit
    inject_adapter_in_model(LoraConfig(target_modules=["Wqkv", "q_proj", "kv_proj", "out_proj"]), dit)
    found = adapter_parameters({"dit": dit}, LoraSection())
    assert set(found) == set(objective_of(config).parameters())


def test_what_few_pictures_leave_of_a_validation_batch_measures_them_at_other_timesteps(config: Path) -> None:
    """The same losses as one by one, of fewer batches."""
    objective, found, calls = objective_of(config), {}, Counter[int]()
    inputs = objective.inputs
    for size in (1, 4, 5):
        data = open_data(load_config(config, [f"run.batch_size={size}", "data.validation=2"]))
        objective.inputs = lambda *given, size=size: calls.update([size]) or inputs(*given)
        alone = distributed.Processes(0, 1, torch.device("cpu"))
        found[size] = validate(objective, data, alone, contextlib.nullcontext, count=3)
    assert calls == {1: 6, 4: 2, 5: 2}
    assert found[4] == pytest.approx(found[1], rel=1e-4) and found[5] == pytest.approx(found[1], rel=1e-4)
