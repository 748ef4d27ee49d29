"""Writing checkpoints that this project, ComfyUI and Tencent's code can open."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from ..dtypes import FP8_DTYPES
from ..facts import ModelInfo
from ..model.config import DiTConfig
from ..model.ip_adapter import IPAdapterConfig
from .detect import size_name
from .layouts import COMFY_PREFIX
from .modelspec import ARCHITECTURE, ARCHITECTURES, file_metadata
from .source import CastSource, MemorySource, MergedSource, TensorSource, as_source
from .views import rename
from .writer import save_safetensors

BERT_PREFIX = "text_encoders.hydit_clip.transformer.bert."
BERT_VOCAB = "text_encoders.hydit_clip.vocab"
MT5_PREFIX = "text_encoders.mt5xl.transformer."
SPIECE_MODEL = "text_encoders.mt5xl.spiece_model"
VAE_PREFIX = "vae."

Tensors = TensorSource | Mapping[str, torch.Tensor]


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    dit: Tensors,
    info: ModelInfo,
    bert: Tensors | None = None,
    t5: Tensors | None = None,
    spiece_model: bytes | None = None,
    bert_vocab: bytes | None = None,
    vae: Tensors | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a DiT, or an all-in-one checkpoint in ComfyUI's layout, atomically.

    A DiT alone is written under Tencent's names without a prefix. With any other part it is an all-in-one
    file: ``model.diffusion_model.*``, ``text_encoders.*``, ``vae.*``.

    Args:
        dit: Tencent's names. ``bert`` and ``t5``: the names of transformers' BertModel and MT5EncoderModel.
        vae: LDM or TAESD names.
        dtype: of all floating-point tensors; by default unchanged. For 8-bit floats see :func:`dtypes_for`.
        metadata: overrides what the file gets by itself (:func:`~.modelspec.file_metadata`).

    Raises:
        WeightsError: if the file cannot be written; what was there before is then still there.
    """
    dit = as_source(dit)
    dit_names = dit.keys()
    config = DiTConfig.from_state_dict(dit.shapes(), pooler_heads=info.pooler_heads, rope_base=info.rope_base)
    parts = other_parts(bert=bert, t5=t5, spiece_model=spiece_model, bert_vocab=bert_vocab, vae=vae)
    if parts:
        dit = rename(dit, lambda key: COMFY_PREFIX + key)
    source: TensorSource = MergedSource([dit, *parts], path=Path(path), metadata={})
    if dtype is not None:
        source = CastSource(source, dtypes_for(source, dtype))
    role = "controlnet" if "after_proj_list.0.weight" in dit_names else ""
    save_safetensors(path, source, file_metadata(config, info, role=role, extra=metadata))


def save_ip_adapter(
    path: str | os.PathLike[str],
    tensors: Tensors,
    info: ModelInfo,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an IP-Adapter under Tencent's names, atomically; ``info`` is what is known of its DiT.

    Raises:
        WeightsError: as :func:`save_checkpoint`.
    """
    source = as_source(tensors)
    config = IPAdapterConfig.from_state_dict(source.shapes())
    size = size_name(config.hidden_size, config.depth)
    title = f"HunyuanDiT-{size} {info.version} IP-Adapter"
    said = {"modelspec.sai_model_spec": "1.0.1", "modelspec.title": title, "hydit.version": info.version}
    said["modelspec.architecture"] = f"{ARCHITECTURES.get(size, ARCHITECTURE)}/ip-adapter"
    if dtype is not None:
        source = CastSource(source, dict.fromkeys(source, dtype))
    save_safetensors(path, source, {**said, "format": "pt", **(metadata or {})})


def other_parts(
    *,
    bert: Tensors | None = None,
    t5: Tensors | None = None,
    spiece_model: bytes | None = None,
    bert_vocab: bytes | None = None,
    vae: Tensors | None = None,
) -> list[TensorSource]:
    """What is beside the DiT in an all-in-one file, under the names that it has there."""
    parts: list[TensorSource] = []
    for prefix, tensors in ((BERT_PREFIX, bert), (MT5_PREFIX, t5), (VAE_PREFIX, vae)):
        if tensors is not None:
            parts.append(_prefixed(as_source(tensors), prefix))
    for name, content in ((BERT_VOCAB, bert_vocab), (SPIECE_MODEL, spiece_model)):
        if content is not None:
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0)
            parts.append(MemorySource({name: data.to(torch.uint8)}))
    return parts


def _prefixed(source: TensorSource, prefix: str) -> TensorSource:
    # transformers lists mT5's embedding twice; it is one tensor.
    twice = {"encoder.embed_tokens.weight"} if "shared.weight" in source else set()
    return rename(source, lambda key: None if key in twice else prefix + key)


def dtypes_for(source: TensorSource, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype that each floating-point tensor gets when a file is cast to ``dtype``.

    Only the matrices inside the DiT's blocks (96 % of DiT-g/2) are stored in an 8-bit float; norms, biases,
    embedders and the final layer, whose errors reach every token, keep 16 bits. Single numbers (a TAESD's
    scale) stay as they are.
    """
    plan: dict[str, torch.dtype] = {}
    for key in source:
        stored = source.dtype(key)
        if not stored.is_floating_point or not source.shape(key):
            continue
        in_block = key.removeprefix(COMFY_PREFIX).startswith("blocks.")
        if dtype not in FP8_DTYPES or (in_block and len(source.shape(key)) == 2):
            plan[key] = dtype
        elif stored.itemsize > 2:
            plan[key] = torch.float16
    return plan
