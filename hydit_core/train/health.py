"""Whether training goes well: each step's loss and gradient norm against what they usually are."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

_RECENT = 10
"""Steps that a median is taken over: single losses vary widely with their timesteps."""
_SETTLED = 20
"""Steps before medians are judged."""
_USUAL_OVER = 100
"""Steps that "usual" averages over."""
_LOSS_FACTOR, _NORM_FACTOR, _SINGLE_FACTOR = 4.0, 10.0, 100.0
_TINY = 1e-12


@dataclass
class Health:
    """A judgement of the run so far, to be kept in its checkpoints.

    A step is bad if its update was left out, if the median loss of the last ten steps is more than 4 times
    the usual one (the gradient norm: 10 times), or if its own is more than 100 times it. What is usual is
    the geometric mean of some hundred good steps: bad ones never become usual.
    """

    steps: int = 0
    """Good steps seen."""
    usual: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Mean logarithms of loss and gradient norm."""
    recent: list[list[float]] = field(default_factory=list)
    """(loss, gradient norm) of the last finite steps."""
    trouble: str = ""
    """What is wrong with the last step; empty: nothing."""

    def observe(self, loss: float, norm: float) -> None:
        """Judge one step."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.trouble = "the last step was not finite"
            return
        self.recent = [*self.recent, [loss, norm]][-_RECENT:]
        self.trouble = self._judge(loss, norm)
        if not self.trouble:
            self.steps += 1
            share = 1 / min(self.steps, _USUAL_OVER)
            for index, value in enumerate((loss, norm)):
                self.usual[index] += share * (math.log(max(value, _TINY)) - self.usual[index])

    def _judge(self, loss: float, norm: float) -> str:
        if not self.steps:
            return ""
        kinds = (("loss", _LOSS_FACTOR, loss), ("gradient norm", _NORM_FACTOR, norm))
        for index, (name, factor, value) in enumerate(kinds):
            usual = math.exp(self.usual[index])
            if value > _SINGLE_FACTOR * usual:
                return f"{name} {value:.3g}, usually {usual:.3g}"
            median = statistics.median(pair[index] for pair in self.recent)
            if self.steps >= _SETTLED and len(self.recent) == _RECENT and median > factor * usual:
                return f"{name} {median:.3g} in the last {_RECENT} steps, usually {usual:.3g}"
        return ""

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Health:
        """The inverse of :func:`dataclasses.asdict`; a new one for a checkpoint without a record."""
        return cls(**state) if state else cls()
