"""Schedules, samplers and whole pictures on the device, against float32 on the CPU."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from on_device import CUDA, DEVICE, PRECISIONS, SMALL, assert_close, computing, distance
from PIL import Image, ImageDraw
from tiny_models import encode, inputs, randomize, tiny
from torch import Tensor
from train_setup import ROOT, environment

import hydit_core
from hydit_core.control import ControlInput
from hydit_core.devices import choose_device
from hydit_core.diffusion.guidance import GuidedDenoiser
from hydit_core.diffusion.losses import WEIGHTINGS, diffusion_loss
from hydit_core.diffusion.samplers import (
    DEFAULT_SPACING,
    SAMPLERS,
    draw_noise,
    noise_sampler_from,
    start_latents,
)
from hydit_core.diffusion.schedule import Schedule
from hydit_core.dtypes import choose_dtype
from hydit_core.errors import ConfigError, HyditError
from hydit_core.facts import DiffusionConfig
from hydit_core.model.dit import Context, DiT
from hydit_core.pipeline import Pipeline

Figure = Callable[[str, float], None]
ASSETS = ROOT / "hydit_core" / "assets"
LORA = ASSETS / "lora" / "hydit-icons-128-delft.safetensors"
CONTROLNET = ASSETS / "controlnet" / "hydit-icons-128-canny.safetensors"
PROMPTS = ["a red apple", "一个绿色的汽车"]
STEPS = 4 if SMALL else 25
# Mean difference in levels of 255. On a CPU bfloat16 differs from float32 by 0.3 to 0.4 levels, and the
# picture of another seed by 17.
LEVELS = {"fp32": 0.1, "tf32": 0.5, "fp16": 0.5, "bf16": 2.0}


def test_schedule_and_loss(figure: Figure) -> None:
    """With timesteps, mask and weights left on the CPU, and with all on the device."""
    schedule = Schedule(DiffusionConfig())
    assert torch.equal(schedule.sigma_to_t(schedule.sigmas.float().to(DEVICE)).cpu(), torch.arange(1000.0))
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 6, 4, 8, 8, generator=generator)
    output = torch.randn(6, 8, 8, 8, generator=generator)
    mask = torch.rand(6, 1, 8, 8, generator=generator)
    t = torch.tensor([1, 2, 300, 600, 998, 999])
    for weighting in WEIGHTINGS:
        expected = diffusion_loss(output, x0, noise, t, schedule, weighting=weighting, mask=mask)
        moved = [value.to(DEVICE) for value in (output, x0, noise)]
        for times, where in ((t, mask), (t.to(DEVICE), mask.to(DEVICE))):
            found = diffusion_loss(*moved, times, schedule, weighting=weighting, mask=where)
            for name, one, other in zip(found._fields, found, expected, strict=True):
                assert_close(one, other, 1e-5, figure, name)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler(name: str, figure: Figure) -> None:
    """Eight guided steps of a random network; noise is drawn on the CPU whatever the device."""
    config, schedule = tiny(), Schedule(DiffusionConfig())
    model = DiT(config)
    randomize(model, seed=3)
    with torch.no_grad():
        model.final_layer.linear.weight *= 0.1  # else the run, which nothing ties to data, diverges
    model.eval()
    values = inputs(config, (8, 12))

    def run(device: torch.device | str) -> Tensor:
        net = model.to(device)
        context = Context(
            *(part.detach() for part in encode(net, {k: v.to(device) for k, v in values.items()}))
        )
        generators = [torch.Generator().manual_seed(seed) for seed in (7,)]
        x = draw_noise((1, 4, 8, 12), generators).to(device)
        sigmas = schedule.sigmas_for(DEFAULT_SPACING[name], 8)
        denoiser = GuidedDenoiser(lambda x_t, t: net(x_t, t, context), schedule, 3.0, 0.5)
        noise = noise_sampler_from(x, generators)
        return SAMPLERS[name](
            denoiser, start_latents(x, sigmas), sigmas.to(device), noise_sampler=noise, disable=True
        )

    expected = run("cpu")
    with computing(PRECISIONS["fp32"]):
        assert_close(run(DEVICE), expected, 1e-4, figure)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # advice about prompts and sizes
        yield


@pytest.fixture(scope="module")
def on_cpu() -> Pipeline:
    return hydit_core.load(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def moved() -> Pipeline:
    """In float32 on the device; LoRAs that a test puts in it takes off again."""
    return hydit_core.load(device=DEVICE, dtype="float32")


def hint() -> Image.Image:
    image = Image.new("RGB", (128, 128), "black")
    ImageDraw.Draw(image).ellipse((24, 30, 100, 110), outline="white", width=2)
    return image


def pixels(images: list[Image.Image]) -> Tensor:
    return torch.tensor(np.stack([np.asarray(image, dtype=np.float64) for image in images]))


def levels(found: list[Image.Image], expected: list[Image.Image]) -> float:
    return (pixels(found) - pixels(expected)).abs().mean().item()


def controlled(image: Image.Image) -> list[ControlInput]:
    net, _ = hydit_core.load_controlnet(CONTROLNET)
    return [ControlInput(net, image)]


@pytest.fixture(scope="module")
def expected_pictures(on_cpu: Pipeline) -> list[Image.Image]:
    return on_cpu(PROMPTS, steps=STEPS, seed=3, batch=2)


@pytest.mark.parametrize("name", PRECISIONS)
def test_pictures(name: str, expected_pictures: list[Image.Image], figure: Figure) -> None:
    """One seed is one picture, on the CPU and on the device."""
    pipe = hydit_core.load(device=DEVICE, dtype=PRECISIONS[name].dtype)
    with computing(PRECISIONS[name]):
        found = pipe(PROMPTS, steps=STEPS, seed=3, batch=2)
    difference = levels(found, expected_pictures)
    figure("levels", difference)
    figure("another seed", levels(expected_pictures[:1], expected_pictures[1:2]))
    assert difference <= LEVELS[name]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler"])
def test_pictures_of_other_samplers(sampler: str, on_cpu: Pipeline, moved: Pipeline, figure: Figure) -> None:
    settings = {"steps": STEPS, "seed": 5, "sampler": sampler, "guidance_rescale": 0.4}
    with computing(PRECISIONS["fp32"]):
        difference = levels(moved(PROMPTS[0], **settings), on_cpu(PROMPTS[0], **settings))
    figure("levels", difference)
    assert difference <= LEVELS["fp32"]


def test_a_picture_does_not_depend_on_its_batch(moved: Pipeline, figure: Figure) -> None:
    with computing(PRECISIONS["fp32"]):
        batch = moved(PROMPTS[0], steps=STEPS, seed=8, batch=3)
        difference = levels(moved(PROMPTS[0], steps=STEPS, seed=10), batch[2:])
        again = levels(moved(PROMPTS[0], steps=STEPS, seed=8, batch=3), batch)
    figure("alone", difference)
    figure("again", again)
    assert difference <= 0.1 and again <= 0.1


def test_the_device_is_found_by_itself() -> None:
    assert choose_device("auto").type == (DEVICE.type if CUDA else choose_device().type)
    assert choose_dtype("auto", DEVICE) == (torch.bfloat16 if CUDA else torch.float32)
    with pytest.raises(ConfigError, match="cannot be used here"):
        choose_device("cuda:99")


def test_image_to_image(on_cpu: Pipeline, moved: Pipeline, figure: Figure) -> None:
    settings = {"steps": 2 * STEPS, "seed": 2, "init_image": hint(), "strength": 0.5, "width": 96}
    with computing(PRECISIONS["fp32"]):
        difference = levels(moved(PROMPTS[0], **settings), on_cpu(PROMPTS[0], **settings))
    figure("levels", difference)
    assert difference <= LEVELS["fp32"]


def test_controlnet(on_cpu: Pipeline, moved: Pipeline, figure: Figure) -> None:
    """Loaded on the CPU: the pipeline moves it."""
    settings = {"steps": STEPS, "seed": 2, "batch": 2}
    expected = on_cpu(PROMPTS[0], controls=controlled(hint()), **settings)
    with computing(PRECISIONS["fp32"]):
        found = moved(PROMPTS[0], controls=controlled(hint()), **settings)
    difference, effect = levels(found, expected), levels(on_cpu(PROMPTS[0], **settings), expected)
    figure("levels", difference)
    figure("effect", effect)
    assert difference <= LEVELS["fp32"] and effect > 10 * difference


def test_lora(on_cpu: Pipeline, moved: Pipeline, figure: Figure) -> None:
    """The weights become those of the CPU, the picture too; taken off, they are the old ones again."""
    before = {name: p.clone() for name, p in moved.dit.state_dict().items()}
    settings = {"steps": STEPS, "seed": 2}
    for pipe in (on_cpu, moved):
        pipe.load_lora(LORA, 0.8)
    try:
        expected = on_cpu(PROMPTS[0], **settings)
        with computing(PRECISIONS["fp32"]):
            difference = levels(moved(PROMPTS[0], **settings), expected)
        apart = [distance(p, on_cpu.dit.state_dict()[name]) for name, p in moved.dit.state_dict().items()]
    finally:
        for pipe in (on_cpu, moved):
            pipe.load_lora(LORA, -0.8)
    figure("levels", difference)
    figure("weights", max(apart))
    assert moved.device.type == DEVICE.type
    assert difference <= LEVELS["fp32"] and max(apart) < 1e-6
    assert max(distance(p, before[name]) for name, p in moved.dit.state_dict().items()) < 1e-6


def test_values_that_overflow_are_told_by_their_layer(moved: Pipeline) -> None:
    bias = moved.dit.blocks[2].mlp.fc2.bias
    before = bias.data.clone()
    bias.data[0] = torch.inf
    try:
        with pytest.raises(HyditError, match=r"step 1: .* first in blocks\.2\.mlp\.fc2"):
            moved(PROMPTS[0], steps=2)
    finally:
        bias.data.copy_(before)


def test_the_command_draws_with_everything(tmp_path: Path, figure: Figure) -> None:
    hint().save(tmp_path / "edges.png")
    command = [sys.executable, "-m", "hydit_core.generate", "--prompt", "a red apple", "--steps", str(STEPS)]
    command += ["--lora", str(LORA), "--controlnet", str(CONTROLNET)]
    command += [
        "--control-image",
        str(tmp_path / "edges.png"),
        "--device",
        str(DEVICE),
        "--out",
        str(tmp_path / "out.png"),
        "--seed",
        "4",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-1500:]
    with Image.open(tmp_path / "out.png") as picture:
        spread = np.asarray(picture.convert("RGB"), dtype=float).std()
    figure("std of levels", float(spread))
    assert spread > 20
