"""What a training run does to the model and to the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from train_setup import needs_muon, records, run_training, write_run

import hydit_core
from hydit_core.diffusion.losses import diffusion_loss
from hydit_core.diffusion.schedule import Schedule
from hydit_core.errors import ConfigError, HyditError
from hydit_core.train import loop
from hydit_core.train.__main__ import main
from hydit_core.train.config import load_config
from hydit_core.train.draws import TrainingDraws
from hydit_core.train.launch import open_data
from hydit_core.train.objectives.full import FullObjective
from hydit_core.train.parts import build

FLAT = ["schedule.kind=constant", "schedule.warmup_steps=0"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with validation and sample pictures."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run_training(
        config,
        *FLAT,
        f"run.output_dir={folder}",
        "run.steps=3",
        "validation.every=3",
        "samples.every=3",
        'samples.prompts=["cat", "小鸟"]',
        "samples.steps=2",
        "samples.cfg=1.5",
        "checkpoint.export_dtype=fp32",
    )
    return folder


def weights(run: Path, step: int, part: str = "weights") -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step_{step:08d}/{part}.safetensors")


def test_it_learns_four_pictures(config: Path, tmp_path: Path) -> None:
    run_training(
        config,
        *FLAT,
        f"run.output_dir={tmp_path}",
        "run.steps=120",
        "run.grad_accumulation=1",
        "run.batch_size=4",
        "data.validation=4",
        "data.cache.latents=true",
        f"data.cache.dir={tmp_path / 'cache'}",
        "data.posterior=mode",
        "optimizer.lr=3e-3",
        "objective.noise_offset=0",
        "objective.dropout_joint=0",
        "metrics.every=20",
        "ema.enabled=false",
    )
    losses = [record["mse"] for record in records(tmp_path)]
    assert losses[-1] < 0.55 * losses[0], losses


def test_records_validation_and_samples(finished: Path) -> None:
    lines = records(finished, without=())
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3]
    assert {"loss", "mse", "vlb", "grad_norm", "lr", "seconds"} <= lines[1].keys()
    assert {"val_loss", "val_mse", "val_vlb"} <= lines[0].keys()
    assert {"val_loss", "val_loss_ema"} <= lines[-1].keys()
    assert lines[1]["loss"] == pytest.approx(lines[1]["mse"] + lines[1]["vlb"], abs=2e-6)
    # A fresh model answers 0: its squared error is the mean square of v.
    assert 0.1 < lines[0]["val_mse"] < 2
    for step in (0, 3):
        with Image.open(finished / f"samples/step_{step:08d}.png") as sheet:
            assert sheet.size == (128, 64)


def test_the_export_is_the_average_and_opens_in_generate(finished: Path) -> None:
    pipeline = hydit_core.load(finished / "model.safetensors", dtype="float32", device="cpu")
    average, raw = weights(finished, 3, "ema"), weights(finished, 3)
    name = "blocks.1.mlp.fc1.weight"
    stored = pipeline.dit.state_dict()[name]
    assert torch.equal(stored, average[f"dit.{name}"]) and not torch.equal(stored, raw[f"dit.{name}"])
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(pipeline.text.bert.state_dict()[name], average[f"text.bert.{name}"])
    assert (pipeline.info.defaults.width, pipeline.info.version) == (64, "v1.2")
    assert pipeline.vae.scaling_factor == 0.13025
    assert pipeline("cat", negative="", steps=2, sampler="euler")[0].size == (64, 64)


def test_init_from_takes_weights_and_nothing_else(config: Path, finished: Path, tmp_path: Path) -> None:
    text = config.read_text(encoding="utf-8")
    start, end = text.index("[model]"), text.index("[data]")
    second = config.with_name("second.toml")
    model = f"[model]\ninit_from = {json.dumps(str(finished / 'model.safetensors'))}\n\n"
    second.write_text(text[:start] + model + text[end:], encoding="utf-8")
    run_training(second, *FLAT, f"run.output_dir={tmp_path}", "run.steps=1", "optimizer.lr=1e-12")
    begun, average = weights(tmp_path, 1), weights(finished, 3, "ema")
    assert begun.keys() == average.keys()
    for name, tensor in average.items():
        torch.testing.assert_close(begun[name], tensor, rtol=0, atol=1e-9)
    state = json.loads((tmp_path / "checkpoints/step_00000001/state.json").read_text())
    assert state["progress"]["step"] == 1 and state["progress"]["ema_updates"] == 1
    pipeline = hydit_core.load(tmp_path / "model.safetensors", dtype="float32", device="cpu")
    assert pipeline.info.base == "model.safetensors"


def test_groups_freeze_and_scale(config: Path, tmp_path: Path) -> None:
    groups = '[{match="dit.blocks.0.*", freeze=true}, {match="text.*", lr_scale=0.0}]'
    sets = (*FLAT, f"run.output_dir={tmp_path}", "run.steps=2", f"optimizer.groups={groups}")
    run_training(config, *sets)
    fresh = FullObjective(build(load_config(config)), load_config(config).objective, torch.device("cpu"))
    trained, average = weights(tmp_path, 2), weights(tmp_path, 2, "ema")
    moved = {n for n, p in fresh.parameters().items() if not torch.equal(p.detach(), trained[n])}
    assert not any(name.startswith(("dit.blocks.0.", "text.")) for name in moved)
    assert "dit.blocks.2.mlp.fc2.bias" in moved
    assert not any(name.startswith("dit.blocks.0.") for name in average)


@pytest.mark.parametrize("name", [needs_muon("muon")])
def test_muon_trains(config: Path, tmp_path: Path, name: str) -> None:
    sets = (*FLAT, f"run.output_dir={tmp_path}", "run.steps=2", f"optimizer.name={name}")
    run_training(config, *sets, stop_after_micro=3)
    assert run_training(config, *sets, resume="auto")
    keys = load_file(tmp_path / "checkpoints/step_00000002/optimizer.safetensors").keys()
    assert "dit.blocks.1.mlp.fc1.weight|momentum_buffer" in keys
    assert "dit.x_embedder.proj.weight|exp_avg" in keys


def test_checkpointing_activations_changes_nothing(config: Path, tmp_path: Path) -> None:
    for name, value in (("plain", "false"), ("half", "0.5")):
        sets = (f"run.output_dir={tmp_path / name}", f"run.gradient_checkpointing={value}", "run.steps=1")
        run_training(config, *FLAT, *sets)
    plain, half = weights(tmp_path / "plain", 1), weights(tmp_path / "half", 1)
    assert all(torch.equal(plain[name], half[name]) for name in plain)


@pytest.mark.parametrize("trained", [True, False])
def test_the_loss_is_the_formula(config: Path, trained: bool) -> None:
    """The objective's inputs and losses against every step done by hand."""
    settings = load_config(config, [f"objective.train_text_encoders={str(trained).lower()}"])
    data, parts = open_data(settings), build(settings)
    objective = FullObjective(parts, settings.objective, torch.device("cpu"))
    with torch.no_grad():
        for parameter in parts.dit.final_layer.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    batch = data.batch(0)
    draws = TrainingDraws(settings.objective, 0, 2)(0, [0, 1], objective.latent_shape(batch))
    draws.drop_bert[0] = draws.drop_t5[1] = True
    found = objective.module(**objective.inputs(batch, draws))

    moments = parts.vae.encode_moments(batch.pixels)
    mean, log_variance = moments.chunk(2, 1)
    latents = (mean + (log_variance / 2).exp() * draws.posterior_noise) * 0.13025
    betas = torch.linspace(0.00085**0.5, 0.018**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)
    a, s = (x.float().view(-1, 1, 1, 1) for x in (abar[draws.t].sqrt(), (1 - abar[draws.t]).sqrt()))
    features = parts.text.encode(["", batch.captions[1]], [batch.captions[0], ""])
    with torch.no_grad():
        output = parts.dit(a * latents + s * draws.noise, draws.t, parts.dit.encode_context(*features))
    mse = (output[:, :4] - (a * draws.noise - s * latents)).square().mean((1, 2, 3))
    torch.testing.assert_close(found.mse, mse, rtol=1e-4, atol=1e-6)
    schedule = Schedule(parts.info.diffusion)
    torch.testing.assert_close(
        found.vlb, diffusion_loss(output, latents, draws.noise, draws.t, schedule).vlb, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(found.loss, found.mse + found.vlb)
    found.loss.sum().backward()
    reached = any(p.grad is not None and p.grad.any() for p in parts.text.parameters())
    assert reached == trained


# -- what goes wrong ---------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_is_left_out_and_named(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = FullObjective.inputs

    def poisoned(self: FullObjective, batch, draws):  # type: ignore[no-untyped-def]
        inputs = original(self, batch, draws)
        if batch.step == 1:  # the second micro-batch of the first step
            inputs["latents"][0, 0, 0, 0] = float("nan")
            poisoned.key = batch.keys[0]
        return inputs

    monkeypatch.setattr(FullObjective, "inputs", poisoned)
    assert run_training(config, *FLAT, f"run.output_dir={tmp_path}", "run.steps=2")
    text = capsys.readouterr().err
    assert "step 1: not finite" in text and poisoned.key in text
    skip = records(tmp_path)[0]
    assert skip == {"step": 1, "skipped": 1, "keys": [poisoned.key]}
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path, 2).values())
    state = json.loads((tmp_path / "checkpoints/step_00000002/state.json").read_text())["progress"]
    assert (state["skipped"], state["bad_in_a_row"], state["ema_updates"]) == (1, 0, 1)


