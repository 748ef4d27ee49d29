"""IP-Adapters and their image encoders as ComfyUI's networks, and pictures as prompts on a MODEL."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor, nn

from ...hydit_core.diffusion.schedule import timestep_range
from ...hydit_core.dtypes import dtype_name
from ...hydit_core.errors import ConfigError, HyditError, WeightsError
from ...hydit_core.finite import DTYPE_ADVICE
from ...hydit_core.image_prompts.pixels import encoder_pixels
from ...hydit_core.image_prompts.run import (
    block_weights,
    check_adapter,
    check_encoder,
    check_range,
    weighted,
)
from ...hydit_core.images import to_image
from ...hydit_core.layer_weights import LayerWeights
from ...hydit_core.model.attention import Attended
from ...hydit_core.model.ip_adapter import IPAdapter, IPAdapterConfig
from ...hydit_core.weights.detect import detect, ip_adapter_view
from ...hydit_core.weights.files import open_tensors
from ...hydit_core.weights.load import check_names, compute_dtype
from ...hydit_core.weights.source import TensorSource
from ...hydit_core.weights.views import TensorView
from ...hydit_core.weights.vision_layout import VisionConfig, find_vision, vision_config, vision_view
from .filling import choose_dtypes, fill, plan_dtypes
from .folders import encoder_for
from .image_prompts import KEY, HostMask, HostPicture, pictures_of
from .model import HyDiTModel, model_info

_PRECISION = torch.float32
"""What both networks compute in, whatever their weights are kept in: they run once for a picture."""
_SUPPORTED = (torch.float16, torch.bfloat16, torch.float32)


class HostIPAdapter:
    """An IP-Adapter with its image encoder, which ComfyUI's memory management moves like other models.

    Only the files' headers are read at first; each network when it is first needed.

    Args:
        adapter: its file.
        encoder: its file; None: the one in the adapter's file or beside it, see :func:`encoder_for`.

    Raises:
        WrongFile: one of them is something else.
        WeightsError: one of them is incomplete, or there is no encoder.
        ConfigError: they do not belong together.
    """

    def __init__(self, adapter: Path, encoder: Path | None = None) -> None:
        view, config = _open_adapter(adapter)
        self.blank = IPAdapter(config, device="meta")
        check_names(_shapes(self.blank), view)
        self.adapter, self.encoder = adapter, encoder or encoder_for(adapter)
        vision, self.vision = _open_encoder(self.encoder)
        check_names(_shapes(_vision_network(self.vision, torch.float32)), vision)
        try:
            check_encoder(self.vision.embed_dim, self.blank)
        except ConfigError as error:
            raise ConfigError(f"{self.encoder} does not go with {adapter}: {error}") from None
        dtypes = (dtype_name(one.main_dtype() or torch.float32) for one in (view, vision))
        self.dtypes = " and ".join(dict.fromkeys(dtypes))

    def describe(self) -> str:
        """What the files are, in a line each."""
        config, vision = self.blank.config, self.vision
        return (
            f"IP-Adapter for {config.depth} blocks of width {config.hidden_size}, {config.num_tokens} tokens "
            f"for a picture, {self.dtypes}\nimage encoder of width {vision.width}, {vision.layers} layers, "
            f"{vision.size} px ({self.encoder.name})"
        )

    def embed(self, image: Tensor) -> Tensor:
        """(1, embed_dim), of length 1, for a picture (3, H, W) in [0, 1]."""
        patcher = self._encoder
        comfy.model_management.load_models_gpu([patcher])
        pixels = encoder_pixels(to_image(image), self.vision.size)[None].to(patcher.load_device, _PRECISION)
        embedding: Tensor = patcher.model(pixel_values=pixels)[2].float()
        if not embedding.isfinite().all():
            raise HyditError(f"the image encoder's output is not finite; {DTYPE_ADVICE}")
        return nn.functional.normalize(embedding, dim=-1)

    def attended(self, embedding: Tensor, weights: Sequence[float]) -> list[Attended | None]:
        """Two rows for each block of the DiT: without the picture, and with it. See :func:`weighted`."""
        patcher = self._adapter
        comfy.model_management.load_models_gpu([patcher])
        return weighted(patcher.model, embedding.to(patcher.load_device, _PRECISION), weights, guided=True)

    @cached_property
    def _adapter(self) -> Any:
        view, config = _open_adapter(self.adapter)
        stored, _ = choose_dtypes(view, "default", _device(), _SUPPORTED)
        network = IPAdapter(config, dtype=stored, device="meta", operations=comfy.ops.manual_cast)
        return _patcher(network, view, stored)

    @cached_property
    def _encoder(self) -> Any:
        view, config = _open_encoder(self.encoder)
        stored, usual = compute_dtype(view), comfy.model_management.text_encoder_dtype(_device())
        if _device().type != "cpu" and usual.itemsize < stored.itemsize:  # as `generate` does it
            stored = usual
        return _patcher(_vision_network(config, stored), view, stored)


def _open_adapter(path: Path) -> tuple[TensorView, IPAdapterConfig]:
    source = open_tensors(path)
    view = ip_adapter_view(source)
    if not len(view):
        raise WrongFile(source, "a HunyuanDiT IP-Adapter")
    try:
        return view, IPAdapterConfig.from_state_dict(view.shapes())
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None


def _open_encoder(path: Path) -> tuple[TensorView, VisionConfig]:
    source = open_tensors(path)
    kind = find_vision(source.keys())
    if kind is None:
        raise WrongFile(source, "a CLIP image encoder")
    view = vision_view(source, kind)
    return view, vision_config(view, kind.layout)


class WrongFile(WeightsError):
    """A file of another kind: ``path``, what it is (``kind``), and what was ``expected``."""

    def __init__(self, source: TensorSource, expected: str) -> None:
        self.path, self.kind, self.expected = source.path, detect(source), expected
        super().__init__(f"{self.path} is {self.kind.name}; expected {expected}")


def _vision_network(config: VisionConfig, dtype: torch.dtype) -> nn.Module:
    """ComfyUI's own network without weights, in dimensions for which it may have no configuration file."""
    told = {
        "model_type": "clip_vision_model",
        "num_channels": 3,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_hidden,
        "hidden_act": config.activation,
        "patch_size": config.patch,
        "image_size": config.size,
        "projection_dim": config.embed_dim,
    }
    network: nn.Module = comfy.clip_model.CLIPVisionModelProjection(
        told, dtype, torch.device("meta"), comfy.ops.manual_cast
    )
    return network


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def _device() -> torch.device:
    device: torch.device = comfy.model_management.text_encoder_device()
    return device


