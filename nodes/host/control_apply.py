"""Applying a CONTROL_NET to both prompts, with a weight for each layer and a mask."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import comfy.model_base
import comfy.utils
import torch
from torch import Tensor

from ...hydit_core.errors import HyditError
from ...hydit_core.layer_weights import LayerWeights

# How far the aspect ratios of two pictures may differ for them to be cropped alike: sizes are rounded
_SAME_SHAPE = 0.01


def apply_control(
    positive: list[Any],
    negative: list[Any],
    control: Any,
    image: Tensor,
    vae: Any,
    *,
    strength: float,
    weights: LayerWeights,
    start: float,
    end: float,
    mask: Tensor | None = None,
) -> tuple[list[Any], list[Any]]:
    """Both conditionings with a weighted copy of a CONTROL_NET, as ComfyUI's own node attaches one.

    ``image`` (B, H, W, 3) in [0, 1]; ``mask`` (H, W) or (B, H, W) is 1 where the ControlNet acts.

    Raises:
        HyditError: it is another model's ControlNet, would act for no time, or there is no VAE.
        ConfigError: there are not as many weights as layers.
    """
    values = weights.resolve(layer_count(control))
    if vae is None:  # as from ComfyUI's checkpoint loader for a file without one
        raise HyditError("the control picture must be encoded, and vae is empty: connect the model's VAE")
    if start > end:
        raise HyditError(
            f"start_percent {start:g} is after end_percent {end:g}: the ControlNet would never act"
        )
    if strength == 0 or not any(values):
        return positive, negative
    neutral = mask is None and all(value == 1 for value in values)
    network = None if neutral else WeightedNetwork(control.control_model, values)
    # One control for both prompts, so that they run as one batch
    controls: dict[Any, Any] = {}

    def attach(conditioning: list[Any]) -> list[Any]:
        out = []
        for features, options in conditioning:
            previous = options.get("control")
            if previous not in controls:
                steering = control.copy()
                steering.control_model = network or control.control_model
                _set_picture(steering, image[..., :3].movedim(-1, 1), mask, vae, strength, (start, end))
                controls[previous] = _checked(steering).set_previous_controlnet(previous)
            given = {"control": controls[previous], "control_apply_to_uncond": False}
            out.append([features, {**options, **given}])
        return out

    return attach(positive), attach(negative)


def layer_count(control: Any) -> int:
    """How many residuals a CONTROL_NET has; HyditError unless it is HunyuanDiT's, ours or ComfyUI's."""
    network = getattr(control, "control_model", None)
    projections = getattr(network, "after_proj_list", None)
    if projections is None:
        found = type(control).__name__ if network is None else type(network).__name__
        raise HyditError(
            f"the CONTROL_NET is {found}, not a ControlNet of HunyuanDiT; load one with HyDiTControlNetLoader"
        )
    return len(projections)


# -- weights -------------------------------------------------------------------------------------------------


class WeightedNetwork(torch.nn.Module):
    """A ControlNet's network whose residuals are multiplied layer by layer, and by a mask.

    The mask is the encoded picture's channel after those of latents. All other attributes, which packs ask a
    CONTROL_NET for, are the shared network's.
    """

    def __init__(self, network: Any, weights: Sequence[float]) -> None:
        super().__init__()
        self.network, self.weights = network, tuple(weights)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def forward(self, x: Tensor, hint: Tensor, **conditions: Any) -> dict[str, list[Tensor]]:
        """As the network's forward: ``x`` (B, C, H, W), ``hint`` (B or 1, C or C + 1, H, W)."""
        channels = x.shape[1]
        mask = self._token_mask(hint[:, channels:]) if hint.shape[1] > channels else None
        control = self.network(x=x, hint=hint[:, :channels], **conditions)
        weighted = [
            _multiply(residual, weight, mask)
            for residual, weight in zip(control["output"], self.weights, strict=True)
        ]
        return {**control, "output": weighted}

    def _token_mask(self, mask: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, N, 1): the share of each token that it covers."""
        shares = torch.nn.functional.avg_pool2d(mask, self.network.patch_size, ceil_mode=True)
        return shares.flatten(2).transpose(1, 2)


def _multiply(residual: Tensor, weight: float, mask: Tensor | None) -> Tensor:
    """``residual`` (B, N, D) * ``weight`` * ``mask``; exactly zero at 0, whatever the residual is."""
    if weight == 0:
        return torch.zeros_like(residual)
    weighted = residual if weight == 1 else residual * weight
    return weighted if mask is None else weighted * mask.to(weighted)


# -- the mask ------------------------------------------------------------------------------------------------


def _set_picture(
    control: Any, picture: Tensor, mask: Tensor | None, vae: Any, strength: float, reach: tuple[float, float]
) -> None:
    """Give ``control`` its picture (B, 3, H, W), and a mask that reaches the network as one more channel.

    A mask of the picture's shape becomes the picture's fourth channel, so that nodes that cut the picture
    into tiles cut the mask too. A mask of another shape is scaled and cropped to the latents by itself.
    """
    beside: list[Tensor] = []
    if mask is not None:
        mask = mask.reshape(-1, 1, *mask.shape[-2:]).to(picture)
        if abs(math.log(_aspect(mask) / _aspect(picture))) < _SAME_SHAPE:
            mask = comfy.utils.common_upscale(mask, picture.shape[-1], picture.shape[-2], "area", "center")
            count = math.lcm(len(picture), len(mask))
            both = (values.repeat(count // len(values), 1, 1, 1) for values in (picture, mask))
            picture = torch.cat(tuple(both), dim=1)
            vae, control.latent_format = _MaskedVae(vae), _masked(control.latent_format)
        else:
            beside.append(mask)
    control.set_cond_hint(picture, strength, reach, vae=vae, extra_concat=beside)


def _aspect(picture: Tensor) -> float:
    return picture.shape[-1] / picture.shape[-2]


class _MaskedVae:
    """A VAE that passes on the fourth channel of pictures, averaged over the pixels of each latent."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def encode(self, pixels: Tensor, *args: Any, **options: Any) -> Tensor:
        """``pixels`` (B, H, W, 4) -> (B, C + 1, H / 8, W / 8)."""
        latents = self._vae.encode(pixels[..., :3], *args, **options)
        mask = pixels[..., 3:].movedim(-1, 1).to(latents)
        return torch.cat((latents, torch.nn.functional.adaptive_avg_pool2d(mask, latents.shape[-2:])), dim=1)


