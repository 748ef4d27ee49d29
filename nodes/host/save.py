"""Saving models from a graph, so that our loaders, ComfyUI's own and hydit_core can open them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import folder_paths
import torch
from comfy.cli_args import args
from safetensors import SafetensorError

from ...hydit_core.dtypes import FP8_DTYPES
from ...hydit_core.errors import ConfigError, WeightsError
from ...hydit_core.facts import DiffusionConfig, ModelInfo
from ...hydit_core.model.config import DiTConfig
from ...hydit_core.new_files import atomic_path
from ...hydit_core.weights.modelspec import file_metadata
from ...hydit_core.weights.source import MemorySource
from ...hydit_core.weights.vae_layout import detect_vae
from .clip import encoder_info
from .model import model_info
from .tokens import BERT, MT5, tokenizers_of
from .vae import stored_tensors

log = logging.getLogger(__name__)

_BERT_WEIGHTS, _MT5_WEIGHTS = f"{BERT}.transformer.bert.", f"{MT5}.transformer."
# Keys of a ModelInfo's `vae` for which a VAE that runs in ComfyUI has only one value.
_FIXED = ("norm_num_groups", "act_fn")


def save_path(filename_prefix: str, suffix: str = ".safetensors") -> Path:
    """The next free name below ComfyUI's output folder, as its own nodes choose it.

    Args:
        filename_prefix: may have sub-folders and ``%year%``, ``%month%``, ``%day%`` ...
        suffix: the end of the name; empty for a folder.

    Raises:
        ConfigError: it leads out of the output folder, or the place cannot be used.
    """
    # As a path: after a trailing separator ComfyUI counts from 1 again and overwrites what is there.
    name = os.path.normpath(filename_prefix)
    if not name.strip(" /\\."):
        raise ConfigError(
            f"filename_prefix {filename_prefix!r} is not a name; use one such as checkpoints/hydit"
        )
    output = folder_paths.get_output_directory()
    try:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(name, output)
    except Exception as error:  # ComfyUI raises a plain Exception
        reason = error.strerror if isinstance(error, OSError) else "it leads out of the output folder"
        raise ConfigError(
            f"filename_prefix {filename_prefix!r} cannot be used in {output}: {reason}"
        ) from error
    # ComfyUI compares names case-sensitively; some file systems do not.
    while os.path.exists(path := Path(folder, f"{name}_{counter:05}_{suffix}")):
        counter += 1
    return path


def output_name(path: Path) -> str:
    """A file's name below ComfyUI's output folder, for display."""
    return path.relative_to(folder_paths.get_output_directory()).as_posix()


def save_model(
    path: Path,
    model: Any,
    clip: Any = None,
    vae: Any = None,
    *,
    prompt: Any = None,
    extra_pnginfo: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write a MODEL with its patches (LoRAs, merges) applied; with CLIP and VAE an all-in-one checkpoint.

    The names are those of ComfyUI's checkpoints. Tensors are written in the dtype that they are held in: what
    was loaded as 8-bit floats is 8-bit in the file. The file appears when it is complete; on any error or
    interruption, what was there before stays.

    Args:
        prompt, extra_pnginfo: the graph, which goes into the metadata unless ComfyUI was told not to.

    Returns:
        What the user should know about the file, one line each.

    Raises:
        ConfigError: MODEL, CLIP or VAE are not HunyuanDiT's, or do not belong together.
        WeightsError: the file cannot be written.
    """
    info = model_info(model)
    config, held = _held(model, info)
    if clip is not None:
        encoders = encoder_info(clip)
        info = replace(info, bert=encoders["bert"], t5=encoders["t5"])
        _check_clip(clip, config)
    if vae is not None:
        info = replace(info, vae={key: value for key, value in info.vae.items() if key not in _FIXED})
        _check_vae(vae, config)
    graph = {} if args.disable_metadata else graph_texts(prompt, extra_pnginfo)
    with atomic_path(path) as temporary, _info_in_metadata(model.model):
        try:
            comfy.sd.save_checkpoint(
                str(temporary),
                model,
                None if clip is None else _Clip(clip),
                None if vae is None else _Vae(vae),
                metadata=file_metadata(config, info, extra=graph),
            )
        except SafetensorError as error:
            raise WeightsError(f"cannot write {path}: {' '.join(str(error).split())}") from error
        comfy.model_management.throw_exception_if_processing_interrupted()
    log.info("hydit: saved %s", path)
    notes = _notes(held, info, config)
    for note in notes:
        log.warning("hydit: %s", note)
    return notes


