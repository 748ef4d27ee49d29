"""The discrete noise schedule and the timesteps that a sampling run visits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ConfigError
from ..facts import SPACINGS, DiffusionConfig


class Schedule:
    """A scaled-linear DDPM schedule: ``x_t = alpha_t x_0 + sigma_t noise``, ``alpha_t^2 + sigma_t^2 = 1``.

    ``beta_t = linspace(sqrt(beta_start), sqrt(beta_end), T)^2`` (latent diffusion, Rombach et al. 2022),
    without zero terminal SNR. All tables are float64 on the CPU, of shape (T,); values are cast where they
    are used.

    Attributes:
        betas: beta_t.
        alphas_cumprod: alpha_t^2, the running product of 1 - beta_t.
        alphas_cumprod_prev: alpha_{t-1}^2, with 1 before t = 0.
        sigmas: sigma_t / alpha_t, the noise level in the samplers' scaling (ascending in t).
        posterior_log_variance: log of the variance of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7). At t =
            0 that variance is 0; the value of t = 1 stands in for it (Nichol & Dhariwal 2021).
    """

    def __init__(self, config: DiffusionConfig):
        steps = config.num_train_timesteps
        self.config = config
        self.betas = (
            torch.linspace(config.beta_start**0.5, config.beta_end**0.5, steps, dtype=torch.float64) ** 2
        )
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        self.alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        self.sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        self.log_sigmas = self.sigmas.log()
        variance = self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_log_variance = torch.cat([variance[1:2], variance[1:]]).log()
        # log_sigmas on the devices that asked for it: copied once, not at every step
        self._moved: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # At integer timesteps: training.

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t of integer timesteps (B,): float32, to broadcast over ``like`` (B, ...)."""
        return (
            table_at(self.alphas_cumprod.sqrt(), t, like),
            table_at((1 - self.alphas_cumprod).sqrt(), t, like),
        )

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t = alpha_t x0 + sigma_t noise`` in float32; x0 and noise (B, ...), t (B,) integers."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0.float() + sigma * noise.float()

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio (alpha_t / sigma_t)^2 of integer timesteps (B,), float32 (B,)."""
        return table_at(self.sigmas**-2, t, t)

    # Between timesteps and sigmas: sampling.

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """The timestep whose sigma is nearest in log scale: float32, the shape of ``sigma``, whole numbers.

        Whole numbers, because the model was trained on no others.
        """
        table = self._moved.get(sigma.device)
        if table is None:
            table = self.log_sigmas.to(torch.float32).to(sigma.device, non_blocking=True)
            self._moved[sigma.device] = table
        distance = (sigma.float().log().unsqueeze(-1) - table).abs()
        return distance.argmin(dim=-1).to(torch.float32)

    def t_to_sigma(self, t: Tensor | float) -> Tensor:
        """sigma of a timestep in 0..T-1, fractional ones interpolated in log scale; float64 on the CPU."""
        t = torch.as_tensor(t, dtype=torch.float64, device="cpu").clamp(0, len(self) - 1)
        low = t.floor().long()
        high = t.ceil().long()
        return torch.lerp(self.log_sigmas[low], self.log_sigmas[high], t - low).exp()

    def timesteps(self, spacing: str, steps: int) -> Tensor:
        """The ``steps`` timesteps of a run, descending, int64 (steps,).

        * ``leading``: ``i * (T // steps) + 1`` (DDPM and DDIM in diffusers with ``steps_offset=1``; Tencent).
        * ``linspace``: ``round(i * (T - 1) / steps)``, i from 1 (DPM-Solver++ in diffusers; Tencent).
        * ``trailing``: ``round(T - i * T / steps) - 1`` (Lin et al. 2024, table 2).

        Halves are rounded to even, as numpy does. Raises ConfigError for another spacing or too many steps.
        """
        total = len(self)
        limit = total if spacing == "trailing" else total - 1
        if spacing not in SPACINGS:
            raise ConfigError(f"unknown spacing {spacing!r}: use one of {', '.join(SPACINGS)}")
        if not 1 <= steps <= limit:
            raise ConfigError(f"{steps} steps with {spacing!r} spacing: use 1 to {limit}")
        index = torch.arange(steps, dtype=torch.float64)
        if spacing == "leading":
            t = (index * (total // steps) + 1).flip(0)
        elif spacing == "linspace":
            t = ((steps - index) * ((total - 1) / steps)).round()
        else:
            # The stride as numpy.arange takes it, rounding included: it decides the halves as in diffusers.
            stride = (total - total / steps) - total
            t = (total + index * stride).round() - 1
        return t.long()

    def sigmas_for(self, spacing: str, steps: int, strength: float = 1.0) -> Tensor:
        """Sigmas of a run, descending and ending in 0: float32 (n + 1,).

        ``strength`` below 1 keeps the last ``int(steps * strength)`` of the ``steps`` steps, for a start
        from a noised picture (diffusers' img2img rule); n is then that number. Raises ConfigError if no
        step is left.
        """
        if not 0 < strength <= 1:
            raise ConfigError(
                f"strength {strength}: use a number above 0 (keeps the picture) up to 1 (replaces it)"
            )
        kept = int(steps * strength)
        if kept < 1:
            least = math.ceil(1000 / steps) / 1000
            raise ConfigError(f"strength {strength} of {steps} steps leaves no step: use at least {least:g}")
        sigmas = self.sigmas[self.timesteps(spacing, steps)[steps - kept :]]
        return torch.cat([sigmas, sigmas.new_zeros(1)]).to(torch.float32)


def table_at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """``table[t]`` in float32 on the device of ``like``, shaped to broadcast over ``like`` (B, ...)."""
    # Cast before the transfer: some devices have no float64. The host does not wait for it.
    values = table.to(torch.float32).to(like.device, non_blocking=True)[t.to(like.device)]
    return values.view(-1, *[1] * (like.ndim - 1))


def timestep_range(start: float, end: float, steps: int = 1000) -> tuple[float, float]:
    """The largest and the smallest timestep between two fractions of the schedule, as ComfyUI has them."""
    first = float("inf") if start <= 0 else (1 - start) * (steps - 1)
    last = float("-inf") if end >= 1 else (1 - end) * (steps - 1)
    return first, last
