"""HunyuanDiT's ControlNets as ComfyUI's CONTROL_NETs."""

from __future__ import annotations

from typing import Any

import comfy.controlnet
import comfy.model_management
import comfy.ops
import comfy.supported_models
import torch
from torch import Tensor

from ...hydit_core.errors import HyditError
from ...hydit_core.model.config import DiTConfig
from ...hydit_core.model.controlnet import ControlNet
from ...hydit_core.weights.bundle import Bundle
from ...hydit_core.weights.load import check_names, model_config
from . import quantised
from .attention import HostAttention
from .filling import choose_dtypes, fill, plan_dtypes
from .preview import latent_format

_CONDITIONS = ["text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5", "image_meta_size"]


class HostControlNet(ControlNet):
    """A ControlNet of any version and size, called as ComfyUI calls its own HunyuanDiT's.

    ``compute`` is the dtype that it computes in, ``dtype`` the one that its weights are made in.
    """

    def __init__(
        self, config: DiTConfig, *, dtype: torch.dtype, compute: torch.dtype, device: Any, operations: Any
    ) -> None:
        # v1.2's scores overflow in float16 on backends that compute them separately
        precision = torch.float32 if config.version == "v1.2" else None
        attention = HostAttention(precision)
        super().__init__(config, dtype=dtype, device=device, operations=operations, attention=attention)
        self.compute, self.hidden_size, self.patch_size = compute, config.hidden_size, config.patch_size

    @property
    def dtype(self) -> torch.dtype:
        """What ComfyUI casts its inputs to: float32, because others would round timesteps and sizes."""
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
        """Residuals (B, N, D) under "output". Changes no input.

        ``x`` (B, C, H, W) are latents, ``hint`` (B or 1, C, H, W) the control picture's, ``timesteps`` (B,);
        ``context`` and the others come from the conditioning, under the names of ComfyUI's HunyuanDiT.

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


def load_control(opened: Bundle, *, weight_dtype: str = "default") -> Any:
    """A ControlNet of any version, size and layout as a CONTROL_NET of ComfyUI's own class.

    Args:
        opened: a file or folder with a ControlNet.
        weight_dtype: "default" or one of :data:`~hydit_core.dtypes.HOST`.

    Raises:
        WeightsError: if it lacks tensors, or has too many.
    """
    view = opened.controlnet
    assert view is not None
    config = model_config(view, opened.kind)
    check_names({k: tuple(v.shape) for k, v in ControlNet(config, device="meta").state_dict().items()}, view)
    management = comfy.model_management
    device, offload = management.get_torch_device(), management.unet_offload_device()
    supported = comfy.supported_models.HunyuanDiT.supported_inference_dtypes
    packed = quantised.keeps(view, weight_dtype)
    stored, compute = choose_dtypes(view, weight_dtype, device, supported, packed=packed)
    if packed:
        operations = quantised.operations(stored, compute or stored, device)
    else:
        operations = comfy.ops.pick_operations(stored, compute, load_device=device)
    network = HostControlNet(
        config, dtype=stored, compute=compute or stored, device=offload, operations=operations
    )
    fill(network, view, plan_dtypes(view, stored, compute), offload, packed=packed)
    # Exactly this class, not a subclass: other packs recognize only it
    return comfy.controlnet.ControlNet(
        network,
        compression_ratio=1,
        latent_format=latent_format(opened.info),
        load_device=device,
        extra_conds=_CONDITIONS,
    )