@contextmanager
def _info_in_metadata(network: Any) -> Iterator[None]:
    """When this module saves, ``hydit_info`` is only in the metadata."""
    network.info_in_tensors = False
    try:
        yield
    finally:
        del network.info_in_tensors


def _held(model: Any, info: ModelInfo) -> tuple[DiTConfig, torch.dtype | None]:
    """A MODEL's dimensions, and the dtype of most of its weights, uint8 for quantised ones."""
    network = MemorySource(model.model.diffusion_model.state_dict())
    heads = {"pooler_heads": info.pooler_heads, "rope_base": info.rope_base}
    dtype = torch.uint8 if any(key.endswith(".comfy_quant") for key in network) else network.main_dtype()
    return DiTConfig.from_state_dict(network.shapes(), **heads), dtype


class _Clip:
    """A CLIP as :func:`comfy.sd.save_checkpoint` needs it: the encoders' weights and their tokenizers."""

    def __init__(self, clip: Any) -> None:
        self._clip = clip

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        return self._clip.load_model(*args, **kwargs)

    def get_sd(self) -> dict[str, torch.Tensor]:
        return self._complete(self._clip.get_sd())

    def state_dict_for_saving(self) -> dict[str, torch.Tensor]:  # called by newer versions
        return self._complete(self._clip.state_dict_for_saving())

    def _complete(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # ComfyUI's classes also have a logit_scale, which is in no HunyuanDiT file.
        kept = {key: value for key, value in tensors.items() if key.startswith((_BERT_WEIGHTS, _MT5_WEIGHTS))}
        tokenizers = tokenizers_of(self._clip)
        for name, data in (
            (f"{BERT}.vocab", tokenizers.vocab),
            (f"{MT5}.spiece_model", tokenizers.spiece_model),
        ):
            kept[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return kept


class _Vae:
    """A VAE as :func:`comfy.sd.save_checkpoint` needs it."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def get_sd(self) -> dict[str, torch.Tensor]:
        return stored_tensors(self._vae)


def _check_clip(clip: Any, config: DiTConfig) -> None:
    tensors = clip.cond_stage_model.state_dict()
    widths = (
        ("BERT", tensors[f"{_BERT_WEIGHTS}embeddings.word_embeddings.weight"].shape[1], config.text_dim),
        ("mT5", tensors[f"{_MT5_WEIGHTS}shared.weight"].shape[1], config.t5_dim),
    )
    for name, width, expected in widths:
        if width != expected:
            raise ConfigError(
                f"the CLIP's {name} is {width} wide, the MODEL expects {expected}: take the CLIP that the "
                "model was trained with"
            )


def _check_vae(vae: Any, config: DiTConfig) -> None:
    network = getattr(vae, "first_stage_model", None)
    if network is None or detect_vae(network.state_dict()) is None:
        what = f"is {type(network).__name__}"
    elif vae.latent_channels != config.in_channels:
        what = f"has {vae.latent_channels} latent channels, the MODEL {config.in_channels}"
    else:
        return
    raise ConfigError(
        f"this VAE {what}: it belongs to another model; take SDXL's, or that of a HunyuanDiT checkpoint"
    )


def graph_texts(prompt: Any, extra_pnginfo: Mapping[str, Any] | None) -> dict[str, str]:
    """The graph in metadata, as ComfyUI's own nodes write it."""
    texts = {key: json.dumps(value) for key, value in (extra_pnginfo or {}).items()}
    return {"prompt": "" if prompt is None else json.dumps(prompt), **texts}


def _notes(held: torch.dtype | None, info: ModelInfo, config: DiTConfig) -> list[str]:
    notes = []
    found, assumed = info.diffusion, ModelInfo.published(config.version).diffusion
    if found != assumed:
        notes.append(
            f"ComfyUI's own loaders take the file for one of {_diffusion(assumed)}, but it is of "
            f"{_diffusion(found)}: load it with HyDiTCheckpointLoader or HyDiTDiTLoader"
        )
    if held == torch.uint8:
        notes.append(
            "the DiT was saved with its quantised layers, as it was loaded; what patches changed was "
            "quantised again: load it with weight_dtype fp16 or bf16 to save it unpacked"
        )
    if held in FP8_DTYPES:
        notes.append(
            f"the DiT was saved in {str(held).removeprefix('torch.')}, as it was loaded; load it with "
            "weight_dtype default to save it in the precision of its file"
        )
    return notes


def _diffusion(config: DiffusionConfig) -> str:
    return f"{config.prediction}-prediction with betas {config.beta_start} to {config.beta_end}"
