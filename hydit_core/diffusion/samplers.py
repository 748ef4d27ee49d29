"""Samplers as free functions on the k-diffusion contract.

Each is ``sample(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None)`` with

* ``model(x, sigma (B,), **extra_args) -> denoised``, see :class:`~.denoiser.Denoiser`,
* ``x`` (B, C, H, W) in sigma scaling (``x_t / alpha_t``), at noise level ``sigmas[0]``,
* ``sigmas`` (n + 1,) descending, usually ending in 0,
* ``callback({"x", "i", "sigma", "sigma_hat", "denoised"})`` before each update,
* ``disable`` as tqdm's (True: no progress bar; None: none when stderr is not a terminal),
* ``noise_sampler(sigma, sigma_next) -> noise`` like x; by default it is built from ``extra_args["seed"]``.

ComfyUI's KSAMPLER calls exactly this signature, so the same functions serve there and headless.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError

Model = Callable[..., Tensor]
Callback = Callable[[dict[str, Any]], None]
NoiseSampler = Callable[[Any, Any], Tensor]
Generators = torch.Generator | Sequence[torch.Generator]


def draw_noise(shape: Sequence[int], generator: Generators, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise of ``shape`` (B, ...) on the generator's device.

    One generator draws the whole batch at once; a sequence of B generators draws one picture each, so that a
    picture does not depend on its batch (both as in diffusers).
    """
    if isinstance(generator, torch.Generator):
        return torch.randn(*shape, generator=generator, device=generator.device, dtype=dtype)
    if len(generator) != shape[0]:
        raise ConfigError(f"{len(generator)} random generators for a batch of {shape[0]}: give 1 per picture")
    return torch.stack([draw_noise(shape[1:], one, dtype) for one in generator])


def noise_sampler_from(x: Tensor, generator: Generators) -> NoiseSampler:
    """A noise sampler that continues ``generator`` (one, or one per picture); its noise is shaped like x."""

    def sample(sigma: Any, sigma_next: Any) -> Tensor:
        # The host need not wait for the copy.
        return draw_noise(x.shape, generator).to(x.device, x.dtype, non_blocking=x.device.type != "cpu")

    return sample


def default_noise_sampler(x: Tensor, seed: int | None) -> NoiseSampler:
    """The noise sampler of a run whose start noise was drawn by a CPU generator seeded with ``seed``.

    The first draw of that generator *was* the start noise, so it is skipped: starting the generator afresh
    would add the start noise once more at the first step. One seed thus gives one picture here and in
    diffusers, where one generator serves a whole run. Raises ConfigError without a seed: no draw here uses
    global random state.
    """
    if seed is None:
        raise ConfigError('a sampler that draws noise needs a noise_sampler or extra_args["seed"]')
    generator = torch.Generator("cpu").manual_seed(seed)
    draw_noise(x.shape, generator)
    return noise_sampler_from(x, generator)


def start_latents(noise: Tensor, sigmas: Tensor, init: Tensor | None = None) -> Tensor:
    """The x that a sampler starts from, in sigma scaling.

    Without ``init`` the network first sees the noise itself (unit variance), as Tencent and diffusers start:
    ``noise * sqrt(1 + sigma_0^2)``. With a clean latent ``init`` (img2img): ``init + sigma_0 * noise``.
    """
    sigma = float(sigmas[0])
    if init is None:
        return noise * (1 + sigma**2) ** 0.5
    return init + sigma * noise


