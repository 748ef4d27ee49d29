"""ControlNets of HunyuanDiT as CONTROL_NETs of ComfyUI, with a weight for each layer and a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.controlnet
import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.supported_models
import comfy.utils
import torch
from torch import Tensor

from ...hydit_core.config import DiTConfig
from ...hydit_core.errors import HyditError
from ...hydit_core.model.controlnet import ControlNet
from ...hydit_core.model.layer_weights import LayerWeights
from ...hydit_core.weights.detect import FileKind, tencent_view
from ...hydit_core.weights.load import check_names, model_config
from ...hydit_core.weights.parts import model_info
from ...hydit_core.weights.source import TensorSource
from .attention import HostAttention
from .filling import choose_dtypes, fill, plan_dtypes
from .preview import latent_format

_CONDITIONS = ["text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5", "image_meta_size"]


class HostControlNet(ControlNet):
    """A ControlNet that is called as ComfyUI calls its own HunyuanDiT's, of any version and size.

    ``compute`` is the dtype that it computes in, ``dtype`` the one that its weights are made in.
    """

    def __init__(
        self, config: DiTConfig, *, dtype: torch.dtype, compute: torch.dtype, device: Any, operations: Any
    ) -> None:
        # The scores of v1.2 overflow in float16 on the backends that compute them apart
        precision = torch.float32 if config.version == "v1.2" else None
        attention = HostAttention(precision)
        super().__init__(config, dtype=dtype, device=device, operations=operations, attention=attention)
        self.compute, self.hidden_size, self.patch_size = compute, config.hidden_size, config.patch_size

    @property
    def dtype(self) -> torch.dtype:
        """What ComfyUI casts its inputs to: float32, because timesteps and sizes are rounded in others."""
        return torch.float32

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        hint: Tensor,
        timesteps: Tensor,
        context: Tensor,
        text_embedding_mask: Tensor | None = None,
        encoder_hidden_states_t5: Tensor | None = None,
        text_embedding_mask_t5: Tensor | None = None,
        image_meta_size: Tensor | None = None,
        **_: Any,
    ) -> dict[str, list[Tensor]]:
        """Residuals (B, N, D) under "output". Writes into no input.

        ``x`` (B, C, H, W) are latents, ``hint`` (B or 1, C, H, W) the control picture's, ``timesteps`` (B,);
        ``context`` and the others are the conditioning's, by the names of ComfyUI's HunyuanDiT.

        Raises:
            HyditError: the conditioning is another model's.
        """
        texts = (text_embedding_mask, encoder_hidden_states_t5, text_embedding_mask_t5)
        if any(part is None for part in texts):
            raise HyditError(
                "the conditioning has no features of HunyuanDiT's text encoders, which the ControlNet needs; "
                "use HyDiTTextEncode with the CLIP that belongs to this model"
            )
        bert, sizes = context.to(self.compute), _sizes(x, image_meta_size)
        try:
            encoded = self.encode_context(bert, *texts, image_meta_size=sizes)  # type: ignore[arg-type]
        except ValueError as error:
            raise HyditError(
                f"the ControlNet was made for other text features: {error}; use one for this MODEL"
            ) from error
        return {"output": super().forward(x, timesteps, encoded, hint)}


def _sizes(x: Tensor, stated: Tensor | None) -> Tensor:
    """The size condition (B, 6) for latents ``x``.

    ComfyUI's own MODEL states floats, the height first, and 768 unless a node says otherwise; ours integers.
    """
    if stated is not None and not stated.is_floating_point():
        return stated
    height, width = (8 * side for side in x.shape[-2:])
    return torch.tensor([[1024, 1024, width, height, 0, 0]], device=x.device).expand(len(x), -1)


class WeightedControl(comfy.controlnet.ControlBase):
    """A CONTROL_NET of HunyuanDiT whose residuals are multiplied layer by layer, and by a mask.

    ``inner`` is any CONTROL_NET, with its picture and strength; it is used by nobody else. Neutral weights
    leave its numbers as they are.
    """

    def __init__(self, inner: Any, weights: Sequence[float], mask: Tensor | None = None) -> None:
        super().__init__()
        self.inner, self.weights, self.mask = inner, tuple(weights), mask
        self.extra_hooks = inner.extra_hooks

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        """Called before sampling. Forgets what a run left behind that was interrupted."""
        self.cleanup()
        _check_fit(self.inner.control_model, model)
        super().pre_run(model, percent_to_timestep_function)
        self.inner.pre_run(model, percent_to_timestep_function)

    def get_control(self, x_noisy: Tensor, t: Tensor, cond: Any, batched_number: int, options: Any) -> Any:
        previous = None
        if self.previous_controlnet is not None:
            previous = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, options)
        control = self.inner.get_control(x_noisy, t, cond, batched_number, options)
        if control is None:
            return previous
        mask = None if self.mask is None else self._token_mask(x_noisy, batched_number)
        weighted = [
            _multiply(residual, weight, mask)
            for residual, weight in zip(control["output"], self.weights, strict=True)
        ]
        return self.control_merge({**control, "output": weighted}, previous, output_dtype=None)

    def _token_mask(self, x: Tensor, batched_number: int) -> Tensor:
        """The mask (B or 1, N, 1) for the tokens of latents ``x``: the share of each that it covers."""
        assert self.mask is not None
        height, width = x.shape[-2:]
        # Cropped as the control picture is, which it may have been painted on
        mask = comfy.utils.common_upscale(self.mask[:, None], width, height, "area", "center")
        patch = self.inner.control_model.patch_size
        mask = torch.nn.functional.avg_pool2d(mask, patch, ceil_mode=True).flatten(2).transpose(1, 2)
        return comfy.controlnet.broadcast_image_to(mask.to(x.device), len(x), batched_number)

    def cleanup(self) -> None:
        super().cleanup()
        self.inner.cleanup()

    def copy(self) -> WeightedControl:
        other = WeightedControl(self.inner.copy(), self.weights, self.mask)
        self.copy_to(other)
        return other

    def deepclone_multigpu(self, load_device: torch.device, autoregister: bool = False) -> WeightedControl:
        """A copy for another GPU."""
        other = self.copy()
        other.inner = self.inner.deepclone_multigpu(load_device)
        if autoregister:
            self.multigpu_clones[load_device] = other
        return other

    def get_models(self) -> list[Any]:
        return [*super().get_models(), *self.inner.get_models()]

    def inference_memory_requirements(self, dtype: torch.dtype) -> int:
        """Bytes: mainly the residuals of both halves of guidance, which stay until the DiT has used them."""
        network, picture = self.inner.control_model, self.inner.cond_hint_original
        tokens = picture.shape[-1] * picture.shape[-2] // (8 * network.patch_size) ** 2
        own = 2 * len(network.after_proj_list) * tokens * network.hidden_size * dtype.itemsize
        others = self.inner.inference_memory_requirements(dtype) + super().inference_memory_requirements(
            dtype
        )
        return int(own + others)


def _multiply(residual: Tensor, weight: float, mask: Tensor | None) -> Tensor:
    """``residual`` (B, N, D) * ``weight`` * ``mask``; exactly zero at 0, whatever the residual is."""
    if weight == 0:
        return torch.zeros_like(residual)
    weighted = residual if weight == 1 else residual * weight
    return weighted if mask is None else weighted * mask.to(weighted)


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


def load_control(source: TensorSource, kind: FileKind, *, weight_dtype: str = "default") -> Any:
    """A ControlNet of any version, size and layout as a CONTROL_NET of ComfyUI's own class.

    Args:
        source: the open file or folder, of which ``kind`` is known.
        weight_dtype: "default" or one of :data:`~.filling.WEIGHT_DTYPES`.

    Raises:
        WeightsError: if it lacks tensors, or has too many.
    """
    view, info = tencent_view(source, kind), model_info(source, kind)
    config = model_config(view, kind)
    check_names({k: tuple(v.shape) for k, v in ControlNet(config, device="meta").state_dict().items()}, view)
    management = comfy.model_management
    device, offload = management.get_torch_device(), management.unet_offload_device()
    supported = comfy.supported_models.HunyuanDiT.supported_inference_dtypes
    stored, compute = choose_dtypes(view, weight_dtype, device, supported)
    operations = comfy.ops.pick_operations(stored, compute, load_device=device)
    network = HostControlNet(
        config, dtype=stored, compute=compute or stored, device=offload, operations=operations
    )
    fill(network, view, plan_dtypes(view, stored, compute), offload)
    # Exactly this class, and no child of it: other packs know what to do with it
    return comfy.controlnet.ControlNet(
        network,
        compression_ratio=1,
        latent_format=latent_format(info),
        load_device=device,
        extra_conds=_CONDITIONS,
    )


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
        ConfigError: the weights are of another number than its layers.
    """
    values = weights.resolve(layer_count(control))
    if vae is None:  # as ComfyUI's checkpoint loader gives it for a file without one
        raise HyditError("the control picture must be encoded, and vae is empty: connect the model's VAE")
    if start > end:
        raise HyditError(
            f"start_percent {start:g} is after end_percent {end:g}: the ControlNet would never act"
        )
    if strength == 0 or not any(values):
        return positive, negative
    hint = image[..., :3].movedim(-1, 1)
    if mask is not None:
        mask = mask.reshape(-1, *mask.shape[-2:])
    # One control for both prompts, so that they run as one batch
    controls: dict[Any, WeightedControl] = {}

    def attach(conditioning: list[Any]) -> list[Any]:
        out = []
        for features, options in conditioning:
            previous = options.get("control")
            if previous not in controls:
                inner = control.copy().set_cond_hint(hint, strength, (start, end), vae=vae)
                controls[previous] = WeightedControl(inner, values, mask).set_previous_controlnet(previous)
            given = {"control": controls[previous], "control_apply_to_uncond": False}
            out.append([features, {**options, **given}])
        return out

    return attach(positive), attach(negative)


def layer_count(control: Any) -> int:
    """How many residuals a CONTROL_NET gives; HyditError unless it is HunyuanDiT's, ours or ComfyUI's."""
    network = getattr(control, "control_model", None)
    projections = getattr(network, "after_proj_list", None)
    if projections is None:
        found = type(control).__name__ if network is None else type(network).__name__
        raise HyditError(
            f"the CONTROL_NET is {found}, not a ControlNet of HunyuanDiT; load one with HyDiTControlNetLoader"
        )
    return len(projections)
