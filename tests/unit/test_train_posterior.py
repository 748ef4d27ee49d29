"""Which latents a run trains on, and what its file says of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from train_setup import records, run_training, tiny_vae, write_run

from hydit_core.facts import ModelInfo
from hydit_core.train.config import load_config
from hydit_core.train.draws import validation_draws
from hydit_core.train.dryrun import describe
from hydit_core.train.launch import open_data
from hydit_core.train.parts import open_base, open_vae
from hydit_core.train.posterior import choose, posterior_widths
from hydit_core.weights.load import load_dit
from hydit_core.weights.vae_layout import diffusers_to_ldm

ASSET = Path(__file__).resolve().parents[2] / "hydit_core/assets/hydit-icons-128.safetensors"
ONE_STEP = ["run.steps=1", "schedule.warmup_steps=0", "data.validation=2", "validation.every=1"]


def write_vae(path: Path, log_variance: float) -> None:
    """A VAE whose posterior has this log-variance in channel 2, and next to none in the others."""
    vae = tiny_vae()
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = torch.tensor([-30.0, -30.0, log_variance, -30.0])
    save_file(diffusers_to_ldm(vae.state_dict()), path)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("posterior"))


def choice_of(config: Path, *overrides: str, info: ModelInfo | None = None):
    settings = load_config(config, list(overrides))
    vae = open_vae(settings, open_base(settings))
    return choose(settings, info or ModelInfo.published("v1.2"), open_data(settings), vae)


def test_the_width_is_the_posteriors_over_the_latents() -> None:
    means = torch.tensor([[0.0, 2.0, 4.0, 6.0], [1.0, 1.0, 1.0, 1.4]])
    log_variances = torch.tensor([[0.0, 0.0, math.log(3), math.log(3)], [-60.0] * 4])
    whole = torch.cat([means, log_variances]).reshape(4, 2, 2)
    halves = [whole[:, :1], whole[:, 1:]]
    for moments in ([whole], halves):
        found = posterior_widths(moments)
        assert found[0].item() == pytest.approx(math.sqrt(2) / math.sqrt(20 / 3))
        assert found[1].item() == pytest.approx(math.exp(-15) / 0.2, rel=1e-5)


@pytest.mark.parametrize(("log_variance", "kind"), [(-20.0, "sample"), (4.0, "mode")])
@pytest.mark.parametrize("cached", ["true", "false"])
def test_a_silent_base_is_measured(
    config: Path, tmp_path: Path, log_variance: float, kind: str, cached: str
) -> None:
    """With the pictures or with cached latents; the export says what was done, and its loss is so."""
    write_vae(tmp_path / "vae.safetensors", log_variance)
    options = [f"model.vae={tmp_path / 'vae.safetensors'}", f"run.output_dir={tmp_path / 'run'}"]
    options += ONE_STEP
    options += [f"data.cache.latents={cached}", f"data.cache.dir={tmp_path / 'cache'}"]
    options += ["data.cache.dtype=float32"]
    choice = choice_of(config, *options)
    assert choice.kind == kind and "channel 2" in choice.reason
    assert run_training(config, *options)
    assert load_dit(tmp_path / "run" / "model.safetensors")[1].posterior == kind

    other = {"sample": "mode", "mode": "sample"}[kind]
    turned = tmp_path / "turned"
    assert run_training(config, *options, f"run.output_dir={turned}", f"data.posterior={other}")
    one, two = (records(folder)[0]["val_loss"] for folder in (tmp_path / "run", turned))
    assert (abs(one - two) > 0.05) == (kind == "mode")  # nobody sees that a narrow posterior is sampled


def test_a_base_that_says_it_is_followed_unless_its_vae_is_replaced(config: Path, tmp_path: Path) -> None:
    said = ModelInfo(version="v1.2", posterior="sample")
    assert choice_of(config, info=said).kind == "mode"  # from scratch: there is no base
    run = write_file_run(tmp_path, ASSET)
    assert choice_of(run, info=said).line.endswith("as the base was trained")
    assert choice_of(run, info=ModelInfo(version="v1.2", posterior="mode")).kind == "mode"
    write_vae(tmp_path / "vae.safetensors", 4.0)
    assert choice_of(run, f"model.vae={tmp_path / 'vae.safetensors'}", info=said).kind == "mode"
    asked = choice_of(run, "data.posterior=mode", info=said)
    assert asked == ("mode", "as configured, though the base was trained with 'sample'")


def write_file_run(folder: Path, model: Path) -> Path:
    write_run(folder)
    path = folder / "base.toml"
    path.write_text(
        f"""
[model]
init_from = '{model}'
[data]
sources = [{{ path = "pictures" }}]
resolution = 64
[run]
output_dir = "run"
steps = 1
batch_size = 2
device = "cpu"
""",
        encoding="utf-8",
    )
    return path


def test_the_embedded_model_is_trained_as_it_was(tmp_path: Path) -> None:
    """Its file says how."""
    lines = list(describe(load_config(write_file_run(tmp_path, ASSET))))
    (line,) = [line for line in lines if "latents:" in line]
    assert line.endswith("the mean of the VAE's posterior, as the base was trained")


def test_validation_samples_the_posterior_by_the_picture() -> None:
    plain = validation_draws(["a", "b"], [0, 1], 2, (4, 2, 2))
    drawn = validation_draws(["b"], [1], 2, (4, 2, 2), sample_posterior=True)
    assert not plain.posterior_noise.any()
    assert torch.equal(drawn.noise[0], plain.noise[1])
    again = validation_draws(["a", "b"], [0, 1], 2, (4, 2, 2), sample_posterior=True)
    assert torch.equal(again.posterior_noise[1], drawn.posterior_noise[0])
    assert not torch.equal(drawn.posterior_noise, drawn.noise) and drawn.posterior_noise.any()


def test_conversion_keeps_what_a_file_says(tmp_path: Path) -> None:
    info = ModelInfo(version="v1.2", posterior="mode")
    assert ModelInfo.from_metadata({"hydit.config": info.to_json()}, version="v1.2") == info
