"""hydit_core's DiT as a ComfyUI MODEL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.conds
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
import comfy.supported_models
import torch
from torch import Tensor

from ...hydit_core.errors import HyditError
from ...hydit_core.facts import METADATA_KEY, ModelInfo
from ...hydit_core.model.config import DiTConfig
from ...hydit_core.model.dit import DiT
from ...hydit_core.weights.bundle import Place, bundle
from ...hydit_core.weights.load import check_names
from . import quantised
from .dit import HostDiT
from .filling import choose_dtypes, fill, plan_dtypes
from .image_prompts import image_conditions
from .preview import latent_format

_BARE = ("text_embedding_padding", "pooler.positional_embedding")
_INFO = "hydit_info"
"""The name of the attachment for a MODEL with a LoRA that changes what is known of it."""
_ENCODE = "use HyDiTTextEncode, or CLIPTextEncode, with the CLIP that belongs to this model"


class HyDiTModelConfig(comfy.supported_models.HunyuanDiT):
    """What ComfyUI asks about a HunyuanDiT, answered from the file instead of from a table of versions."""

    unet_extra_config: dict[str, Any] = {}

    def __init__(self, config: DiTConfig, info: ModelInfo) -> None:
        old = config.version != "v1.2"
        network: dict[str, Any] = {"image_model": "hydit1" if old else "hydit", "config": config}
        if not old:
            # v1.2's scores overflow in float16 on backends that compute them separately
            network["attn_precision"] = torch.float32
        super().__init__(network)
        self.hydit_info = info
        self.latent_format = latent_format(info)
        self.sampling_settings = {
            "beta_schedule": "linear",
            "linear_start": info.diffusion.beta_start,
            "linear_end": info.diffusion.beta_end,
            "timesteps": info.diffusion.num_train_timesteps,
        }

    def model_type(self, state_dict: Any, prefix: str = "") -> comfy.model_base.ModelType:
        v = self.hydit_info.diffusion.prediction == "v"
        return comfy.model_base.ModelType.V_PREDICTION if v else comfy.model_base.ModelType.EPS

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> HyDiTModel:
        return HyDiTModel(self, self.model_type(state_dict, prefix), device)


class _PredictsSample(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.X0):
    """For models that predict the clean sample, for which ComfyUI has no model type."""


class HyDiTModel(comfy.model_base.HunyuanDiT):
    """ComfyUI's HunyuanDiT with :class:`HostDiT` in it; ``hydit_info`` is what its file says about itself."""

    info_in_tensors = True

    def __init__(self, model_config: HyDiTModelConfig, model_type: Any, device: Any = None) -> None:
        # Not the parent's constructor, which makes ComfyUI's network.
        comfy.model_base.BaseModel.__init__(self, model_config, model_type, device=device, unet_model=HostDiT)
        self.hydit_info = model_config.hydit_info
        if self.hydit_info.diffusion.prediction == "sample":
            self.model_sampling = _PredictsSample(model_config)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """As the parent's, checked against this model's dimensions, and with sizes as in its training.

        A size in the conditioning (``target_width``, ``target_height``, else ``width``, ``height``) takes
        precedence over that of the latent.

        Raises:
            HyditError: the conditioning is another model family's.
        """
        config: DiTConfig = self.diffusion_model.config
        bert, t5 = kwargs.get("cross_attn"), kwargs.get("conditioning_mt5xl")
        bert_mask = _mask("BERT", bert, kwargs.get("attention_mask"), config.text_len, config.text_dim)
        t5_mask = _mask("mT5", t5, kwargs.get("attention_mask_mt5xl"), config.t5_len, config.t5_dim)
        kwargs["cross_attn"], bert_mask = _without_padding(bert, bert_mask, config.text_len)
        kwargs["conditioning_mt5xl"], t5_mask = _without_padding(t5, t5_mask, config.t5_len)
        out = super().extra_conds(**kwargs)
        out["text_embedding_mask"] = comfy.conds.CONDRegular(bert_mask)
        out["text_embedding_mask_t5"] = comfy.conds.CONDRegular(t5_mask)
        width, height = _side("width", -1, kwargs), _side("height", -2, kwargs)
        # Integers, because ComfyUI casts other tensors, and bfloat16 would turn 1083 into 1080
        sizes = torch.tensor([[1024, 1024, width, height, 0, 0]], dtype=torch.long)
        out["image_meta_size"] = comfy.conds.CONDRegular(sizes)
        given = kwargs["noise"], kwargs.get("device"), kwargs.get("prompt_type", "")
        return out | image_conditions(self.current_patcher, *given)

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As the parent's, without its ``v_pred``, a mark that only Stable Diffusion's loaders read.

        If ComfyUI's own nodes save it, they write their own metadata: what the file said about itself is then
        added to the tensors.
        """
        tensors: dict[str, Tensor] = super().state_dict_for_saving(*args, **kwargs)
        tensors.pop("v_pred", None)
        if self.info_in_tensors:
            text = self.hydit_info.to_json().encode()
            tensors[METADATA_KEY] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return tensors


def _side(name: str, axis: int, given: Mapping[str, Any]) -> int:
    return int(given.get(f"target_{name}") or given.get(name) or 8 * given["noise"].shape[axis])


def _mask(name: str, features: Tensor | None, mask: Tensor | None, length: int, dim: int) -> Tensor:
    """The mask (B, L) of text features (B, L, dim). Rows beyond it, from joined prompts, count as tokens."""
    if features is None:
        raise HyditError(
            f"the conditioning has no {name} features: another model's text encoder made it; {_ENCODE}"
        )
    if features.ndim != 3 or features.shape[1] < length or features.shape[2] != dim:
        raise HyditError(
            f"the conditioning's {name} features are {tuple(features.shape)}, this model's (batch, {length}, "
            f"{dim}): another model's text encoder made it; {_ENCODE}"
        )
    rows = features.shape[1]
    if mask is None:
        return torch.ones(features.shape[:2], dtype=torch.long, device=features.device)
    known = mask[:, :rows]
    return torch.cat((known, known.new_ones(len(known), rows - known.shape[1])), dim=1)


def _without_padding(features: Any, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Cut to the length that the model was trained on, if only padding follows.

    Text encoders from separate files do not know a small model's lengths and pad to the published ones.
    """
    if mask[:, length:].any():
        return features, mask
    return features[:, :length], mask[:, :length]


