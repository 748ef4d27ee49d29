"""Fewer network calls: most denoised results of a long run can be foretold from those before.

:class:`Forecaster` has the contract of a denoiser, ``denoised = model(x, sigma, **extra)``, and knows nothing
of the network behind it: guidance, ControlNets and LoRAs go with it. It looks at denoised results and not at
x, so that the noise which samplers such as ddpm add does not disturb it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..errors import ConfigError

OFF, SAFE, FAST = 0.0, 0.008, 0.012
FORECASTS: dict[str, float] = {"off": OFF, "safe": SAFE, "fast": FAST}
"""Tolerances by name; docs/fast.md has the evidence."""

_PATTERNS = (
    (SAFE, ((0.3, 1), (0.5, 2), (0.84, 4), (1.0, 2))),
    (FAST, ((0.12, 1), (0.4, 2), (0.88, 4), (1.0, 2))),
    (1.0, ((0.08, 1), (0.4, 3), (0.88, 5), (1.0, 2))),
)
"""Up to which tolerance; then, up to which share of the run, of how many steps one is real. While there is
much noise the picture is decided, and the last steps go far and are mended by no others."""
_REACH = 4.0
"""How far to extrapolate, in distances between the two results that it is done from."""


def tolerance_of(choice: str | float) -> float:
    """The tolerance of a name in :data:`FORECASTS`, or of a number (as a text, too).

    Raises:
        ConfigError: another name, or no number from 0 (off) to 1.
    """
    if isinstance(choice, str) and choice in FORECASTS:
        return FORECASTS[choice]
    try:
        tolerance = float(choice)
    except (TypeError, ValueError):
        tolerance = math.nan
    if not 0 <= tolerance <= 1:
        raise ConfigError(
            f"forecast {choice!r}: use {', '.join(FORECASTS)}, or a tolerance from 0 (off) to 1"
        )
    return tolerance


class Forecaster:
    """A denoiser that answers some calls of ``model`` with an extrapolation of its last two results.

    The extrapolation is linear in sigma. Real are the calls of the first steps, of every few steps after
    them, and of the last two; how many there are depends on the tolerance. At each real call the forecast
    that would have taken its place is compared with the result: where x would have come out wrong by more
    than the tolerance, the next step is real as well. So calls are only ever added to a fixed pattern. The
    pictures of a batch share their calls: the worst one decides.

    Steps are told apart by their noise level. What a sampler with several evaluations a step asks for between
    two levels belongs to the step to the lower one, and a repeated level to the same step.

    Args:
        model: ``denoised = model(x (B, ...), sigma (B,), **extra)``; all of sigma is one number.
        sigmas: the noise levels of the run, descending, as the sampler gets them.
        tolerance: root mean square change of x by one forecast, in units of the latents (which have a
            standard deviation of about 1); 0 makes every call real.

    Attributes:
        calls: how often the present run has called this.
        real: how many of these calls reached the model.
    """

    def __init__(
        self, model: Callable[..., Tensor], sigmas: Sequence[float] | Tensor, tolerance: float
    ) -> None:
        self.model = model
        self.levels = [float(sigma) for sigma in sigmas]
        self.tolerance = tolerance
        self._pattern = next(pattern for limit, pattern in _PATTERNS if tolerance <= limit)
        self.reset()

    def reset(self) -> None:
        """Forget the run. A call at the first level does so, too, and another shape."""
        self.calls = self.real = 0
        self._known: list[tuple[float, Tensor]] = []
        self._step = 0
        self._real_until = 0
        """The last step up to which calls are real."""
        self._last_real = 0

    def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        level = float(sigma.flatten()[0])
        step = self._step_at(level)
        if self._begins_anew(step, level, x):
            self.reset()
        self._step = step
        self.calls += 1
        forecast = self._forecast(level)
        if forecast is not None and not self._must_be_real(step):
            return forecast
        self.real += 1
        denoised = self.model(x, sigma, **extra)
        # What is not finite harms too: who looks for the reason calls again.
        if forecast is not None and not self._harm(forecast, denoised, step, level) <= self.tolerance:
            self._real_until = step + 1
        self._remember(level, denoised)
        self._last_real = step
        return denoised

    def _step_at(self, level: float) -> int:
        """The step whose result moves x on from a level: 0 for the first of the run."""
        lower = sum(known > level * (1 + 1e-4) for known in self.levels[:-1])
        return min(lower, max(0, len(self.levels) - 2))

    def _begins_anew(self, step: int, level: float, x: Tensor) -> bool:
        if not self._known:
            return False
        place, result = self._known[0]
        rose = level > place * (1 + 1e-4)  # above all that is remembered: noise was added
        return (step == 0 and self._step > 0) or rose or result.shape != x.shape

    def _must_be_real(self, step: int) -> bool:
        steps = len(self.levels) - 1
        if step <= max(self._real_until, 2) or step >= steps - 2:
            return True
        stride = next(stride for share, stride in self._pattern if step < share * steps)
        return step - self._last_real >= stride

    def _forecast(self, level: float) -> Tensor | None:
        """What the last two results foretell for a level; None if it cannot be told from them."""
        if self.tolerance == 0 or len(self._known) < 2:
            return None
        (older, before), (newer, last) = self._known
        reach = (level - newer) / (newer - older)
        return last + (last - before) * reach if abs(reach) <= _REACH else None

    def _harm(self, forecast: Tensor, denoised: Tensor, step: int, level: float) -> float:
        """By how much the next x would be wrong if the forecast had been used: the worst of the batch, RMS.

        A step from sigma to sigma' moves x to ``x sigma' / sigma + denoised (1 - sigma' / sigma)``.
        """
        error = (forecast - denoised).float().flatten(1).square().mean(1).sqrt().max()
        return float(error) * (1 - self.levels[step + 1] / level)

    def _remember(self, level: float, denoised: Tensor) -> None:
        kept = [known for known in self._known if not math.isclose(known[0], level, rel_tol=1e-6)]
        # A copy: samplers may go on calculating in what they were given.
        self._known = [*kept[-1:], (level, denoised.detach().clone())]
