"""Large latents in tiles, inside ComfyUI's sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.conds
import comfy.patcher_extension
import comfy.utils
import torch
from torch import Tensor

from ...hydit_core.errors import ConfigError
from ...hydit_core.images import Size
from ...hydit_core.presets import check_tile
from ...hydit_core.tiles import Box, Tiles
from .advanced_control import cut_masks
from .image_prompts import MaskCondition
from .model import model_info
from .sampling import DOWNSCALE

KEY = "hydit_tiles"
_TYPES = comfy.patcher_extension.WrappersMP


def with_tiles(model: Any, tile: Size, overlap: int) -> Any:
    """A clone of a MODEL that computes its predictions in tiles of (width, height) pixels.

    Each tile is to it a picture of its own: with its own positions and size, and its part of ControlNets'
    pictures, masks and areas. What guides, forecasts or masks the sampling sees the whole.

    Raises:
        HyditError: the MODEL is another family's.
        ConfigError: tiles of such a size or overlap cannot be.
    """
    model_info(model)
    check_tile(tile)
    if not 0 <= overlap < min(tile):
        raise ConfigError(f"overlap {overlap}: tiles of {tile[0]}x{tile[1]} can share 0 to {min(tile) - 16}")
    model = model.clone()
    size = tile[1] // DOWNSCALE, tile[0] // DOWNSCALE
    model.remove_wrappers_with_key(_TYPES.OUTER_SAMPLE, KEY)
    model.remove_wrappers_with_key(_TYPES.CALC_COND_BATCH, KEY)
    cutter = _Cutter(size, overlap // DOWNSCALE)
    model.remove_wrappers_with_key(_TYPES.PREPARE_SAMPLING, KEY)
    model.add_wrapper_with_key(_TYPES.PREPARE_SAMPLING, KEY, cutter.prepare)
    model.add_wrapper_with_key(_TYPES.OUTER_SAMPLE, KEY, cutter.run)
    model.add_wrapper_with_key(_TYPES.CALC_COND_BATCH, KEY, cutter.predict)
    return model


class _Cutter:
    """Wraps the calls for a batch of conditionings. What is cut for a run is kept until its end."""

    def __init__(self, tile: tuple[int, int], overlap: int) -> None:
        self.tile, self.overlap = tile, overlap
        self._controls: dict[tuple[int, Box], Any] = {}
        self._kept: list[Any] = []

    def prepare(self, executor: Any, model: Any, noise_shape: Any, *args: Any, **kwargs: Any) -> Any:
        """Around loading the MODEL, for which memory is wanted: a tile needs no more."""
        tile = (min(pair) for pair in zip(noise_shape[-2:], self.tile, strict=True))
        return executor(model, [*noise_shape[:-2], *tile], *args, **kwargs)

    def run(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around one run of a guider."""
        try:
            return executor(*args, **kwargs)
        finally:
            for control in self._controls.values():
                control.previous_controlnet = None  # each is in the table
                control.cleanup()
            self._controls.clear()
            self._kept.clear()

    def predict(
        self,
        executor: Callable[..., list[Tensor]],
        model: Any,
        conds: list[Any],
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any],
    ) -> list[Tensor]:
        """Denoised latents like ``x`` for each list of conditionings, tile by tile."""
        tiles = Tiles(x.shape[-2], x.shape[-1], self.tile, self.overlap)
        if len(tiles.boxes) == 1:
            return executor(model, conds, x, timestep, model_options)
        parts = []
        for box in tiles.boxes:
            cut = [None if one is None else self._cut(one, box, tiles) for one in conds]
            parts.append(executor(model, cut, box.of(x).contiguous(), timestep, model_options))
        return [tiles.blended(each) for each in zip(*parts, strict=True)]

    def _cut(self, conds: list[dict[str, Any]], box: Box, tiles: Tiles) -> list[dict[str, Any]]:
        """What of the conditionings of one kind concerns a tile."""
        found = []
        for cond in conds:
            one = cond.copy()
            if "area" in one:
                area = _overlap(one["area"], box)
                if area is None:
                    continue
                one["area"] = area
            if "mask" in one:
                one["mask"] = box.of(one["mask"])
            if one.get("control") is not None:
                one["control"] = self._control(one["control"], box, tiles)
            sized = _sized(one["model_conds"], tiles)
            one["model_conds"] = {
                name: given.cut(box) if isinstance(given, MaskCondition) else given
                for name, given in sized.items()
            }
            found.append(one)
        return found

    def _control(self, control: Any, box: Box, tiles: Tiles) -> Any:
        """A copy of a CONTROL_NET, begun as it is, whose picture and masks are their part for a tile."""
        known = self._controls.get((id(control), box))
        if known is not None:
            return known
        part = control.copy()
        height, width = DOWNSCALE * tiles.height, DOWNSCALE * tiles.width
        if control.cond_hint_original is not None:
            part.cond_hint_original = box.of(
                _scaled(control, control.cond_hint_original, width, height), DOWNSCALE
            )
        part.extra_concat_orig = [
            box.of(_scaled(control, extra, width, height), DOWNSCALE) for extra in control.extra_concat_orig
        ]
        cut_masks(part, width, height, lambda mask: box.of(mask, DOWNSCALE))
        part.timestep_range = control.timestep_range
        if hasattr(control, "model_sampling_current"):
            part.model_sampling_current = control.model_sampling_current
        if control.previous_controlnet is not None:
            part.set_previous_controlnet(self._control(control.previous_controlnet, box, tiles))
        self._controls[(id(control), box)] = part
        self._kept.append(control)  # so that no other gets its id
        return part


def _scaled(control: Any, picture: Tensor, width: int, height: int) -> Tensor:
    """As the CONTROL_NET itself would scale and crop it for the whole."""
    return comfy.utils.common_upscale(picture, width, height, control.upscale_algorithm, "center")


def _overlap(area: Any, box: Box) -> tuple[int, ...] | None:
    """The part of an area (height, width, top, left), in latents, in a tile's own places."""
    height, width, top, left = area
    above, before = max(top, box.top), max(left, box.left)
    below, after = min(top + height, box.top + box.height), min(left + width, box.left + box.width)
    if below <= above or after <= before:
        return None
    return below - above, after - before, above - box.top, before - box.left


def _sized(conds: dict[str, Any], tiles: Tiles) -> dict[str, Any]:
    """The size condition, if it is that of the whole latents, as a tile's."""
    sizes = conds.get("image_meta_size")
    if sizes is None:
        return conds
    whole = torch.tensor([DOWNSCALE * tiles.width, DOWNSCALE * tiles.height]).to(sizes.cond)
    if not torch.equal(sizes.cond[..., 2:4], whole.expand_as(sizes.cond[..., 2:4])):
        return conds
    tile = sizes.cond.clone()
    tile[..., 2], tile[..., 3] = DOWNSCALE * tiles.tile[1], DOWNSCALE * tiles.tile[0]
    return {**conds, "image_meta_size": comfy.conds.CONDRegular(tile)}
