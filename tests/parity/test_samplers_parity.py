"""Whole sampling runs against diffusers' schedulers, driven the way its HunyuanDiT pipeline drives them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import rescale_noise_cfg

from hydit_core.diffusion.denoiser import Denoiser
from hydit_core.diffusion.guidance import GuidedDenoiser
from hydit_core.diffusion.samplers import SAMPLERS, start_latents
from hydit_core.diffusion.schedule import Schedule
from hydit_core.facts import DiffusionConfig

SHAPE = (2, 4, 12, 8)
SEED = 7
TOLERANCE = {10: 1e-5, 50: 3e-5}

# name -> diffusers class, its options, the arguments of its step, our spacing, our options
CASES = {
    "ddpm": (DDPMScheduler, {"variance_type": "fixed_small"}, {}, "leading", {}),
    "ddim": (DDIMScheduler, {}, {"eta": 0.0}, "leading", {"eta": 0.0}),
    "ddim-eta-0.5": (DDIMScheduler, {}, {"eta": 0.5}, "leading", {"eta": 0.5}),
    "ddim-eta-1": (DDIMScheduler, {}, {"eta": 1.0}, "leading", {"eta": 1.0}),
    "ddim-trailing": (DDIMScheduler, {"timestep_spacing": "trailing", "steps_offset": 0}, {}, "trailing", {}),
    "ddpm-trailing": (DDPMScheduler, {"timestep_spacing": "trailing", "steps_offset": 0}, {}, "trailing", {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}, {}, "linspace", {}),
    "euler": (EulerDiscreteScheduler, {"timestep_spacing": "leading"}, {}, "leading", {}),
}


def network():
    """A small nonlinear function of (x_t, t, condition (B,)) with outputs of order one, 8 channels."""
    g = torch.Generator().manual_seed(1)
    first = torch.randn(16, 4, 3, 3, generator=g) / 6
    second = torch.randn(8, 16, 3, 3, generator=g) / 12
    per_condition = torch.randn(2, 16, generator=g)

    def forward(x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        phase = torch.arange(16) * 0.7 + t[:, None] * 0.004
        bias = phase.sin() + 0.3 * per_condition[condition]
        hidden = torch.tanh(F.conv2d(x, first, padding=1) + bias[:, :, None, None])
        return F.conv2d(hidden, second, padding=1) + 0.3 * x.repeat(1, 2, 1, 1)

    return forward


def diffusers_scheduler(name: str, beta_end: float, prediction: str):
    cls, options, _, _, _ = CASES[name]
    config = {
        "beta_start": 0.00085,
        "beta_end": beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": {"v": "v_prediction"}.get(prediction, prediction),
        "steps_offset": 1,
    }
    if cls in (DDPMScheduler, DDIMScheduler):
        config["clip_sample"] = False
    return cls(**{**config, **options})


def run_diffusers(name, steps, beta_end, scale, rescale, prediction="v", first=0, init=None):
    """The pipeline's loop; with ``init``, its img2img: noise ``init`` and run from step ``first`` on."""
    scheduler = diffusers_scheduler(name, beta_end, prediction)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[first:]
    generator = torch.Generator().manual_seed(SEED)
    latents = torch.randn(SHAPE, generator=generator)
    if init is None:
        latents = latents * scheduler.init_noise_sigma
    else:
        if hasattr(scheduler, "set_begin_index"):  # those that count their steps
            scheduler.set_begin_index(first)
        latents = scheduler.add_noise(init, latents, timesteps[:1].repeat(SHAPE[0]))
    step_args = CASES[name][2]
    if isinstance(scheduler, (DDPMScheduler, DDIMScheduler)):
        step_args = {**step_args, "generator": generator}
    net = network()
    batch = SHAPE[0]
    for t in timesteps:
        x_t = scheduler.scale_model_input(latents, t)
        ts = t.float().expand(batch)
        cond = output = net(x_t, ts, torch.ones(batch, dtype=torch.long))[:, :4]
        if scale != 1:
            uncond = net(x_t, ts, torch.zeros(batch, dtype=torch.long))[:, :4]
            output = uncond + scale * (cond - uncond)
        if rescale:
            output = rescale_noise_cfg(output, cond, guidance_rescale=rescale)
        latents = scheduler.step(output, t, latents, **step_args, return_dict=False)[0]
    return latents


