"""Text encoders from a diffusers folder, from Tencent's ``t2i`` folder, or from an all-in-one checkpoint."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import BertConfig, BertModel, MT5Config, MT5EncoderModel

from ..config import ModelInfo
from ..errors import WeightsError
from ..weights.companions import vocabulary
from ..weights.load import assign_weights, compute_dtype
from ..weights.parts import Parts, bundle
from ..weights.source import CastSource, TensorSource
from ..weights.views import Piece, TensorView
from .encoders import BERT_OPTIONS, LOWERCASE, T5_OPTIONS, TextEncoders
from .tokenizers import Tokenizers

_VOCAB_FOLDERS = ("", "tokenizer", "t2i/tokenizer")
_SPIECE_FOLDERS = ("", "tokenizer_2", "mt5", "t2i/mt5")


def load_text_encoders(
    path_or_parts: str | os.PathLike[str] | Parts,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    text_len: int = 77,
    t5_len: int = 256,
    t5_dtype: torch.dtype | None = None,
    t5_pad_id: int = 0,
    tokenizers: str | os.PathLike[str] | None = None,
) -> TextEncoders:
    """Load BERT, mT5's encoder and their tokenizers, frozen and in eval mode.

    In float16 mT5's ``wo`` matrices stay float32, as transformers loads them: their outputs overflow.

    Args:
        path_or_parts: a diffusers pipeline's folder (``text_encoder/``, ``tokenizer/``, ``text_encoder_2/``,
            ``tokenizer_2/``), Tencent's ``t2i`` folder or the one above it, an all-in-one checkpoint, or its
            open parts.
        dtype: of the weights and features; default: each encoder's own in the file.
        t5_dtype: another one for mT5 (Tencent runs BERT in float32 and mT5 in float16).
        text_len, t5_len: tokens per prompt, as the DiT expects (``DiTConfig.text_len``, ``.t5_len``).
        t5_pad_id: see :class:`~.tokenizers.Tokenizers`.
        tokenizers: where to find ``vocab.txt`` and ``spiece.model`` instead: one of these files, a folder
            with them, or a pipeline's folder. Without it: in the checkpoint, then beside it.

    Raises:
        WeightsError: an encoder or a tokenizer is missing, damaged, or does not fit.
    """
    opened, info = _open(path_or_parts)
    missing = [name for name, part in (("BERT", opened.bert), ("mT5", opened.mt5)) if part is None]
    if opened.bert is None or opened.mt5 is None:
        raise WeightsError(
            f"{opened.path} holds no {' and no '.join(missing)} text encoder; give the text encoders "
            "separately: an all-in-one checkpoint, a diffusers folder or Tencent's t2i folder"
        )
    found = _tokenizer_files(opened, None if tokenizers is None else Path(tokenizers))
    lowercase = bool(info.bert.get(LOWERCASE, found.lowercase))
    try:
        tokenizer = Tokenizers(
            found.vocab,
            found.spiece_model,
            text_len=text_len,
            t5_len=t5_len,
            lowercase=lowercase,
            t5_pad_id=t5_pad_id,
        )
        bert = _load_bert(opened.bert, info.bert, dtype, device)
        t5 = _load_t5(opened.mt5, info.t5, t5_dtype or dtype, device)
        encoders = TextEncoders(bert, t5, tokenizer)
    except WeightsError as error:
        raise WeightsError(f"{opened.path}: {error}") from None
    return encoders.requires_grad_(False).eval()


def _open(path_or_parts: str | os.PathLike[str] | Parts) -> tuple[Parts, ModelInfo]:
    """The encoders' parts, and what their shapes do not tell."""
    opened = path_or_parts
    if not isinstance(opened, Parts):
        opened = bundle(opened, only=("bert", "t5"))
    # The version only picks defaults that do not concern the text encoders.
    return opened, opened.info or ModelInfo.from_metadata(opened.metadata, version="v1.2")


class _TokenizerFiles(NamedTuple):
    vocab: bytes
    spiece_model: bytes
    lowercase: bool


def _tokenizer_files(opened: Parts, given: Path | None) -> _TokenizerFiles:
    """Tokenizer data: from where the caller says, else inside the checkpoint, else beside it."""
    folder = opened.path if opened.path.is_dir() else opened.path.parent
    vocab, place = (None if given is None else _find_vocab(given)), given
    if vocab is None:
        vocab, place = opened.bert_vocab, (folder if opened.path.is_dir() else None)
    if vocab is None:
        vocab, place = _find_vocab(folder), folder
    spiece = (None if given is None else _find_spiece(given)) or opened.spiece_model or _find_spiece(folder)
    looked = f"in {given}, " if given is not None else ""
    if vocab is None:
        raise WeightsError(
            f"BERT's vocabulary was found neither {looked}in {opened.path} nor beside it. Put the vocab.txt "
            "of HunyuanDiT's BERT tokenizer (t2i/tokenizer/ in Tencent's repository, tokenizer/ in the "
            f"diffusers one) into {folder}, or give the folder that has it"
        )
    if spiece is None:
        raise WeightsError(
            f"mT5's tokenizer was found neither {looked}in {opened.path} nor beside it. Put the spiece.model "
            "of google/mt5-xl (t2i/mt5/ in Tencent's repository, tokenizer_2/ in the diffusers one) "
            f"into {folder}, or give the folder that has it"
        )
    return _TokenizerFiles(vocab, spiece, place is None or _is_lowercase(place))


