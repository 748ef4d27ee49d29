"""Key names and architectures of the VAEs in HunyuanDiT files.

Two architectures, each in two name layouts:

* ``kl``: the latent-diffusion autoencoder. Layout ``ldm`` (``encoder.down.0.block.0...``, attention as 1x1
  convolutions; what ComfyUI's all-in-one files hold) and layout ``diffusers`` (``AutoencoderKL``, attention
  as linear layers, decoder levels counted from the lowest resolution).
* ``tiny``: TAESD. Layout ``taesd`` (``taesd_encoder.N``, ``taesd_decoder.N``; the decoder's layer 0 is a
  clamp without weights) and layout ``diffusers`` (``AutoencoderTiny``, ``encoder.layers.N``).

Everything works for any number of levels, layers and channels: they are read from keys and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import WeightsError
from ..untrusted import count_numbered
from .source import TensorSource

SCALING_FACTOR = 0.13025
"""The scaling factor of the SDXL VAE's latents, which all published HunyuanDiTs work on."""
PREFIXES = ("", "vae.", "first_stage_model.")
_TRAINING_ONLY = ("loss.", "model_ema.")
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_DEPRECATED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}

Shape = Callable[[str], tuple[int, ...]]


class VaeKind(NamedTuple):
    """What a set of keys holds: architecture, name layout, and the prefix before every name."""

    architecture: str  # "kl" or "tiny"
    layout: str  # "ldm", "taesd" or "diffusers"
    prefix: str


_MARKS = {
    "encoder.down.0.block.0.conv1.weight": ("kl", "ldm"),
    "encoder.down_blocks.0.resnets.0.conv1.weight": ("kl", "diffusers"),
    "taesd_decoder.1.weight": ("tiny", "taesd"),
    "decoder.layers.0.weight": ("tiny", "diffusers"),
}


def detect_vae(keys: Iterable[str]) -> VaeKind | None:
    """The kind of VAE that the keys belong to, or ``None``. Reads only names."""
    present = set(keys)
    for prefix in PREFIXES:
        for mark, (architecture, layout) in _MARKS.items():
            if prefix + mark in present:
                return VaeKind(architecture, layout, prefix)
    return None


def strip_vae_prefix(keys: Iterable[str], kind: VaeKind) -> dict[str, str]:
    """Map the VAE's own names to the names in the file; training leftovers (loss, EMA copy) are dropped."""
    names = {key.removeprefix(kind.prefix): key for key in keys if key.startswith(kind.prefix)}
    return {name: key for name, key in names.items() if not name.startswith(_TRAINING_ONLY)}


def _tiny_layers(keys: Iterable[str], side: str) -> int:
    """The highest layer number plus one; between layers with weights there are one or two without."""
    found = {int(match[1]) for key in keys if (match := re.match(rf"{side}\.layers\.(\d{{1,4}})\.", key))}
    count = max(found, default=-1) + 1
    if count > 3 * len(found) + 3:
        raise WeightsError(f"the TAESD has a layer {count - 1} in its {side}, but only {len(found)} layers")
    return count


def _convolution(shape: Shape, name: str) -> tuple[int, int]:
    """Output and input channels."""
    found = shape(name)
    if len(found) != 4 or 0 in found:
        raise WeightsError(f"the VAE's {name} has shape {tuple(found)}; expected a convolution's")
    return found[0], found[1]


