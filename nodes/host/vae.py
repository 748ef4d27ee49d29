"""The VAE of a HunyuanDiT file as ComfyUI's own, with the file's dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.sd
import torch

from ...hydit_core.errors import WeightsError
from ...hydit_core.facts import ModelInfo
from ...hydit_core.weights import vae_layout
from ...hydit_core.weights.single import vae_part
from ...hydit_core.weights.source import TensorSource
from .preview import latent_format

_GROUPS = 32
# The activations of ComfyUI's two architectures; a file cannot choose others.
_ACTIVATIONS = {"kl": "silu", "tiny": "relu"}
_SCALES = ("vae_scale", "vae_shift")
# What decoders once had, and tiling packs still ask for
_ASKED_FOR = ("give_pre_end", "tanh_out")
# Where a VAE keeps what its file had and ComfyUI changed: name -> tensor, or only its dtype.
_STORED = "hydit_stored"


def load_vae(source: TensorSource, info: ModelInfo) -> comfy.sd.VAE:
    """A KL autoencoder of any size, or a TAESD of the published size, as ComfyUI runs it.

    Args:
        source: the VAE's tensors in LDM, TAESD or diffusers names (``Bundle.vae``).
        info: what the shapes do not tell (``Bundle.info``): ``info.vae``.

    Returns:
        A VAE whose latents, in the latent format of ``info``, are those that the model works on. Its dtype is
        the one that ComfyUI uses on this device.

    Raises:
        WeightsError: if it holds no VAE, or one that ComfyUI cannot run.
    """
    try:
        source = vae_part(source, info.vae)
        kind = vae_layout.detect_vae(source.keys())
        assert kind is not None  # vae_part() checked that
        activation = info.vae.get("act_fn", _ACTIVATIONS[kind.architecture])
        if activation != _ACTIVATIONS[kind.architecture]:
            raise WeightsError(f"its activation is {activation}, {_ONLY} {_ACTIVATIONS[kind.architecture]}")
        return _kl(source, info) if kind.architecture == "kl" else _tiny(source, kind, info)
    except WeightsError as error:
        if str(error).startswith(str(source.path)):
            raise
        raise WeightsError(f"the VAE in {source.path}: {error}") from error


_ONLY = "and ComfyUI's autoencoders only have"


def stored_tensors(vae: comfy.sd.VAE) -> dict[str, torch.Tensor]:
    """A VAE's weights for a file: as in the file that it came from, where that loses nothing.

    On the CPU, ComfyUI holds a 16-bit VAE in float32; here it is 16-bit again. A TAESD gets the scale that
    belongs to ComfyUI's own constant.
    """
    stored: Mapping[str, torch.Tensor | torch.dtype] = getattr(vae, _STORED, {})
    tensors: dict[str, torch.Tensor] = vae.get_sd()
    for name, kept in stored.items():
        if isinstance(kept, torch.Tensor):
            tensors[name] = kept
        elif tensors[name].dtype == torch.float32 and kept in (torch.float16, torch.bfloat16):
            tensors[name] = tensors[name].to(kept)
    return tensors


def _kl(source: TensorSource, info: ModelInfo) -> comfy.sd.VAE:
    names = {new: old for old, new in vae_layout.kl_renaming(source.keys(), to="diffusers").items()}

    def shape(name: str) -> tuple[int, ...]:
        if name not in names:
            raise WeightsError(f"it is incomplete: tensor {name} is missing")
        return source.shape(names[name])

    groups = int(info.vae.get("norm_num_groups", _GROUPS))
    if groups != _GROUPS:
        raise WeightsError(
            f"its norms have {groups} groups, {_ONLY} {_GROUPS}; use another VAE, or this one outside of "
            "ComfyUI (python -m hydit_core.generate)"
        )
    config = vae_layout.kl_config(names, shape, norm_num_groups=1)
    channels = config["block_out_channels"]
    if any(count % _GROUPS or count % channels[0] for count in channels):
        raise WeightsError(
            f"its levels have {', '.join(map(str, channels))} channels; ComfyUI can run multiples of "
            f"{_GROUPS} that are multiples of the first"
        )
    ddconfig = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": 256,
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": channels[0],
        "ch_mult": [count // channels[0] for count in channels],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    embed_dim = shape("post_quant_conv.weight")[1]
    vae = _build(source, {"params": {"ddconfig": ddconfig, "embed_dim": embed_dim}})
    decoder = vae.first_stage_model.decoder
    for name in _ASKED_FOR:
        if not hasattr(decoder, name):
            setattr(decoder, name, False)
    vae.latent_channels = embed_dim
    vae.downscale_ratio = vae.upscale_ratio = 2 ** (len(channels) - 1)
    setattr(vae, _STORED, {name: source.dtype(name) for name in source})
    return vae


def _tiny(source: TensorSource, kind: vae_layout.VaeKind, info: ModelInfo) -> comfy.sd.VAE:
    names = {name: name for name in source}
    scaling, shift = vae_layout.latent_scale(kind, names, source, info.vae)
    vae = _build(source, None)
    # The network's z is the model's latent divided by `scaling`, plus `shift`; ComfyUI gives the VAE the
    # model's latent divided by the latent format's scale, plus its shift.
    space = latent_format(info)
    with torch.no_grad():
        vae.first_stage_model.vae_scale.fill_(space.scale_factor / scaling)
        vae.first_stage_model.vae_shift.fill_(space.shift_factor - shift * scaling / space.scale_factor)
    kept: dict[str, torch.Tensor | torch.dtype] = {name: source.dtype(name) for name in source}
    file_scale = vae_layout.taesd_scale(scaling, shift)
    for name, value in zip(_SCALES, file_scale, strict=True):
        kept[name] = source.get(name).clone() if name in source else torch.tensor(value)
    setattr(vae, _STORED, kept)
    return vae


def _build(source: TensorSource, config: dict[str, Any] | None) -> comfy.sd.VAE:
    """ComfyUI's VAE with exactly these weights."""
    # Copies: ComfyUI may take the tensors themselves, and the file would stay mapped.
    tensors = {name: source.get(name).clone() for name in source}
    try:
        vae = comfy.sd.VAE(sd=dict(tensors), config=config)
    except RuntimeError as error:
        misfits = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        if not misfits:
            raise
        raise WeightsError(f"it does not fit ComfyUI's autoencoder: {misfits[0]}") from error
    own = set(vae.first_stage_model.state_dict()) - set(_SCALES)
    found = set(tensors) - set(_SCALES)
    if lost := own - found:
        raise WeightsError(f"it is incomplete: {len(lost)} tensors are missing, first {min(lost)}")
    if extra := found - own:
        raise WeightsError(f"ComfyUI's autoencoder has no place for {len(extra)} tensors, first {min(extra)}")
    return vae
