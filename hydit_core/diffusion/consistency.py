"""Multistep consistency distillation: what a student that takes few steps is to predict.

The noise schedule is cut into phases. A consistency function takes any point of a probability-flow trajectory
to the start of its phase in one call: multistep consistency models (Heek et al. 2024, arXiv:2403.06807),
phased consistency models (Wang et al. 2024, arXiv:2405.18407). With one phase, every point goes to the clean
picture: latent consistency models (Luo et al. 2023, arXiv:2310.04378).

The function is one DDIM step with the student's prediction, so that it leaves the start of a phase where it
is without further parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from .denoiser import predict_x0, prediction_target
from .schedule import Schedule, table_at

Predict = Callable[[Tensor, Tensor], Tensor]
"""``(x_t (B, C, H, W), t (B,)) -> prediction (B, C, H, W)`` in float32, without variance channels."""


class Phases:
    """The phases of a schedule, and the teacher's steps inside them.

    A phase ends at a timestep of a run of ``count`` steps with ``trailing`` spacing; it starts where the one
    before it ends, the first one at the clean picture, which is timestep -1. The teacher goes from t to
    ``t - T / teacher_steps``, or to the start of its phase if that is nearer.

    Attributes:
        starts: the start of the phase of each timestep, int64 (T,).
        earlier: where the teacher's step from each timestep ends, int64 (T,).

    Raises:
        ConfigError: there are fewer teacher's steps than phases, or more than timesteps.
    """

    def __init__(self, schedule: Schedule, count: int, teacher_steps: int) -> None:
        total = len(schedule)
        if not 1 <= count <= teacher_steps <= total:
            raise ConfigError(
                f"{count} phases with {teacher_steps} steps of the teacher: use at least as many steps as "
                f"phases, and at most {total}"
            )
        self.schedule = schedule
        t = torch.arange(total)
        ends = schedule.timesteps("trailing", count).flip(0)  # ascending, up to T - 1
        self.starts = torch.cat([ends.new_tensor([-1]), ends[:-1]])[torch.searchsorted(ends, t)]
        self.earlier = torch.maximum(t - math.ceil(total / teacher_steps), self.starts)
        self._back = _Steps.between(schedule, t, self.earlier)
        self._on = _Steps.between(schedule, self.earlier, self.starts)
        self._whole = _Steps.between(schedule, t, self.starts)

    @torch.no_grad()
    def target(self, x_t: Tensor, t: Tensor, teacher: Predict, student: Predict) -> Tensor:
        """What the student is to predict at ``x_t`` (B, C, H, W) and ``t`` (B,), float32.

        The teacher takes one step back; the student as it is now goes on from there to the start of the
        phase. The target is the prediction that would have led there at once.
        """
        kind = self.schedule.config.prediction
        alpha, sigma = self.schedule.alpha_sigma(t, x_t)
        x_s = self._back.take(x_t, predict_x0(teacher(x_t, t), x_t, alpha, sigma, kind), t)
        # A clean x_s is already at the start: what the student says of timestep 0 there counts nothing.
        s = self.earlier.to(t.device)[t].clamp(min=0)
        levels = self.schedule.alpha_sigma(s, x_s)
        there = self._on.take(x_s, predict_x0(student(x_s, s), x_s, *levels, kind), t)
        x0 = self._whole.x0_for(x_t, there, t)
        return prediction_target(x0, (x_t - alpha * x0) / sigma, alpha, sigma, kind)


class _Steps(NamedTuple):
    """DDIM's step for each timestep t, ``kept[t] x + gained[t] x0``: float64, (T,).

    Both are computed in double precision, because levels that are close nearly cancel.
    """

    kept: Tensor
    gained: Tensor

    @classmethod
    def between(cls, schedule: Schedule, start: Tensor, end: Tensor) -> _Steps:
        """From timesteps ``start`` to ``end``, both (T,), -1 being clean."""
        cumprod = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod])
        alpha, sigma = cumprod.sqrt(), (1 - cumprod).sqrt()
        kept = torch.where(start == end, 1.0, sigma[end + 1] / sigma[start + 1])
        return cls(kept, alpha[end + 1] - alpha[start + 1] * kept)

    def take(self, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """``x`` after the step, if ``x0`` are the clean latents that are seen."""
        return table_at(self.kept, t, x) * x + table_at(self.gained, t, x) * x0

    def x0_for(self, x: Tensor, there: Tensor, t: Tensor) -> Tensor:
        """The ``x0`` with which the step ends ``there``."""
        return table_at(1 / self.gained, t, x) * there - table_at(self.kept / self.gained, t, x) * x