def _masked(latent_format: Any) -> Any:
    """A latent format that leaves channels after the latents' own unchanged."""
    masked, channels = copy.copy(latent_format), latent_format.latent_channels

    def process_in(latents: Tensor) -> Tensor:
        return torch.cat((latent_format.process_in(latents[:, :channels]), latents[:, channels:]), dim=1)

    masked.process_in = process_in
    return masked


# -- when sampling begins ------------------------------------------------------------------------------------


def _checked(control: Any) -> Any:
    """``control``, made to check then that it fits the MODEL, and to drop what an interrupted run left.

    Its class stays ComfyUI's own, which packs expect; the copies that they make lose this addition.
    """
    begin = control.pre_run

    def pre_run(model: Any, percent_to_timestep_function: Any) -> None:
        control.cond_hint = None
        _check_fit(control.control_model, model)
        begin(model, percent_to_timestep_function)

    control.pre_run = pre_run
    return control


def _check_fit(network: Any, model: Any) -> None:
    if not isinstance(model, comfy.model_base.HunyuanDiT):
        raise HyditError(
            f"the ControlNet is HunyuanDiT's, the MODEL is {type(model).__name__}: load the model with "
            "HyDiTCheckpointLoader, or use a ControlNet for that model"
        )
    base = model.diffusion_model
    config = getattr(base, "config", None)  # ComfyUI's own class has none
    width = base.hidden_size if config is None else config.hidden_size
    skips = base.depth // 2 - 1 if config is None else config.num_controls
    own = network.hidden_size, len(network.after_proj_list)
    if own != (width, skips):
        raise HyditError(
            f"the ControlNet has {own[1]} layers of width {own[0]}, this MODEL takes {skips} of width "
            f"{width}; use a ControlNet that was trained for this model"
        )