def our_denoiser(schedule: Schedule, scale: float, rescale: float) -> Denoiser:
    net = network()
    batch = SHAPE[0]
    if scale == 1:
        return Denoiser(lambda x, t: net(x, t, torch.ones(batch, dtype=torch.long)), schedule)
    both = torch.arange(2).repeat_interleave(batch)  # [uncond, cond]
    return GuidedDenoiser(lambda x, t: net(x, t, both), schedule, scale, rescale)


def run_ours(name, steps, beta_end, scale, rescale, prediction="v", strength=1.0, init=None):
    schedule = Schedule(DiffusionConfig(beta_end=beta_end, prediction=prediction))
    *_, spacing, options = CASES[name]
    sigmas = schedule.sigmas_for(spacing, steps, strength)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(SEED))
    return SAMPLERS[name.split("-")[0]](
        our_denoiser(schedule, scale, rescale),
        start_latents(noise, sigmas, init),
        sigmas,
        extra_args={"seed": SEED},
        disable=True,
        **options,
    )


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.std()).item()


@pytest.mark.parametrize("scale, rescale", [(1.0, 0.0), (6.0, 0.0), (6.0, 0.7)])
@pytest.mark.parametrize("beta_end", [0.018, 0.03])
@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("name", CASES)
def test_run_equals_diffusers(name, steps, beta_end, scale, rescale):
    theirs = run_diffusers(name, steps, beta_end, scale, rescale)
    ours = run_ours(name, steps, beta_end, scale, rescale)
    assert error(ours, theirs) <= TOLERANCE[steps]


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp_2m"])
def test_other_predictions_equal_diffusers(name, prediction):
    theirs = run_diffusers(name, 10, 0.018, 3.0, 0.5, prediction)
    ours = run_ours(name, 10, 0.018, 3.0, 0.5, prediction)
    assert error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp_2m", "euler"])
@pytest.mark.parametrize("strength, steps_left", [(0.6, 6), (0.25, 2), (1.0, 10)])
def test_image_to_image_equals_diffusers(name, strength, steps_left):
    init = 0.8 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    ours = run_ours(name, 10, 0.018, 6.0, 0.0, strength=strength, init=init)
    theirs = run_diffusers(name, 10, 0.018, 6.0, 0.0, first=10 - steps_left, init=init)
    assert error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("prediction", ["v", "epsilon"])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_lcm_equals_diffusers(steps, prediction):
    """At our timesteps; from t = 100 on its c_skip and c_out, which we leave out, are 0 and 1 to 1e-6."""
    schedule = Schedule(DiffusionConfig(prediction=prediction))
    scheduler = LCMScheduler(
        beta_start=0.00085,
        beta_end=0.018,
        prediction_type={"v": "v_prediction"}.get(prediction, prediction),
        original_inference_steps=1000,
    )
    scheduler.set_timesteps(
        timesteps=schedule.timesteps("trailing", steps).tolist(), original_inference_steps=1000
    )
    net, batch = network(), SHAPE[0]
    generator = torch.Generator().manual_seed(SEED)
    latents = torch.randn(SHAPE, generator=generator)
    for t in scheduler.timesteps:
        output = net(latents, t.float().expand(batch), torch.ones(batch, dtype=torch.long))[:, :4]
        latents = scheduler.step(output, t, latents, generator=generator, return_dict=False)[0]
    sigmas = schedule.sigmas_for("trailing", steps)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(SEED))
    ours = SAMPLERS["lcm"](
        our_denoiser(schedule, 1.0, 0.0),
        start_latents(noise, sigmas),
        sigmas,
        extra_args={"seed": SEED},
        disable=True,
    )
    assert error(ours, latents) <= 3e-5


def test_comparison_notices_a_wrong_run():
    """The tolerance is far below what one wrong detail costs."""
    theirs = run_diffusers("ddpm", 10, 0.018, 6.0, 0.7)
    assert error(run_ours("ddpm", 10, 0.02, 6.0, 0.7), theirs) > 1e-3  # beta_end
    assert error(run_ours("ddpm", 10, 0.018, 6.0, 0.65), theirs) > 1e-3  # rescale
    assert error(run_ours("ddim-eta-0.5", 10, 0.018, 6.0, 0.7), theirs) > 1e-3  # variance
    assert error(run_ours("dpmpp_2m", 10, 0.018, 6.0, 0.7), theirs) > 1e-3  # sampler and spacing