@torch.no_grad()
def _integrate(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None,
    callback: Callback | None,
    disable: bool | None,
    update: Callable[[Tensor, Tensor, float, float], Tensor],
) -> Tensor:
    """The loop of all samplers here: ``x = update(x, denoised, sigma, sigma_next)`` for each pair of sigmas.

    Sigmas are Python floats in the update, so that step coefficients are computed in double precision.
    Sigmas on the CPU spare a GPU's host every wait: the model gets its sigma there, too.
    """
    levels = sigmas.tolist()
    ones = sigmas.new_ones(x.shape[0], dtype=torch.float32)
    for i in _progress(len(levels) - 1, disable):
        denoised = model(x, sigmas[i] * ones, **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = update(x, denoised, levels[i], levels[i + 1])
    return x


def _progress(n: int, disable: bool | None) -> Iterable[int]:
    if disable:
        return range(n)
    from tqdm.auto import trange

    return trange(n, disable=disable)


def sample_ddim(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16): ``eta`` 0 is deterministic, 1 is DDPM.

    In sigma scaling the step from s to s' is ``denoised + down (x - denoised) / s + up noise`` with
    ``up = eta s' sqrt(1 - s'^2 / s^2)`` and ``down^2 + up^2 = s'^2``. Raises ConfigError
    for eta outside 0..1.
    """
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta {eta}: use 0 (deterministic DDIM) to 1 (DDPM)")
    if eta > 0 and noise_sampler is None:
        noise_sampler = default_noise_sampler(x, (extra_args or {}).get("seed"))

    def update(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
        up = eta * sigma_next * max(0.0, 1 - (sigma_next / sigma) ** 2) ** 0.5
        down = (sigma_next**2 - up**2) ** 0.5
        x = denoised + (x - denoised) * (down / sigma)
        if noise_sampler is not None and up > 0:
            x = x + noise_sampler(sigma, sigma_next) * up
        return x

    return _integrate(model, x, sigmas, extra_args, callback, disable, update)


def sample_ddpm(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DDPM with the posterior's variance, ``fixed_small`` (Ho et al. 2020, eq. 7): DDIM's step with eta 1."""
    return sample_ddim(model, x, sigmas, extra_args, callback, disable, noise_sampler, eta=1.0)


def sample_euler(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Euler's method on the probability-flow ODE in sigma (Karras et al. 2022): DDIM's step with eta 0."""
    return sample_ddim(model, x, sigmas, extra_args, callback, disable, noise_sampler, eta=0.0)


def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver++(2M), midpoint (Lu et al. 2022, algorithm 2); deterministic, ``noise_sampler`` is not used.

    First order at the first step, and at the last, which goes to sigma 0 and is ``denoised`` itself.
    """
    previous: tuple[Tensor, float] | None = None

    def update(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
        nonlocal previous
        if sigma_next == sigma:  # in schedules with more steps than a distilled model has sigmas
            return x
        target = denoised
        if previous is not None and sigma_next > 0:
            older, sigma_older = previous
            # lambda = -log sigma; r = (lambda_now - lambda_older) / (lambda_next - lambda_now)
            r = math.log(sigma_older / sigma) / math.log(sigma / sigma_next)
            target = denoised + (denoised - older) / (2 * r)
        previous = denoised, sigma
        ratio = sigma_next / sigma
        return ratio * x + (1 - ratio) * target

    return _integrate(model, x, sigmas, extra_args, callback, disable, update)


def sample_lcm(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1; Luo et al. 2023), for distilled models.

    Every step goes to the clean picture and back to the next noise level with new noise: ``denoised + s'
    noise``. Other models blur with it.
    """
    if noise_sampler is None:
        noise_sampler = default_noise_sampler(x, (extra_args or {}).get("seed"))

    def update(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float) -> Tensor:
        return denoised + noise_sampler(sigma, sigma_next) * sigma_next if sigma_next > 0 else denoised

    return _integrate(model, x, sigmas, extra_args, callback, disable, update)


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "dpmpp_2m": sample_dpmpp_2m,
    "euler": sample_euler,
    "lcm": sample_lcm,
}

DEFAULT_SPACING: dict[str, str] = {
    "ddpm": "leading",
    "ddim": "leading",
    "dpmpp_2m": "linspace",
    "euler": "leading",
    "lcm": "trailing",
}
"""The spacing that Tencent pairs with each sampler; of those that it lacks, euler is the same method as ddim,
and lcm, with its few steps, has to begin at the last timestep."""
