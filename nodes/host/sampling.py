"""hydit_core's samplers, schedules and guidance inside ComfyUI's sampling."""

from __future__ import annotations

import functools
import inspect
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...hydit_core.diffusion.denoiser import predict_x0, prediction_target
from ...hydit_core.diffusion.guidance import guide, last_guided
from ...hydit_core.diffusion.samplers import SAMPLERS, Generators, draw_noise, noise_sampler_from
from ...hydit_core.diffusion.schedule import Schedule
from ...hydit_core.errors import ConfigError, HyditError
from ...hydit_core.facts import ModelInfo, SamplingDefaults
from ...hydit_core.finite import is_finite, why_not_finite
from ...hydit_core.presets import (
    check_cfg_end,
    check_sampler,
    check_seed,
    check_settings,
    choose_settings,
    distilled_advice,
    size_advice,
)
from .model import model_info

log = logging.getLogger(__name__)

DOWNSCALE = 8
"""Side of a picture divided by the side of its latents."""

_RELEASES = ("v1.0", "v1.1", "v1.2")
_DOWNSCALE_KEYS = ("downscale_ratio_spacial", "downscale_ratio_temporal")


# -- latents -------------------------------------------------------------------------------------------------


def empty_latent(width: int, height: int, batch_size: int) -> dict[str, Any]:
    """A LATENT of zeros (B, 4, height / 8, width / 8). Raises ConfigError for a size that does not fit."""
    check_settings(SamplingDefaults(width=width, height=height), DOWNSCALE)
    management = comfy.model_management
    # 0.3.64 has no separate dtype for what nodes pass to each other.
    dtype = getattr(management, "intermediate_dtype", lambda: torch.float32)()
    shape = (batch_size, 4, height // DOWNSCALE, width // DOWNSCALE)
    latent: dict[str, Any] = {
        "samples": torch.zeros(shape, device=management.intermediate_device(), dtype=dtype)
    }
    if _DOWNSCALE_KEYS[0] in _fix_parameters():
        latent[_DOWNSCALE_KEYS[0]] = DOWNSCALE
    return latent


def _fix_parameters() -> set[str]:
    return set(inspect.signature(comfy.sample.fix_empty_latent_channels).parameters)


def usable_latents(model: Any, latent: dict[str, Any]) -> Tensor:
    """The latents (B, C, h, w) of a LATENT; empty ones of another shape are made to fit, as in ComfyUI.

    Raises HyditError for what is not a picture's latents, or another model family's.
    """
    samples = latent["samples"]
    if samples.is_nested or samples.ndim != 4 or 0 in samples.shape:
        found = "nested" if samples.is_nested else f"of shape {tuple(samples.shape)}"
        raise HyditError(
            f"the latent is {found}; expected (batch, channels, height / 8, width / 8) of a picture: "
            "use HyDiTEmptyLatent, or encode a picture with this model's VAE"
        )
    hints = {key: latent.get(key) for key in _DOWNSCALE_KEYS if key in _fix_parameters()}
    samples = comfy.sample.fix_empty_latent_channels(model, samples, **hints)
    channels = model.get_model_object("latent_format").latent_channels
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise HyditError(
            f"the latent has {samples.shape[1]} channels, this model's have {channels}: it comes from "
            "another model family; encode the picture with this model's VAE, or use HyDiTEmptyLatent"
        )
    return samples


# -- sigmas --------------------------------------------------------------------------------------------------


def model_sigmas(model: Any, spacing: str, steps: int, denoise: float = 1.0) -> Tensor:
    """The sigmas of a run on a MODEL, descending to 0: float32 (n + 1,) on the CPU.

    They are the model's own sigmas (those that ModelSamplingDiscrete set, if it did) at the timesteps of
    :meth:`Schedule.timesteps`. ``denoise`` below 1 keeps the last ``int(steps * denoise)`` steps; 0 gives no
    sigmas, which leaves latents as they are, as with ComfyUI's own schedulers.

    Raises:
        HyditError: the MODEL is not a HunyuanDiT.
        ConfigError: steps, spacing or denoise are out of range.
    """
    schedule = Schedule(model_info(model).diffusion)
    if denoise == 0:
        return torch.zeros(0)
    if not 0 < denoise <= 1 or (steps > 0 and int(steps * denoise) < 1):
        least = math.ceil(1000 / max(steps, 1)) / 1000
        raise ConfigError(
            f"denoise {denoise:g} of {steps} steps leaves no step: use {least:g} to 1, or 0 for none"
        )
    sampling = model.get_model_object("model_sampling")
    table = sampling.sigmas
    if len(table) != len(schedule):  # LCM's table has every 20th
        table = sampling.sigma(torch.arange(len(schedule), device=table.device))
    schedule.sigmas = table.double().cpu()
    return schedule.sigmas_for(spacing, steps, denoise)


# -- guidance ------------------------------------------------------------------------------------------------


def with_guidance_rescale(model: Any, rescale: float) -> Any:
    """A clone of a MODEL whose guidance is rescaled on the network's prediction (see ``guide``).

    A guidance function that the MODEL already has is kept, and its result is rescaled.
    """
    model = model.clone()
    before = model.model_options.get("sampler_cfg_function")

    def guidance(args: dict[str, Any]) -> Tensor:
        x, sigma = args["input"], args["sigma"]
        view = _PredictionView(args["model"].model_sampling, x, sigma)
        cond = view.prediction(args["cond_denoised"])
        if before is None:
            uncond = view.prediction(args["uncond_denoised"])
            guided = guide(uncond, cond, args["cond_scale"], rescale)
        else:
            # At scale 0 `guide` takes its first argument as the guided prediction.
            guided = guide(view.prediction(x - before(args)), cond, 0.0, rescale)
        return x - view.denoised(guided)

    model.set_model_sampler_cfg_function(guidance)
    return model


def with_guidance_at_first(model: Any, sigmas: Tensor, share: float) -> Any:
    """A clone of a MODEL that guides only the first ``share`` of a run's steps (see ``last_guided``)."""
    model = model.clone()
    last = last_guided(sigmas, share)

    def predict(executor: Any, x: Tensor, timestep: Tensor, *rest: Any, **options: Any) -> Tensor:
        guider = executor.class_obj
        before = guider.cfg
        if float(timestep.flatten()[0]) < last:
            guider.cfg = 1.0  # ComfyUI then leaves the negative prompt out
        try:
            return executor(x, timestep, *rest, **options)
        finally:
            guider.cfg = before

    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, "hydit_cfg_end", predict)
    return model