def test_pictures_that_break_off_are_named_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_run(tmp_path)
    for name in ("2.png", "3.png"):
        path = tmp_path / "pictures" / name
        path.write_bytes(path.read_bytes()[:-60])
    output = [f"run.output_dir={tmp_path / 'run'}", "data.on_unreadable=skip", "data.validation=0"]
    assert not run_training(config, *FLAT, *output, "run.steps=4", stop_after_micro=4)
    assert run_training(config, *FLAT, *output, "run.steps=4", resume="auto")
    found = [r for r in records(tmp_path / "run") if "unreadable" in r]
    assert found[-1]["unreadable"] == 2
    assert sorted(key for r in found for key in r["keys"]) == ["pictures/2.png", "pictures/3.png"]
    assert "2 pictures cannot be read so far" in capsys.readouterr().err


def test_processes_do_not_trip_over_each_others_write_test(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "touch", lambda self: None)  # another process removed it at once
    run_training(config, *FLAT, f"run.output_dir={tmp_path}", "run.steps=1")


def test_the_size_condition_is_original_trained_and_crop(config: Path) -> None:
    sets = ["model.from_scratch.size_cond=true", "model.from_scratch.style_cond=true"]
    settings = load_config(config, sets)
    data, parts = open_data(settings), build(settings)
    objective = FullObjective(parts, settings.objective, torch.device("cpu"))
    batch = data.batch(0)
    draws = TrainingDraws(settings.objective, 0, 2)(0, [0, 1], objective.latent_shape(batch))
    inputs = objective.inputs(batch, draws)
    left = [int(x) for x in batch.crops[:, 0]]
    assert inputs["image_meta_size"].tolist() == [[72, 64, 64, 64, x, 0] for x in left]
    for parameter in parts.dit.parameters():
        torch.nn.init.normal_(parameter.data, std=0.05, generator=torch.Generator().manual_seed(0))
    first = objective.module(**inputs).loss
    inputs["image_meta_size"] = inputs["image_meta_size"] * 2
    assert parts.info.version == "v1.1" and parts.info.diffusion.beta_end == 0.03
    assert not torch.equal(first, objective.module(**inputs).loss)


