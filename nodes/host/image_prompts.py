"""Image prompts on a MODEL: pictures in its transformer_options, and what each call of the DiT sees of them.

Which rows of a call belong to a negative prompt, and which part of a mask to its latents, travels as model
conditions: ComfyUI and packs batch these, and cut them to areas and tiles, as they do with the latents.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.conds
import comfy.utils
import torch
from torch import Tensor

from ...hydit_core.image_prompts.run import latent_mask, token_mask
from ...hydit_core.images import to_image
from ...hydit_core.model.attention import Attended, ImageContext
from ...hydit_core.tiles import Box

KEY = "hydit_images"
"""Where in transformer_options a tuple of :class:`HostPicture` stands."""
_CONDITIONS = "hydit_image_conditions"
_PREFIX = "hydit_image_"
_ROWS = f"{_PREFIX}rows"
_FINER = 2
"""Masks are so many times as fine as latents: TiledDiffusion cuts only what has not the latents' own size."""
_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class HostMask:
    """Where pictures act, ``values`` (H, W): 1 fully, 0 not at all. ``name`` is its model condition's."""

    values: Tensor
    name: str = field(default_factory=lambda: f"{_PREFIX}mask_{next(_numbers)}")

    def fitted(self, height: int, width: int) -> Tensor:
        """(1, 1, 2 height, 2 width): scaled and cropped to latents of ``height`` x ``width``."""
        size = 8 * width, 8 * height
        return latent_mask(to_image(self.values.expand(3, -1, -1)), size, 8 // _FINER)


class MaskCondition(comfy.conds.CONDRegular):
    """A fitted mask as a model condition, which ComfyUI cuts to areas."""

    def process_cond(self, batch_size: int, area: Any = None, **kwargs: Any) -> MaskCondition:
        """As ComfyUI's own; ``area`` is (height, width, top, left) in latents, None: all."""
        height, width, top, left = area or (*self.cond.shape[-2:], 0, 0)
        part = self.cut(Box(top, left, height, width)).cond
        return MaskCondition(comfy.utils.repeat_to_batch_size(part, batch_size))

    def cut(self, box: Box) -> MaskCondition:
        """The part of it for a part of the latents."""
        return MaskCondition(box.of(self.cond, _FINER))


@dataclass(frozen=True, eq=False)
class HostPicture:
    """What some blocks of a DiT attend to for one picture, between two timesteps.

    ``keys`` and ``values`` (blocks, 2, M, heads, head_dim) are for the block numbers in ``blocks``; the first
    row is for negative prompts, the second for all others. Clones of a MODEL share it.
    """

    keys: Tensor
    values: Tensor
    blocks: tuple[int, ...]
    first_t: float
    last_t: float
    mask: HostMask | None
    _placed: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: Any) -> HostPicture:
        return self  # ComfyUI copies all options with every clone

    @classmethod
    def of(
        cls, seen: Sequence[Attended | None], reach: tuple[float, float], mask: HostMask | None
    ) -> HostPicture:
        """From two rows for each block, None where there is nothing to see; kept outside the device."""
        some = {i: one for i, one in enumerate(seen) if one is not None}
        keys = torch.stack([one.keys for one in some.values()]).cpu()
        values = torch.stack([one.values for one in some.values()]).cpu()
        return cls(keys, values, tuple(some), *reach, mask)

    @property
    def always(self) -> bool:
        """Whether it acts at every timestep."""
        return math.isinf(self.first_t) and math.isinf(self.last_t)

    def placed(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values where ``like`` is, in its dtype. Copied once for a device and dtype."""
        place = like.device, like.dtype
        found = self._placed.get(place)
        if found is None:
            found = self._placed[place] = self.keys.to(*place), self.values.to(*place)
        return found


def pictures_of(options: Mapping[str, Any] | None) -> tuple[HostPicture, ...]:
    """Those in transformer_options."""
    found: tuple[HostPicture, ...] = (options or {}).get(KEY, ())
    return found


def image_conditions(
    patcher: Any, noise: Tensor, device: Any, prompt_type: str
) -> dict[str, comfy.conds.CONDRegular]:
    """What ComfyUI has to batch and cut for the image prompts of the MODEL that it samples with.

    ``prompt_type`` is "negative" for whatever ComfyUI's guiders take for a negative prompt.
    """
    options = {} if patcher is None else patcher.model_options.get("transformer_options", {})
    pictures = pictures_of(options)
    if not pictures:
        return {}
    seeing = torch.tensor([[int(prompt_type != "negative")]], device=device)
    out: dict[str, comfy.conds.CONDRegular] = {_ROWS: comfy.conds.CONDRegular(seeing)}
    for mask in {picture.mask for picture in pictures if picture.mask is not None}:
        out[mask.name] = MaskCondition(mask.fitted(*noise.shape[-2:]).to(device))
    return out


def with_conditions(options: Mapping[str, Any], conditions: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformer_options with this call's image conditions out of those that the network was given."""
    if KEY not in options:
        return options
    return {**options, _CONDITIONS: {k: v for k, v in conditions.items() if k.startswith(_PREFIX)}}


def seen_images(
    options: Mapping[str, Any], x: Tensor, t: Tensor, *, depth: int, patch: int
) -> list[ImageContext] | None:
    """What each of ``depth`` blocks attends to for latents ``x`` at timesteps ``t``; None if nothing acts."""
    pictures: Sequence[HostPicture] = pictures_of(options)
    if not all(picture.always for picture in pictures):
        now = float(t.flatten()[0])  # waits for the device
        pictures = [picture for picture in pictures if picture.last_t <= now <= picture.first_t]
    if not pictures:
        return None
    conditions = options.get(_CONDITIONS, {})
    rows = _rows(options, conditions, x)
    seen: list[list[Attended]] = [[] for _ in range(depth)]
    masks: dict[HostMask, Tensor] = {}
    for picture in pictures:
        if picture.mask is not None and picture.mask not in masks:
            masks[picture.mask] = token_mask(_mask(picture.mask, conditions, x), _FINER * patch)
        mask = None if picture.mask is None else masks[picture.mask]
        keys, values = (part[:, rows] for part in picture.placed(x))
        for i, block in enumerate(picture.blocks):
            seen[block].append(Attended(keys[i], values[i], mask))
    return [ImageContext(sets) for sets in seen]


def _rows(options: Mapping[str, Any], conditions: Mapping[str, Any], x: Tensor) -> Tensor:
    """For each row of ``x`` 1, or 0 for a negative prompt's."""
    given: Tensor | None = conditions.get(_ROWS)
    if given is not None and len(given) == len(x):
        return given.flatten()
    kinds = options.get("cond_or_uncond") or [0]
    seeing = torch.tensor([int(kind != 1) for kind in kinds], device=x.device)
    return seeing.repeat_interleave(len(x) // len(kinds))


def _mask(mask: HostMask, conditions: Mapping[str, Any], x: Tensor) -> Tensor:
    """(B, 1, 2h, 2w) for latents ``x`` (B, C, h, w)."""
    given: Tensor | None = conditions.get(mask.name)
    if given is not None and given.shape[-2:] == tuple(_FINER * side for side in x.shape[-2:]):
        return given
    return mask.fitted(*x.shape[-2:]).to(x)