class _PredictionView:
    """Converts between denoised latents, which ComfyUI's guidance gets, and the network's prediction."""

    def __init__(self, sampling: Any, x: Tensor, sigma: Tensor) -> None:
        kinds = {
            comfy.model_sampling.V_PREDICTION: "v",
            comfy.model_sampling.X0: "sample",
            comfy.model_sampling.EPS: "epsilon",  # last, because the others are its subclasses
        }
        kind = next((name for cls, name in kinds.items() if isinstance(sampling, cls)), None)
        if kind is None:
            found = ", ".join(cls.__name__ for cls in type(sampling).__bases__)
            raise HyditError(
                "guidance rescale needs a model that predicts v, epsilon or the sample; this MODEL's is "
                f"{found}: set guidance_rescale to 0"
            )
        self.kind: str = kind
        self.x = x
        self.level = sigma.view(-1, *[1] * (x.ndim - 1))
        self.alpha = (self.level**2 + 1).rsqrt()
        self.sigma = self.level * self.alpha

    def prediction(self, denoised: Tensor) -> Tensor:
        noise = (self.x - denoised) / self.level
        return prediction_target(denoised, noise, self.alpha, self.sigma, self.kind)

    def denoised(self, prediction: Tensor) -> Tensor:
        return predict_x0(prediction, self.x * self.alpha, self.alpha, self.sigma, self.kind)


# -- the SAMPLER ---------------------------------------------------------------------------------------------


class HyDiTKSAMPLER(comfy.samplers.KSAMPLER):
    """A SAMPLER that runs one of hydit_core's samplers.

    What it does beyond ComfyUI's own:

    * An empty latent starts from unit noise, as in Tencent's pipeline and diffusers, even if the first sigma
      is not the largest. Pictures and masks keep ComfyUI's scaling.
    * Step noise continues the random generators that drew the start noise, so that both are independent.
    * It stops at the first step whose values are not finite, and says where these come from.

    Args:
        name: one of ``SAMPLERS``.
        eta: noise of the ddim sampler, 0 to 1; None for the others.
        seeds: the seeds of the batch's pictures, if each has its own generator; by default they count up
            from the sampling node's seed.
    """

    def __init__(self, name: str, *, eta: float | None = None, seeds: Sequence[int] | None = None) -> None:
        super().__init__(SAMPLERS[name], {} if eta is None else {"eta": eta}, {})
        self.name = name
        self.seeds = seeds

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., Any] | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        check_sampler(model_info(model_wrap.model_patcher), self.name)  # raises for other families
        empty = latent_image is None or not torch.count_nonzero(latent_image)
        generators = start_generators(noise, extra_args.get("seed") or 0, self.seeds)
        run = _Run(
            _guarded(self.sampler_function, model_wrap.inner_model, generators),
            self.extra_options,
            self.inpaint_options,
        )
        run.unit_start = empty and denoise_mask is None
        return run.sample(
            model_wrap, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar
        )


class _Run(comfy.samplers.KSAMPLER):
    """One run. ComfyUI's own scaling starts from unit noise if it takes the sigma for the largest."""

    unit_start = False

    def max_denoise(self, model_wrap: Any, sigmas: Tensor) -> bool:
        return self.unit_start or super().max_denoise(model_wrap, sigmas)