def kl_key_table(levels: int, layers: int) -> dict[str, str]:
    """LDM name -> ``AutoencoderKL`` name, for every module that such an autoencoder can have.

    Args:
        levels: number of resolutions (4 for the SDXL VAE).
        layers: residual blocks per encoder level (2 for the SDXL VAE); the decoder has one more.
    """
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}

    def add(ldm: str, diffusers: str, parts: Mapping[str, str]) -> None:
        modules.update({f"{ldm}.{a}": f"{diffusers}.{b}" for a, b in parts.items()})

    for side in ("encoder", "decoder"):
        add(side, side, {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"})
        add(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0", _RESNET)
        add(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1", _RESNET)
        add(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", _ATTENTION)
    for level in range(levels):
        down = f"encoder.down_blocks.{level}"
        add(f"encoder.down.{level}", down, {"downsample.conv": "downsamplers.0.conv"})
        # LDM counts the decoder's levels from the highest resolution, diffusers in order of execution.
        up, ldm_up = f"decoder.up_blocks.{levels - 1 - level}", f"decoder.up.{level}"
        add(ldm_up, up, {"upsample.conv": "upsamplers.0.conv"})
        for layer in range(layers):
            add(f"encoder.down.{level}.block.{layer}", f"{down}.resnets.{layer}", _RESNET)
        for layer in range(layers + 1):
            add(f"{ldm_up}.block.{layer}", f"{up}.resnets.{layer}", _RESNET)
    return {f"{a}.{leaf}": f"{b}.{leaf}" for a, b in modules.items() for leaf in ("weight", "bias")}


def kl_renaming(keys: Iterable[str], *, to: str) -> dict[str, str]:
    """The renaming of a KL autoencoder's keys (without prefix) into the layout ``to`` ("ldm" or "diffusers").

    Raises:
        WeightsError: a key has no counterpart (for example attention outside the middle block).
    """
    names = list(keys)
    if to == "diffusers":
        table = kl_key_table(
            count_numbered(names, "encoder.down."), count_numbered(names, "encoder.down.0.block.")
        )
    else:
        levels = count_numbered(names, "encoder.down_blocks.")
        layers = count_numbered(names, "encoder.down_blocks.0.resnets.")
        table = {new: old for old, new in kl_key_table(levels, layers).items()}
    unknown = [name for name in names if name not in table]
    if unknown:
        raise WeightsError(
            f"this VAE has {len(unknown)} tensors that AutoencoderKL's {to} names have no place for "
            f"({', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}); expected residual blocks, one "
            f"attention layer in the middle and the quantization convolutions"
        )
    return {name: table[name] for name in names}


def is_attention_matrix(name: str) -> bool:
    """True for the tensors that are (C, C, 1, 1) in the LDM layout and (C, C) in diffusers'."""
    return name.endswith(".weight") and (
        (".mid.attn_1." in name and ".attn_1.norm." not in name)
        or (".mid_block.attentions.0." in name and ".group_norm." not in name)
    )


def to_matrix(tensor: Tensor) -> Tensor:
    """(C, C, 1, 1) or (C, C) -> (C, C); shares memory. Raises WeightsError for other shapes."""
    _check_matrix(tensor)
    return tensor.reshape(tensor.shape[0], tensor.shape[1])


def to_convolution(tensor: Tensor) -> Tensor:
    """(C, C) or (C, C, 1, 1) -> (C, C, 1, 1); shares memory. Raises WeightsError for other shapes."""
    _check_matrix(tensor)
    return tensor.reshape(tensor.shape[0], tensor.shape[1], 1, 1)


def _check_matrix(tensor: Tensor) -> None:
    if tensor.ndim not in (2, 4) or tuple(tensor.shape[2:]) not in ((), (1, 1)):
        raise WeightsError(
            f"the VAE's attention has a tensor of shape {tuple(tensor.shape)}; expected a matrix"
        )


def undeprecate(name: str) -> str:
    """Today's name for attention layers that old diffusers files call query, key, value, proj_attn."""
    head, _, leaf = name.rpartition(".")
    module, _, layer = head.rpartition(".")
    return f"{module}.{_DEPRECATED[layer]}.{leaf}" if layer in _DEPRECATED else name


def ldm_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A KL autoencoder in LDM names (no prefix) -> ``AutoencoderKL``'s state dict. Tensors are shared."""
    renaming = kl_renaming(tensors, to="diffusers")
    return {
        new: to_matrix(tensors[old]) if is_attention_matrix(old) else tensors[old]
        for old, new in renaming.items()
    }


def diffusers_to_ldm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``AutoencoderKL``'s state dict -> LDM names without prefix. Tensors are shared."""
    renaming = kl_renaming(tensors, to="ldm")
    return {
        new: to_convolution(tensors[old]) if is_attention_matrix(old) else tensors[old]
        for old, new in renaming.items()
    }


def taesd_renaming(keys: Iterable[str], *, to: str) -> dict[str, str]:
    """The renaming of a TAESD's keys (without prefix) into the layout ``to`` ("taesd" or "diffusers").

    ``vae_scale`` and ``vae_shift``, which ComfyUI stores beside the weights, have no counterpart and are left
    out.
    """
    if to == "diffusers":
        rules = ((r"taesd_encoder\.(\d{1,4})\.", "encoder.layers.{}.", 0),
                 (r"taesd_decoder\.(\d{1,4})\.", "decoder.layers.{}.", -1))  # fmt: skip
    else:
        rules = ((r"encoder\.layers\.(\d{1,4})\.", "taesd_encoder.{}.", 0),
                 (r"decoder\.layers\.(\d{1,4})\.", "taesd_decoder.{}.", 1))  # fmt: skip
    renaming = {}
    for key in keys:
        if key in ("vae_scale", "vae_shift"):
            continue
        for pattern, template, shift in rules:
            if match := re.match(pattern, key):
                renaming[key] = template.format(int(match[1]) + shift) + key[match.end() :]
                break
        else:
            raise WeightsError(f"tensor {key!r} is not part of a TAESD autoencoder")
    return renaming


def taesd_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """TAESD names (no prefix) -> ``AutoencoderTiny``'s state dict. Tensors are shared."""
    return {new: tensors[old] for old, new in taesd_renaming(tensors, to="diffusers").items()}


def diffusers_to_taesd(
    tensors: Mapping[str, Tensor], *, vae_scale: float = SCALING_FACTOR, vae_shift: float = 0.0
) -> dict[str, Tensor]:
    """``AutoencoderTiny``'s state dict -> TAESD names, with the scale and shift that ComfyUI reads.

    Args:
        vae_scale, vae_shift: ComfyUI decodes unscaled latents z as (z - vae_shift) * vae_scale; a TAESD that
            works on scaled latents, as the published ones do, has the diffusion model's latent scale.
    """
    renamed = {new: tensors[old] for old, new in taesd_renaming(tensors, to="taesd").items()}
    return {**renamed, "vae_scale": torch.tensor(vae_scale), "vae_shift": torch.tensor(vae_shift)}


def taesd_scale(scaling_factor: float, shift_factor: float) -> tuple[float, float]:
    """ComfyUI's ``vae_scale`` and ``vae_shift`` of a TAESD whose scaled latents are (z - shift) * factor.

    ComfyUI's unscaled latents are z / vae_scale + vae_shift, where z is the network's output; multiplied by
    the latent format's constant they are what the diffusion model works on.
    """
    vae_scale = SCALING_FACTOR / scaling_factor
    return vae_scale, -shift_factor / vae_scale


def latent_scale(
    kind: VaeKind,
    stored: Mapping[str, str],
    tensors: Mapping[str, Tensor] | TensorSource,
    options: Mapping[str, Any],
) -> tuple[float, float]:
    """Scaling and shift factor: the diffusion model works on ``(z - shift) * scaling``.

    z is a KL autoencoder's mean, or the output of a TAESD's network.

    Args:
        stored: the VAE's own names -> those in ``tensors`` (:func:`strip_vae_prefix`).
        options: ``vae`` of the file's ``hydit.config``. The scale in a TAESD's tensors takes precedence.
    """
    if kind.layout != "taesd" or "vae_scale" not in stored:
        default = 1.0 if kind.architecture == "tiny" else SCALING_FACTOR
        return float(options.get("scaling_factor", default)), float(options.get("shift_factor") or 0.0)
    # ComfyUI defines a TAESD's unscaled latents as z / vae_scale + vae_shift, where z is the network's
    # output, and scales them by its latent format's constant.
    # In float32, as the file stores its own scale, so that equal ones give exactly 1.
    scaling = float(torch.tensor(SCALING_FACTOR))
    vae_scale = _single(tensors[stored["vae_scale"]], "vae_scale")
    vae_shift = _single(tensors[stored["vae_shift"]], "vae_shift") if "vae_shift" in stored else 0.0
    if vae_scale == 0:
        raise WeightsError("the TAESD's vae_scale is 0; expected what its latents are multiplied by")
    return scaling / vae_scale, -vae_shift * vae_scale


def _single(tensor: Tensor, name: str) -> float:
    if tensor.numel() != 1 or not torch.isfinite(tensor).all():
        raise WeightsError(f"the TAESD's {name} has shape {tuple(tensor.shape)}; expected one finite number")
    return float(tensor)


def kl_config(keys: Iterable[str], shape: Shape, *, norm_num_groups: int = 32) -> dict[str, Any]:
    """``AutoencoderKL`` arguments read from names and shapes in diffusers layout.

    Args:
        keys: names without prefix.
        shape: returns a tensor's shape by name.
        norm_num_groups: groups of the group norms, which shapes do not tell.
    """
    names = set(keys)
    levels = count_numbered(names, "encoder.down_blocks.")
    channels = [
        _convolution(shape, f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(levels)
    ]
    if uneven := [c for c in channels if c % norm_num_groups]:
        raise WeightsError(
            f"the VAE's {uneven[0]} channels cannot be split into {norm_num_groups} norm groups; the number "
            "of groups is not visible in the weights: give it as vae.norm_num_groups in the file's "
            "hydit.config or as norm_num_groups in the config.json beside it"
        )
    return {
        "in_channels": _convolution(shape, "encoder.conv_in.weight")[1],
        "out_channels": _convolution(shape, "decoder.conv_out.weight")[0],
        "latent_channels": _convolution(shape, "decoder.conv_in.weight")[1],
        "block_out_channels": channels,
        "layers_per_block": count_numbered(names, "encoder.down_blocks.0.resnets."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": norm_num_groups,
        "use_quant_conv": "quant_conv.weight" in names,
        "use_post_quant_conv": "post_quant_conv.weight" in names,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in names,
    }


def _tiny_stages(names: set[str], side: str) -> list[list[int]]:
    """Group the residual blocks' layer numbers by the plain convolutions between them."""
    stages: list[list[int]] = [[]]
    for layer in range(_tiny_layers(names, side)):
        if f"{side}.layers.{layer}.weight" in names:
            stages.append([])
        elif f"{side}.layers.{layer}.conv.0.weight" in names:
            stages[-1].append(layer)
    # A stage follows each convolution except the last, which makes the output.
    return stages[1:-1]


def tiny_config(keys: Iterable[str], shape: Shape) -> dict[str, Any]:
    """``AutoencoderTiny`` arguments read from names and shapes in diffusers layout (without prefix)."""
    names = set(keys)
    config: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        stages = _tiny_stages(names, side)
        if not stages or not all(stages):
            raise WeightsError(
                f"the TAESD has no complete {side}: expected convolutions with residual blocks between them; "
                "give a file with both taesd_encoder.* and taesd_decoder.*"
            )
        config[f"num_{side}_blocks"] = [len(stage) for stage in stages]
        config[f"{side}_block_out_channels"] = [
            _convolution(shape, f"{side}.layers.{stage[0]}.conv.0.weight")[0] for stage in stages
        ]
    config["in_channels"] = _convolution(shape, "encoder.layers.0.weight")[1]
    config["latent_channels"] = _convolution(shape, "decoder.layers.0.weight")[1]
    last = _tiny_layers(names, "decoder") - 1
    config["out_channels"] = _convolution(shape, f"decoder.layers.{last}.weight")[0]
    return config
