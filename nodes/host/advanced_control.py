"""What CONTROL_NETs of Advanced-ControlNet have besides a picture, by name: the pack need not be there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import interpolate

Cut = Callable[[Tensor], Tensor]
"""From a mask (B, H, W) as large as the picture that is drawn to a part of it."""


def cut_masks(control: Any, width: int, height: int, cut: Cut) -> None:
    """Give a copy of a CONTROL_NET its part of all masks: its own, its keyframes', and its weights'.

    They are scaled to ``width`` x ``height`` first, as the pack scales them to what is drawn. What they are
    in is replaced, because all copies of a CONTROL_NET share it.
    """

    def part(mask: Tensor | None) -> Tensor | None:
        if mask is None:
            return None
        planes = mask.reshape(-1, 1, *mask.shape[-2:])
        return cut(interpolate(planes, size=(height, width), mode="bilinear")[:, 0])

    def weights(given: Any) -> Any:
        return given and _with(given, weight_mask=part(given.weight_mask))

    def keyframe(given: Any) -> Any:
        return _with(
            given, mask_hint_orig=part(given.mask_hint_orig), control_weights=weights(given.control_weights)
        )

    if not hasattr(control, "timestep_keyframes"):
        return
    control.mask_cond_hint_original = part(control.mask_cond_hint_original)
    control.weights_override = weights(control.weights_override)
    frames = control.timestep_keyframes
    control.timestep_keyframes = _with(frames, keyframes=[keyframe(one) for one in frames.keyframes])


def _with(given: Any, **values: Any) -> Any:
    """A shallow copy with other values."""
    given = copy.copy(given)
    for name, value in values.items():
        setattr(given, name, value)
    return given
