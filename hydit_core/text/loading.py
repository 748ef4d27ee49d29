"""Text encoders from a diffusers folder, from Tencent's ``t2i`` folder, or from an all-in-one checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import WeightsError
from ..quiet import quiet_imports
from ..weights.bundle import Bundle, Place, bundle
from ..weights.detect import what_to_do
from ..weights.load import assign_weights, compute_dtype
from ..weights.single import check_rest
from ..weights.source import CastSource, TensorSource
from ..weights.views import Piece, TensorView
from .dimensions import LOWERCASE, bert_dimensions, t5_dimensions
from .encoders import TextEncoders
from .tokenizer_files import spiece_of, vocabulary_of
from .tokenizers import Tokenizers

with quiet_imports():
    from transformers import BertConfig, BertModel, MT5Config, MT5EncoderModel


def load_text_encoders(
    path: Place,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    text_len: int = 77,
    t5_len: int = 256,
    t5_dtype: torch.dtype | None = None,
    t5_pad_id: int = 0,
    tokenizers: str | os.PathLike[str] | None = None,
    keep_quantised: bool = False,
    deferred: bool = False,
) -> TextEncoders:
    """Load BERT, mT5's encoder and their tokenizers, frozen and in eval mode.

    In float16 mT5's ``wo`` matrices stay float32, as transformers loads them: their outputs overflow.

    Args:
        path: a diffusers pipeline's folder (``text_encoder/``, ``tokenizer/``, ``text_encoder_2/``,
            ``tokenizer_2/``), Tencent's ``t2i`` folder or the one above it, an all-in-one checkpoint, or what
            was opened there.
        dtype: of the weights and features; by default each encoder's own in the file.
        t5_dtype: mT5's, if it is to differ (Tencent runs BERT in float32 and mT5 in float16).
        text_len, t5_len: tokens per prompt, as the DiT expects (``DiTConfig.text_len``, ``.t5_len``).
        t5_pad_id: see :class:`~.tokenizers.Tokenizers`.
        tokenizers: where to find ``vocab.txt`` and ``spiece.model`` instead: one of these files, a folder
            with them, or a pipeline's folder. By default they are sought in the checkpoint, then beside it.
        keep_quantised: see :func:`~..weights.load.load_dit`; products take the unpacked weights.
        deferred: read no weights yet: see :mod:`~..weights.unread`.

    Raises:
        WeightsError: an encoder or a tokenizer is missing, damaged, or does not fit.
    """
    opened = bundle(path, only=("bert", "t5"))
    info = opened.info
    missing = [name for name, part in (("BERT", opened.bert), ("mT5", opened.mt5)) if part is None]
    if opened.bert is None or opened.mt5 is None:
        other = "" if opened.kind.kind == "dit" else f"{what_to_do(opened.source, opened.kind)}; "
        raise WeightsError(
            f"{opened.path} holds no {' and no '.join(missing)} text encoder; it is {opened.kind.name}; "
            f"{other}give the text encoders separately: an all-in-one checkpoint, a diffusers folder or "
            "Tencent's t2i folder"
        )
    given = () if tokenizers is None else (Path(tokenizers),)
    tokenizer = load_tokenizers(opened, *given, text_len=text_len, t5_len=t5_len, t5_pad_id=t5_pad_id)
    how = {"keep_quantised": keep_quantised, "deferred": deferred}
    try:
        bert = _load_bert(opened.bert, info.bert, dtype, device, how)
        t5 = _load_t5(opened.mt5, info.t5, t5_dtype or dtype, device, how)
        encoders = TextEncoders(bert, t5, tokenizer)
    except WeightsError as error:
        raise WeightsError(f"{opened.path}: {error}") from None
    return encoders.requires_grad_(False).eval()


def load_tokenizers(
    opened: Bundle, *given: Path, text_len: int, t5_len: int, t5_pad_id: int = 0
) -> Tokenizers:
    """The tokenizers of an opened model, without its text encoders.

    Args:
        given: where to look for their files first; as ``tokenizers`` of :func:`load_text_encoders`.

    Raises:
        WeightsError: one is missing or damaged.
    """
    vocabulary, spiece_model = vocabulary_of(opened, *given), spiece_of(opened, *given)
    lowercase = True if vocabulary.lowercase is None else vocabulary.lowercase
    lowercase = bool(opened.info.bert.get(LOWERCASE, lowercase))  # lower-case by default, as Tencent's is
    lengths = {"text_len": text_len, "t5_len": t5_len}
    try:
        return Tokenizers(
            vocabulary.content, spiece_model, **lengths, lowercase=lowercase, t5_pad_id=t5_pad_id
        )
    except WeightsError as error:
        raise WeightsError(f"{opened.path}: {error}") from None


def bert_config(source: TensorSource, options: Mapping[str, Any]) -> BertConfig:
    """See :func:`~.dimensions.bert_dimensions`."""
    return BertConfig(**bert_dimensions(source, options))


def t5_config(source: TensorSource, options: Mapping[str, Any]) -> MT5Config:
    """See :func:`~.dimensions.t5_dimensions`."""
    return MT5Config(**t5_dimensions(source, options))


def _load_bert(
    source: TensorSource,
    options: Mapping[str, Any],
    dtype: torch.dtype | None,
    device: str | torch.device,
    how: Mapping[str, bool],
) -> BertModel:
    with torch.device("meta"):
        model = BertModel(bert_config(source, options), add_pooling_layer=False)
    view = _only(source, "bert", {key: key for key in model.state_dict()})
    dtype = dtype or compute_dtype(view)
    assign_weights(model, view, dtype=dtype, device=device, **how)
    # Buffers are not in the state dict: they have to be created again, outside the meta device.
    positions = torch.arange(model.config.max_position_embeddings, device=device).expand(1, -1)
    model.embeddings.register_buffer("position_ids", positions, persistent=False)
    model.embeddings.register_buffer("token_type_ids", torch.zeros_like(positions), persistent=False)
    return model


def _load_t5(
    source: TensorSource,
    options: Mapping[str, Any],
    dtype: torch.dtype | None,
    device: str | torch.device,
    how: Mapping[str, bool],
) -> MT5EncoderModel:
    with torch.device("meta"):
        model = MT5EncoderModel(t5_config(source, options))
    names = {key: key for key in model.state_dict()}
    names["encoder.embed_tokens.weight"] = "shared.weight"
    view = _only(source, "t5", names)
    dtype = dtype or compute_dtype(view)
    kept = {key: torch.float32 for key in view if dtype == torch.float16 and key.endswith(".wo.weight")}
    plan = {key: kept.get(key, dtype) for key in view}
    planned = CastSource(view, plan, packed=True)
    assign_weights(model, planned, dtype=None, device=device, **how)
    return model


def _only(source: TensorSource, part: str, names: Mapping[str, str]) -> TensorSource:
    """The tensors of a model under the names that it uses, without those that are known to be unused.

    Raises:
        WeightsError: there are unknown ones.
    """
    check_rest(source, part, set(names.values()))
    return TensorView(source, {new: (Piece(key),) for new, key in names.items() if key in source})