def _find_vocab(place: Path) -> bytes | None:
    """BERT's vocabulary in or below a folder, or the file itself."""
    if place.is_file():
        return None if place.suffix == ".model" else place.read_bytes()
    for name in _VOCAB_FOLDERS:
        if (vocab := vocabulary(place / name)) is not None:
            return vocab
    return None


def _is_lowercase(place: Path) -> bool:
    """What the tokenizer's own settings say of its vocabulary; lower-case without them, as Tencent's is."""
    options = (_read_json(place / name / "tokenizer_config.json") for name in _VOCAB_FOLDERS)
    return next((bool(option[LOWERCASE]) for option in options if LOWERCASE in option), True)


def _find_spiece(place: Path) -> bytes | None:
    if place.is_file():
        return place.read_bytes() if place.suffix == ".model" else None
    for name in _SPIECE_FOLDERS:
        if (place / name / "spiece.model").is_file():
            return (place / name / "spiece.model").read_bytes()
    return None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{file} is not valid JSON: {error}") from None
    return values if isinstance(values, dict) else {}


def bert_config(source: TensorSource, options: Mapping[str, Any]) -> BertConfig:
    """BERT's dimensions from its shapes; ``options`` holds what shapes do not tell (:data:`BERT_OPTIONS`).

    Without it, heads are 64 wide, as in every published BERT.
    """
    vocab, hidden = _shape(source, "embeddings.word_embeddings.weight")
    values: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": _layers(source, r"encoder\.layer\.(\d+)\."),
        "intermediate_size": _shape(source, "encoder.layer.0.intermediate.dense.weight")[0],
        "max_position_embeddings": _shape(source, "embeddings.position_embeddings.weight")[0],
        "type_vocab_size": _shape(source, "embeddings.token_type_embeddings.weight")[0],
        "num_attention_heads": max(1, hidden // 64),
    }
    values.update({name: options[name] for name in BERT_OPTIONS if name in options})
    if hidden % values["num_attention_heads"]:
        raise WeightsError(
            f"BERT's hidden size {hidden} cannot be split into {values['num_attention_heads']} heads; give "
            "num_attention_heads in the file's hydit.config or in config.json"
        )
    return BertConfig(**values)


def t5_config(source: TensorSource, options: Mapping[str, Any]) -> MT5Config:
    """mT5's dimensions from its encoder's shapes; ``options`` may hold :data:`T5_OPTIONS`.

    The relative bias has one column a head, so the heads' width needs no guess.
    """
    vocab, d_model = _shape(source, "shared.weight")
    first = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = _shape(source, f"{first}relative_attention_bias.weight")
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in source
    values: dict[str, Any] = {
        "vocab_size": vocab,
        "d_model": d_model,
        "num_layers": _layers(source, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "d_kv": _shape(source, f"{first}q.weight")[0] // heads,
        "d_ff": _shape(source, "encoder.block.0.layer.1.DenseReluDense.wo.weight")[1],
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }
    values.update({name: options[name] for name in T5_OPTIONS if name in options})
    return MT5Config(**values)


def _shape(source: TensorSource, key: str) -> tuple[int, ...]:
    if key not in source:
        raise WeightsError(f"a text encoder is incomplete: {key} is missing")
    return source.shape(key)


def _layers(source: TensorSource, pattern: str) -> int:
    return 1 + max((int(match[1]) for key in source if (match := re.match(pattern, key))), default=-1)


def _load_bert(
    source: TensorSource, options: Mapping[str, Any], dtype: torch.dtype | None, device: str | torch.device
) -> BertModel:
    with torch.device("meta"):
        model = BertModel(bert_config(source, options), add_pooling_layer=False)
    view = _only(source, {key: key for key in model.state_dict()})
    assign_weights(model, view, dtype=dtype or compute_dtype(view), device=device)
    # The buffers are no part of a state dict: they must be made anew outside of the meta device.
    positions = torch.arange(model.config.max_position_embeddings, device=device).expand(1, -1)
    model.embeddings.register_buffer("position_ids", positions, persistent=False)
    model.embeddings.register_buffer("token_type_ids", torch.zeros_like(positions), persistent=False)
    return model


def _load_t5(
    source: TensorSource, options: Mapping[str, Any], dtype: torch.dtype | None, device: str | torch.device
) -> MT5EncoderModel:
    with torch.device("meta"):
        model = MT5EncoderModel(t5_config(source, options))
    names = {key: key for key in model.state_dict()}
    names["encoder.embed_tokens.weight"] = "shared.weight"
    view = _only(source, names)
    dtype = dtype or compute_dtype(view)
    kept = {key: torch.float32 for key in view if dtype == torch.float16 and key.endswith(".wo.weight")}
    plan = {key: kept.get(key, dtype) for key in view}
    assign_weights(model, CastSource(view, plan), dtype=None, device=device)
    return model


def _only(source: TensorSource, names: Mapping[str, str]) -> TensorSource:
    """The tensors of a model, by its names for them; what else there is (a pooler, a decoder) is left out."""
    return TensorView(source, {new: (Piece(key),) for new, key in names.items() if key in source})
