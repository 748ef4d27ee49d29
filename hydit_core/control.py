"""ControlNets in a run: the pictures that they follow, weights for each layer, and when they act."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from .diffusion.schedule import timestep_range
from .errors import ConfigError, WeightsError
from .layer_weights import LayerWeights
from .model.config import DiTConfig
from .model.controlnet import ControlNet, combine_controls
from .model.trunk import Context
from .untrusted import parse_json

if TYPE_CHECKING:
    from .weights.source import TensorSource

CONTROL_KEY = "hydit.control"
"""Metadata key of a ControlNet's file: how its control pictures are made, as JSON (``kind``, thresholds)."""


@dataclass(frozen=True)
class ControlInput:
    """A ControlNet and the picture that it follows.

    Args:
        net: on any device; the pipeline moves it.
        image: the control picture itself (edges, depth ...), scaled and cropped to the size that is drawn.
        weights: of its residuals, see :class:`~.layer_weights.LayerWeights`.
        start, end: fractions of the noise schedule between which it acts, 0 (pure noise) to 1 (finished), as
            ComfyUI counts them.

    Raises :class:`ConfigError` unless 0 <= start <= end <= 1.
    """

    net: ControlNet
    image: Image.Image
    weights: LayerWeights = field(default_factory=LayerWeights)
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise ConfigError(
                f"control start {self.start:g} and end {self.end:g}: use 0 <= start <= end <= 1"
            )


def picture_facts(source: TensorSource) -> dict[str, Any]:
    """How a ControlNet's control pictures are made, if its file says so: ``kind``, canny's ``low``, ``high``.

    Raises :class:`WeightsError` for impossible values.
    """
    text = source.metadata.get(CONTROL_KEY)
    if text is None:
        return {}
    where = f"{source.path}: metadata {CONTROL_KEY!r}"
    facts: dict[str, Any] = parse_json(text, where)
    for name in facts.keys() & {"low", "high"}:
        if type(facts[name]) is not int or not 0 <= facts[name] <= 255:
            raise WeightsError(f"{where}: {name} is {facts[name]!r}; a threshold of canny is 0 to 255")
    if not isinstance(facts.get("kind", ""), str):
        raise WeightsError(f"{where}: kind is {facts['kind']!r}; expected a text such as 'canny'")
    return facts


_SHARED = ("hidden_size", "depth", "in_channels", "patch_size", "text_len", "t5_len", "text_dim", "t5_dim")


def check_fit(net: DiTConfig, base: DiTConfig, who: str = "the ControlNet") -> None:
    """Raise :class:`ConfigError` unless a ControlNet has the dimensions of the DiT that it is to control."""
    wrong = [
        f"{name} {getattr(net, name)} instead of {getattr(base, name)}"
        for name in _SHARED
        if getattr(net, name) != getattr(base, name)
    ]
    if wrong:
        raise ConfigError(f"{who} does not fit this HunyuanDiT: {', '.join(wrong)}; both must have one size")


@dataclass(frozen=True)
class PreparedControl:
    """A :class:`ControlInput` for one run: hint latents (1, C, h, w), its own context (B rows), weights."""

    net: ControlNet
    hint: Tensor
    context: Context
    weights: Sequence[float]
    first_t: float
    last_t: float

    def acts(self, t: float) -> bool:
        """Whether it changes anything at timestep ``t``."""
        return self.last_t <= t <= self.first_t and any(self.weights)


class Controls:
    """The sum of several ControlNets' residuals."""

    def __init__(self, controls: Sequence[PreparedControl]):
        self.controls = controls

    def __call__(self, x: Tensor, t: Tensor, now: float) -> list[Tensor] | None:
        """Residuals for the DiT at x (B, C, h, w) and t (B,), all equal; None if no ControlNet acts then.

        Fewer rows than were prepared are the last of them. ``now`` is the timestep once more: reading it from
        ``t`` would let the host wait for the device.
        """
        acting = [control for control in self.controls if control.acts(now)]
        if not acting:
            return None
        return combine_controls(
            [
                (
                    c.net(x.to(c.net.dtype), t, c.context.last(len(x)), c.hint.expand(len(x), -1, -1, -1)),
                    c.weights,
                )
                for c in acting
            ]
        )


def prepare(control: ControlInput, hint: Tensor, context: Context) -> PreparedControl:
    """A :class:`ControlInput` with its encoded picture and, by its own projections, the encoded prompts.

    Raises :class:`ConfigError` if it has the wrong number of weights.
    """
    weights = control.weights.resolve(control.net.config.num_controls)
    first, last = timestep_range(control.start, control.end)
    return PreparedControl(control.net, hint, context, weights, first, last)
