"""Masks and prior pictures in a training run: what is computed is what is configured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from train_setup import command_line, records, run_training, write_run

from hydit_core.diffusion.losses import diffusion_loss
from hydit_core.train.config import TrainConfig, load_config
from hydit_core.train.draws import TrainingDraws
from hydit_core.train.launch import open_data
from hydit_core.train.objectives.full import FullObjective
from hydit_core.train.parts import build

MASKED = ["data.mask.kind=files", "data.mask.outside=0.1"]
PRIOR = 'data.sources=[{path="pictures"}, {path="known", caption="cat", prior=true}]'
FLAT = ["schedule.kind=constant", "schedule.warmup_steps=0", "objective.train_text_encoders=false"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in whose pictures the drawn circle counts; three more pictures have no captions, nor masks."""
    monkeypatch.chdir(tmp_path)  # where the paths of PRIOR start
    path = write_run(tmp_path)
    (tmp_path / "pictures" / "mask").mkdir()
    (tmp_path / "known").mkdir()
    for index in range(8):
        mask = Image.new("L", (72, 64))
        ImageDraw.Draw(mask).ellipse((8, 8, 40 + 3 * index, 56), fill=255)
        mask.save(tmp_path / "pictures" / "mask" / f"{index}.png")
    for index in range(3):
        Image.new("RGB", (64, 64), (60 * index, 90, 200)).save(tmp_path / "known" / f"{index}.png")
    return path


def opened(config: Path, *overrides: str) -> TrainConfig:
    return load_config(config, [*FLAT, *overrides])


@pytest.mark.parametrize("cached", [False, True])
def test_the_loss_is_that_of_the_mask(config: Path, cached: bool) -> None:
    settings = opened(config, *MASKED, f"data.cache.latents={str(cached).lower()}")
    parts = build(settings)
    data = open_data(settings)
    if cached:
        from hydit_core.data.cache.latents import build_latent_cache, open_latent_cache

        folder = config.parent / "cache"
        build_latent_cache(data, parts.vae, folder=folder)
        data.use_latents(open_latent_cache(data, parts.vae, folder=folder))
    objective = FullObjective(parts, settings.objective, torch.device("cpu"))
    with torch.no_grad():
        for parameter in parts.dit.final_layer.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    batch = data.batch(0)
    draws = TrainingDraws(settings.objective, 0, 2)(0, [0, 1], objective.latent_shape(batch))
    inputs = objective.inputs(batch, draws)
    mask = inputs.pop("mask")
    assert mask.shape == (2, 1, 8, 8) and 0.1 <= float(mask.min()) < 0.11 and float(mask.max()) > 0.9
    found = objective.module(**inputs, mask=mask)

    features = inputs["text"]
    with torch.no_grad():
        context = parts.dit.encode_context(*features)
        x_t = objective.schedule.add_noise(inputs["latents"], draws.noise, draws.t)
        output = parts.dit(x_t, draws.t, context)
    expected = diffusion_loss(output, inputs["latents"], draws.noise, draws.t, objective.schedule, mask=mask)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    plain = objective.module(**inputs)
    assert not torch.allclose(found.mse, plain.mse, rtol=1e-3)


def test_the_step_counts_prior_pictures_as_configured(config: Path) -> None:
    """The recorded loss is the weighted mean of the batch's own losses."""
    more = [
        *MASKED,
        PRIOR,
        "data.prior.weight=0.2",
        "run.steps=1",
        "run.batch_size=8",
        "run.grad_accumulation=1",
    ]
    settings = opened(config, *more)
    objective = FullObjective(build(settings), settings.objective, torch.device("cpu"))
    batch = open_data(settings).batch(0)
    weights = torch.tensor([0.2 if key.startswith("known/") else 1.0 for key in batch.keys])
    assert 0 < int((weights == 1).sum()) < 8
    # This VAE's posterior is wide, so that its mean is trained on.
    draw = TrainingDraws(settings.objective, 0, 8, sample_posterior=False)
    draws = draw(0, list(range(8)), objective.latent_shape(batch))
    with torch.no_grad():
        expected = float((objective.module(**objective.inputs(batch, draws)).loss * weights).mean())

    assert run_training(config, *FLAT, *more)
    assert records(config.parent / "run")[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_dry_run_tells_of_both(config: Path) -> None:
    done = command_line(config, "--dry-run", "--set", PRIOR, "--set", MASKED[0], cwd=config.parent)
    assert done.returncode == 0, done.stderr
    assert "  of prior pictures: 6\n" in done.stdout and "masks: 8\n" in done.stdout


def test_a_run_with_both_can_be_interrupted_and_continued(config: Path) -> None:
    more = [*FLAT, *MASKED, PRIOR, "run.steps=6", "validation.every=3", "data.cache.latents=true"]
    more.append(f"data.cache.dir={config.parent / 'cache'}")
    straight, broken = config.parent / "straight", config.parent / "broken"
    assert run_training(config, *more, f"run.output_dir={straight}")
    assert not run_training(config, *more, f"run.output_dir={broken}", stop_after_micro=5)
    assert run_training(config, *more, f"run.output_dir={broken}", resume="auto")
    assert records(broken) == records(straight)
    assert "val_loss" in {name for record in records(straight) for name in record}