def _patcher(network: nn.Module, view: TensorSource, stored: torch.dtype) -> Any:
    """A network with its weights, outside the device until ComfyUI loads it."""
    offload = comfy.model_management.text_encoder_offload_device()
    fill(network, view, plan_dtypes(view, stored, None), offload)
    # 0.3.64 has only one; the other is chosen while ComfyUI starts
    patchers = vars(comfy.model_patcher)
    made = patchers.get("CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return made(network, load_device=_device(), offload_device=offload)


# -- on a MODEL ----------------------------------------------------------------------------------------------


def apply_pictures(
    model: Any,
    adapter: HostIPAdapter,
    image: Tensor,
    *,
    weight: float,
    weights: LayerWeights,
    start: float,
    end: float,
    mask: Tensor | None = None,
) -> Any:
    """A clone of a MODEL whose blocks also attend to pictures, beside those that it has already.

    Args:
        image: (B, H, W, C) in [0, 1]: B pictures, each with this weight. Transparent ones lie on white.
        weight: 1 is as trained; ``weights`` multiply it block by block.
        start, end: fractions of the sampling between which they act.
        mask: (H, W) or (B, H, W): where in what is drawn, 1 fully, 0 not at all; scaled and cropped to it.

    Raises:
        HyditError: the MODEL is not ours, or there is no picture.
        ConfigError: the IP-Adapter is for a model of another size, or a number is out of range.
    """
    model_info(model)  # raises for other families
    if not isinstance(model.model, HyDiTModel):
        raise HyditError(
            "this MODEL is ComfyUI's own HunyuanDiT, whose attention has no place for pictures: load its "
            "file with HyDiTCheckpointLoader or HyDiTDiTLoader instead"
        )
    config = model.model.diffusion_model.config
    check_adapter(adapter.blank, config, f"the IP-Adapter {adapter.adapter.name}")
    check_range(start, end)
    each = [weight * one for one in block_weights(weights, config.depth)]
    pictures, masks = _pictures(image), _masks(mask, len(image))
    model = model.clone()
    if not any(each):
        return model
    seen = []
    for picture, where in zip(pictures, masks, strict=True):
        comfy.model_management.throw_exception_if_processing_interrupted()
        attended = adapter.attended(adapter.embed(picture), each)
        seen.append(HostPicture.of(attended, timestep_range(start, end), where))
    options = model.model_options.setdefault("transformer_options", {})
    options[KEY] = (*pictures_of(options), *seen)
    return model


def _pictures(image: Tensor) -> Tensor:
    """The pictures of an IMAGE, (B, 3, H, W) in [0, 1]."""
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4) or 0 in image.shape:
        raise HyditError(f"the image is {tuple(image.shape)}; expected (pictures, height, width, 3)")
    if not image.isfinite().all():
        raise HyditError("the image holds values that are not finite: look at the node that it comes from")
    values = image.to("cpu", torch.float32).clamp(0, 1).movedim(-1, 1)
    if values.shape[1] == 4:
        values = values[:, :3] * values[:, 3:] + (1 - values[:, 3:])
    return values.expand(-1, 3, -1, -1)


def _masks(mask: Tensor | None, count: int) -> Sequence[HostMask | None]:
    """One for each of ``count`` pictures."""
    if mask is None:
        return [None] * count
    mask = mask.reshape(-1, *mask.shape[-2:])
    if len(mask) not in (1, count):
        raise ConfigError(f"{len(mask)} masks for {count} pictures: give one for all, or one for each")
    made = [HostMask(one) for one in mask.to("cpu", torch.float32).nan_to_num().clamp(0, 1)]
    return made if len(made) == count else made * count