def test_many_bad_steps_in_a_row_stop_the_run(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.Trainer, "_autocast", lambda self: _Poison(self.objective.module))
    with pytest.raises(HyditError, match=r"2 in a row.*max_bad_steps = 2.*optimizer\.lr"):
        run_training(config, *FLAT, f"run.output_dir={tmp_path}", "run.max_bad_steps=2")
    assert not (tmp_path / "checkpoints").exists()


class _Poison:
    """A context in which the model's answers are not finite."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.hook = self.module.dit.register_forward_hook(lambda m, args, out: out * float("inf"))

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


def test_dry_run_tells_and_touches_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in config.parent.rglob("*")}
    arguments = [str(config), "--dry-run"]
    for value in (
        f"run.output_dir={tmp_path / 'out'}",
        "data.cache.latents=true",
        f"data.cache.dir={tmp_path / 'cache'}",
        "model.from_scratch.t5_len=4",
    ):
        arguments += ["--set", value]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    for words in ("6 to train, 2 for validation", "64x64: 6", "captions are cut", "trained:", "activations:"):
        assert words in told, words
    assert list(tmp_path.iterdir()) == []
    assert {p: p.stat().st_mtime_ns for p in config.parent.rglob("*")} == before


def test_bad_input_at_the_command_line(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(config.read_text(encoding="utf-8").replace("batch_size", "batchsize"), encoding="utf-8")
    assert main([str(wrong)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "did you mean batch_size?" in told
    assert main(["report", str(tmp_path / "absent")]) == 2
    assert "absent: no such folder" in capsys.readouterr().err


def test_captions_that_are_cut_are_told(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = (f"run.output_dir={tmp_path}", "model.from_scratch.text_len=4", "run.steps=1")
    run_training(config, *FLAT, *sets)
    told = capsys.readouterr().err
    assert "warning: 4 of 8 captions are longer than the 4 tokens that BERT takes" in told
    assert "mT5 takes" not in told


def test_cache_command_then_training_needs_no_pictures(config: Path, tmp_path: Path) -> None:
    sets = ["data.cache.latents=true", "data.cache.text=true", f"data.cache.dir={tmp_path / 'cache'}"]
    sets += ["objective.train_text_encoders=false", *FLAT]
    assert main(["cache", str(config), *(word for value in sets for word in ("--set", value))]) == 0
    for name in ("first", "second"):
        run_training(config, *sets, f"run.output_dir={tmp_path / name}", "run.steps=1")
    run_training(config, *sets[3:], f"run.output_dir={tmp_path / 'online'}", "run.steps=1")
    cached, again, online = (records(tmp_path / name)[0] for name in ("first", "second", "online"))
    assert cached == again
    # The cache crops at the center and keeps 16 bits.
    assert cached["loss"] == pytest.approx(online["loss"], rel=0.05) and cached != online


def test_report_is_a_table_and_a_picture(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(finished), "--out", str(tmp_path / "losses.png")]) == 0
    told = capsys.readouterr().out
    first = records(finished)[1]
    assert f"{first['loss']:.5g}" in told and "val_loss_ema" in told and "3 steps" in told
    with Image.open(tmp_path / "losses.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 3


def test_output_inside_the_pictures_or_not_writable_is_refused(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="inside the picture folder"):
        run_training(config, f"run.output_dir={config.parent / 'pictures/run'}")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run\.output_dir: cannot write"):
        run_training(config, f"run.output_dir={tmp_path / 'file/run'}")