def start_generators(noise: Tensor, seed: int, seeds: Sequence[int] | None = None) -> Generators:
    """CPU generators in the state that they were in after drawing ``noise`` (B, ...) from ``seed``.

    One generator for each picture (``seeds``, by default ``seed + i``) is tried first, then one for the
    batch, as ComfyUI's noise nodes have it. Noise of another origin gets a new generator: one seeded with
    ``seed`` could draw some of that noise again.
    """
    each = seeds or [(seed + i) % 2**64 for i in range(len(noise))]
    found = noise.detach().float().cpu()
    for candidate in (each, seed):
        generators = _generators(candidate)
        # Close, not equal: the noise may have been rounded to a shorter dtype before.
        if torch.allclose(draw_noise(noise.shape, generators), found, rtol=1e-2, atol=1e-3):
            return generators
    return _generators((seed + 0x9E3779B97F4A7C15) % 2**64)


def _generators(seeds: int | Sequence[int]) -> Generators:
    if isinstance(seeds, int):
        return torch.Generator("cpu").manual_seed(seeds)
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def _guarded(function: Callable[..., Tensor], network: Any, generators: Generators) -> Callable[..., Tensor]:
    """A sampler that continues ``generators``, can be interrupted, and refuses values that are not finite."""

    @functools.wraps(function)
    def run(
        model: Callable[..., Tensor],
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
        **options: Any,
    ) -> Tensor:
        def each_step(state: dict[str, Any]) -> None:
            # ComfyUI itself checks only in its layers, if not compiled, and when it shows progress.
            comfy.model_management.throw_exception_if_processing_interrupted()
            if not is_finite(state["denoised"]):
                dtype = network.manual_cast_dtype or network.get_dtype()
                levels = state["sigma"] * x.new_ones(len(x))

                def again() -> Tensor:
                    return model(state["x"], levels, **extra_args)

                raise HyditError(
                    why_not_finite(state["i"] + 1, state["x"], network.diffusion_model, again, dtype)
                )
            if callback is not None:
                callback(state)

        continued = noise_sampler_from(x, generators)
        out = function(model, x, sigmas, extra_args, each_step, disable, noise_sampler=continued, **options)
        if not is_finite(out):
            raise HyditError(
                "the last step's latents are not finite, which the sampler made; use another sampler"
            )
        return out

    return run


# -- all of it in one call -----------------------------------------------------------------------------------


def sample(
    model: Any,
    positive: Any,
    negative: Any,
    latent: dict[str, Any],
    *,
    seed: int,
    preset: str | None = None,
    denoise: float = 1.0,
    cfg_end: float = 1.0,
    **given: Any,
) -> tuple[dict[str, Any], list[str]]:
    """What HyDiTKSampler does: sample a LATENT with the settings of the model or a preset, and give advice.

    Picture i of the batch is drawn with ``seed + i`` (``seed + batch_index[i]`` if the LATENT says which
    pictures of a batch it holds), whatever the batch, as in ``hydit_core.Pipeline``. ``given`` are fields of
    :class:`SamplingDefaults` to use instead; None leaves them.

    Raises:
        HyditError: the MODEL or the LATENT is another family's, or the network's values overflow.
        ConfigError: a setting is out of range.
    """
    info = model_info(model)
    latents = usable_latents(model, latent)
    height, width = (side * DOWNSCALE for side in latents.shape[2:])
    settings = replace(choose_settings(info.defaults, preset, **given), width=width, height=height)
    check_settings(settings, DOWNSCALE, info)
    check_cfg_end(cfg_end)
    notes = _advice(info, settings, preset, latents, denoise)
    for note in notes:
        log.warning("HyDiTKSampler: %s", note)

    sigmas = model_sigmas(model, settings.spacing, settings.steps, denoise)
    seeds = _seeds(latent, latents, seed)
    result = {key: value for key, value in latent.items() if key not in _DOWNSCALE_KEYS}
    if not len(sigmas):
        return result | {"samples": latents}, notes
    noise = draw_noise(latents.shape, _generators(seeds))
    if settings.guidance_rescale > 0 and settings.cfg != 1:
        model = with_guidance_rescale(model, settings.guidance_rescale)
    if cfg_end < 1:
        model = with_guidance_at_first(model, sigmas, cfg_end)
    samples = comfy.sample.sample_custom(
        model,
        noise,
        settings.cfg,
        HyDiTKSAMPLER(settings.sampler, seeds=seeds),
        sigmas,
        positive,
        negative,
        latents,
        noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return result | {"samples": samples}, notes


def _seeds(latent: dict[str, Any], latents: Tensor, seed: int) -> list[int]:
    places = list(latent.get("batch_index") or range(len(latents)))
    if len(places) != len(latents):
        raise HyditError(
            f"the latent has {len(latents)} pictures and a batch_index of {len(places)}: "
            "a node before this one changed the one without the other"
        )
    check_seed(seed, 1 + max(places))
    return [seed + place for place in places]


def _advice(
    info: ModelInfo, settings: SamplingDefaults, preset: str | None, latents: Tensor, denoise: float
) -> list[str]:
    notes = [size_advice(info.defaults, settings.width, settings.height) or ""]
    if preset in _RELEASES and (preset == "v1.2") != (info.version == "v1.2"):
        notes.append(f"preset {preset} is meant for another release than this model ({info.version})")
    if denoise < 1 and not torch.count_nonzero(latents):
        notes.append(f"denoise {denoise:g} of an empty latent: there is no picture to start from")
    return [*filter(None, notes), *distilled_advice(info, settings)]
