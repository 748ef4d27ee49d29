"""What a run is refused for before anything is loaded or written: by the dry run and by training alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import TINY_V11, write_tiny_model
from train_setup import run_training, write_run

from hydit_core.errors import ConfigError, HyditError
from hydit_core.train import checks
from hydit_core.train.config import TrainConfig, load_config
from hydit_core.train.dryrun import describe
from hydit_core.train.launch import build_caches, train


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("checks"))


def refusals(config: Path, *overrides: str) -> list[str]:
    """What the dry run and the training say, at least one of which must be an error."""
    said = []
    for start in (
        lambda: list(describe(load_config(config, list(overrides)))),
        lambda: run_training(config, *overrides),
    ):
        try:
            start()
            said.append("")
        except HyditError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("start", [train, build_caches])
def test_torch_gets_the_threads_that_are_asked_for(
    config: Path, start: Callable[[TrainConfig], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for threads in ([], ["run.threads=3"]):  # refused after that, before anything is loaded
        sets = ["run.device=gpu", "data.cache.latents=true", *threads]
        loaded = load_config(config, sets)
        if not threads:
            loaded = loaded.model_copy(update={"run": loaded.run.model_copy(update={"threads": None})})
        with pytest.raises(ConfigError, match="not a device name"):
            start(loaded)
    assert asked == [3]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["run.device=gpu"], "run.device = 'gpu': not a device name"),
        (["run.device=meta"], "run.device: device 'meta' cannot be used here"),
        (["run.output_dir=pictures/run"], "the run would be written to"),
        (["data.cache.latents=true", "data.cache.dir=pictures/cache"], "the cache would be written to"),
        (["run.output_dir=vocab.txt"], "run.output_dir: cannot write to"),
        (["run.output_dir=vocab.txt/run"], "vocab.txt is a file"),
        (["data.cache.latents=true", "data.cache.dir=vocab.txt/cache"], "data.cache.dir: cannot write to"),
        (["model.from_scratch.out_channels=4"], "objective.vlb: the DiT has 4 output channels"),
        (["model.from_scratch.text_dim=64"], "BERT's features have 32 values, the DiT takes 64"),
        (["model.from_scratch.t5_dim=64"], "mT5's features have 32 values, the DiT takes 64"),
        (
            ["model.from_scratch.in_channels=8", "model.from_scratch.out_channels=16"],
            "model.vae: the VAE's latents have 4 channels, the DiT takes 8",
        ),
        (["model.text_encoders.bert.hiden_size=32"], "unknown key; did you mean hidden_size?"),
        (["model.text_encoders.bert.num_attention_heads=3"], "model.text_encoders: cannot be built so"),
        (["model.text_encoders.bert.hidden_size=true"], "model.text_encoders: cannot be built so"),
        (["model.info.diffusion.num_train_timesteps=10"], "has room for 9 with 'leading' spacing"),
        (["model.text_encoders.t5.num_heads=0"], "model.text_encoders: cannot be built so"),
        (["samples.every=1", 'samples.prompts=["a"]', "samples.steps=1000"], "samples: 1000 steps"),
        (["samples.every=1", 'samples.prompts=["a"]', "model.info.defaults.width=72"], ""),
        (["model.info.diffusion.beta_start=0.5"], "model.info"),
        (["model.vae=train.toml"], "train.toml"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_the_dry_run_refuses_what_training_does(
    config: Path, overrides: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(config.parent)
    before = _files(config.parent)
    short = ["run.steps=1", "schedule.warmup_steps=0", *overrides]
    if not words:
        short.append("run.output_dir=fine")
    dry, real = refusals(config, *short)
    assert words in dry and dry == real
    assert not words or _files(config.parent) == before


def _files(folder: Path) -> list[Path]:
    """All but the one that locks a run's folder, which may stay."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def test_what_a_controlnet_lacks_is_told_by_both(tmp_path: Path, tiny_model_file: Path) -> None:
    write_run(tmp_path)
    other = tmp_path / "other.safetensors"
    write_tiny_model(other, TINY_V11)
    config = tmp_path / "control.toml"
    config.write_text(
        f"""
[model]
init_from = '{tiny_model_file}'
[data]
sources = [{{ path = "pictures" }}]
resolution = 64
control = {{ kind = "canny" }}
[objective]
kind = "controlnet"
[samples]
every = 1
prompts = ["a"]
control_images = ["vocab.txt"]
[run]
output_dir = "run"
steps = 1
batch_size = 2
device = "cpu"
""",
        encoding="utf-8",
    )
    for overrides, words in (
        ([], "samples.control_images: cannot read"),
        (["samples.every=0", f"objective.controlnet={other}"], "other.safetensors"),
        (['data.control={kind="depth", model="/nowhere"}'], "data.control.model: /nowhere is no folder"),
    ):
        dry, real = refusals(config, *overrides)
        assert words in dry and dry == real
    assert not _files(tmp_path / "run")


def test_no_permission_is_told_without_writing(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(checks.os, "access", lambda path, mode: asked.append((path, mode)))
    monkeypatch.chdir(config.parent)
    with pytest.raises(ConfigError, match=r"run\.output_dir: cannot write .*: no permission to write to"):
        list(describe(load_config(config, ["run.output_dir=new/run"])))
    assert asked == [(config.parent, os.W_OK | os.X_OK)] and not Path("new").exists()


def test_missing_libraries_and_devices_are_told_by_both(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(config.parent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dry, real = refusals(config, "run.device=cuda:1", "run.output_dir=new")
    assert dry == real == "run.device = 'cuda:1': torch sees no CUDA device; use cpu or auto"
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    dry, real = refusals(config, "optimizer.name=muon", "run.output_dir=new")
    assert "needs torch 2.9" in dry and dry == real
    with pytest.raises(ConfigError, match="the cache would be written"):
        build_caches(load_config(config, ["data.cache.latents=true", "data.cache.dir=pictures/cache"]))
    assert not Path("new").exists()