def model_info(model: Any) -> ModelInfo:
    """What is known about a MODEL (a ModelPatcher), ours or ComfyUI's own HunyuanDiT, with its LoRAs.

    Raises:
        HyditError: it is another model family's.
    """
    network = model.model
    if not isinstance(network, comfy.model_base.HunyuanDiT):
        raise HyditError(
            f"the MODEL is {type(network).__name__}, not HunyuanDiT: load one with HyDiTCheckpointLoader or "
            "HyDiTDiTLoader"
        )
    told: ModelInfo | None = model.get_attachment(_INFO)
    if told is not None:
        return told
    if isinstance(network, HyDiTModel):
        return network.hydit_info
    return ModelInfo.published("v1.1" if network.diffusion_model.size_cond else "v1.2")


def set_model_info(model: Any, info: ModelInfo) -> None:
    """Let a MODEL and its clones, but not what it was cloned from, be known as ``info`` says."""
    model.set_attachments(_INFO, info)


def load_model(source: Place, *, weight_dtype: str = "default", disable_dynamic: bool = False) -> Any:
    """Load a HunyuanDiT of any version, size and layout as a MODEL (a ModelPatcher).

    Tensors are read, cast and copied one at a time; the file is not needed afterwards.

    Args:
        source: an open checkpoint, or the path of a file or folder.
        weight_dtype: one of :data:`~hydit_core.dtypes.HOST`, or "default": ComfyUI's choice for this
            machine and model, but nothing wider than the file. Only the matrices inside the blocks are kept
            in an 8-bit float.
        disable_dynamic: use a patcher that loads weights at once, where ComfyUI would stream them.

    Raises:
        WeightsError: if it is something else, lacks tensors, or has unknown ones.
    """
    opened = bundle(source, only=("dit",), kinds=("dit",))
    config, view, info = opened.kind.config, opened.dit, opened.info
    assert config is not None and view is not None  # it was opened as one
    management = comfy.model_management
    device, offload = management.get_torch_device(), management.unet_offload_device()
    model_config = HyDiTModelConfig(config, info)
    packed, supported = quantised.keeps(view, weight_dtype), model_config.supported_inference_dtypes
    stored, compute = choose_dtypes(view, weight_dtype, device, supported, packed=packed)
    if packed:
        model_config.quant_config = quantised.MIXED
    expected = {key: tuple(value.shape) for key, value in DiT(config, device="meta").state_dict().items()}
    check_names(expected, view)

    model_config.set_inference_dtype(stored, compute)
    model = model_config.get_model(None)
    fill(model.diffusion_model, view, plan_dtypes(view, stored, compute), offload, packed=packed)
    patcher_class = comfy.model_patcher.ModelPatcher
    if not disable_dynamic:  # 0.3.64 has only one; the other is chosen while ComfyUI starts
        patcher_class = vars(comfy.model_patcher).get("CoreModelPatcher", patcher_class)
    patcher = patcher_class(model.to(offload), load_device=device, offload_device=offload)
    patcher.add_callback_with_key(comfy.patcher_extension.CallbacksMP.ON_LOAD, "hydit", _patch_bare)
    if opened.path.exists():
        patcher.cached_patcher_init = (_load_again, (str(opened.path), weight_dtype, opened.load_key))
    return patcher


def _load_again(
    path: str, weight_dtype: str, load_key: str | None = None, disable_dynamic: bool = False
) -> Any:
    """The same model again, which ComfyUI asks for on a second GPU."""
    opened = bundle(path, only=("dit",), kinds=("dit",), load_key=load_key)
    return load_model(opened, weight_dtype=weight_dtype, disable_dynamic=disable_dynamic)


def _patch_bare(patcher: Any, device: Any, *_: Any) -> None:
    """Patch (merge) the parameters outside layers, which ComfyUI's own loading leaves out."""
    for name in _BARE:
        key = f"diffusion_model.{name}"
        if key in patcher.patches and key not in patcher.backup:
            patcher.patch_weight_to_device(key, device_to=device)
