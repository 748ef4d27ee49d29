"""HunyuanDiT's text encoders as a ComfyUI CLIP."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.sd
import folder_paths
import torch
from comfy.cli_args import args

from ...hydit_core.dtypes import HOST, dtype_of
from ...hydit_core.errors import ConfigError, HyditError, WeightsError
from ...hydit_core.text.dimensions import LOWERCASE, bert_dimensions, check_vocabulary, t5_dimensions
from ...hydit_core.text.tokenizer_files import spiece_of, vocabulary_of
from ...hydit_core.text.tokenizers import Tokenizers
from ...hydit_core.weights.bundle import Bundle, bundle
from ...hydit_core.weights.detect import what_to_do
from ...hydit_core.weights.source import TensorSource
from . import quantised
from .text_model import MT5, Bert, TextModel
from .text_model import encoder_info as _encoder_info
from .tokens import HyDiTTokenizer, TokenLists, shipped_vocabulary, tokenizers_of

_TEXT_LEN, _T5_LEN = 77, 256
# The size of BERT's vocabulary that ComfyUI ships.
_PUBLISHED_ROWS = 47020
# Vocabulary sizes of other encoders in mT5's layout, which users may mistake for mT5.
_OTHER_T5 = {32128: "T5 v1.1 (of SD3, Flux, PixArt ...)", 256384: "umT5 (of Wan, AuraFlow ...)"}
# A float32 mT5 of more bytes than this is held in the host's usual 16 bits, as Tencent runs it.
_LARGE = 2**30


def load_clip(
    bert: Bundle, mt5: Bundle | None = None, *, weight_dtype: str = "default", disable_dynamic: bool = False
) -> HyDiTCLIP:
    """BERT and mT5 from opened files or folders, as a CLIP for ComfyUI's own text nodes and ours.

    Prompts are padded to the lengths of the DiT in the same file, else to 77 and 256. Weights are copied, one
    tensor at a time; the host moves them between devices.

    Args:
        bert: what holds BERT. Its vocabulary is looked for in it, then beside it; for a BERT of the published
            size, ComfyUI's own is the fallback.
        mt5: what holds mT5 (default: ``bert``). Its sentencepiece model is looked for in it, then beside it.
        weight_dtype: one of :data:`~hydit_core.dtypes.HOST`, or "default": what the host was started with,
            else the file's own, but 16 bits for a large mT5 in float32. With 8 bits, embeddings, norms and
            biases stay in 16.
        disable_dynamic: use a patcher that loads weights at once, where ComfyUI would stream them.

    Raises:
        WeightsError: an encoder or its tokenizer is missing, damaged, another model's, or does not fit.
        ConfigError: ComfyUI's classes cannot compute it.
    """
    mt5 = bert if mt5 is None else mt5
    bert_source, mt5_source = _encoders(bert, mt5)
    bert_dims = _named(bert, bert_dimensions, bert_source, bert.info.bert)
    mt5_dims = _named(mt5, t5_dimensions, mt5_source, mt5.info.t5)
    tokenizers = _tokenizers(bert, mt5, bert_dims, mt5_dims)
    dtype = None if weight_dtype == "default" else dtype_of(weight_dtype)
    bert_dtype, mt5_dtype = dtype or _default(bert_source), dtype or _default(mt5_source, _LARGE)
    packed = [quantised.keeps(source, weight_dtype) for source in (bert_source, mt5_source)]

    def build(model_options: Mapping[str, Any], **_: Any) -> TextModel:
        return TextModel(
            _named(bert, Bert, bert_source, bert_dims, tokenizers, bert_dtype, model_options, packed[0]),
            _named(mt5, MT5, mt5_source, mt5_dims, mt5_dtype, model_options, packed[1]),
        )

    widths, positions = (bert_dims["hidden_size"], mt5_dims["d_model"]), bert_dims["max_position_embeddings"]
    tokenizer = partial(HyDiTTokenizer, tokenizers, widths, positions)
    clip = HyDiTCLIP(
        SimpleNamespace(params={}, clip=build, tokenizer=tokenizer),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        model_options={
            "dtype": mt5_dtype,
            # Filled here; the host moves the encoders to the device where they run.
            "initial_device": comfy.model_management.text_encoder_offload_device(),
        },
        **({"disable_dynamic": True} if disable_dynamic else {}),  # 0.3.64 streams no weights
    )
    if bert.path.exists() and mt5.path.exists():
        clip.patcher.cached_patcher_init = (_load_again, (bert.path, mt5.path, weight_dtype))
    return clip


def _load_again(bert: Path, mt5: Path, weight_dtype: str, disable_dynamic: bool = False) -> Any:
    """The same encoders again, which ComfyUI asks for where it cannot stream weights (hooks)."""
    opened = bundle(bert), bundle(mt5)
    return load_clip(*opened, weight_dtype=weight_dtype, disable_dynamic=disable_dynamic).patcher


class HyDiTCLIP(comfy.sd.CLIP):
    """A CLIP whose scheduled encoding (hooks over time) keeps mT5's features and the masks."""

    def clone(self, *args: Any, **kwargs: Any) -> HyDiTCLIP:
        other = super().clone(*args, **kwargs)
        other.__class__ = HyDiTCLIP
        return other

    def encode_from_tokens_scheduled(self, tokens: TokenLists, *args: Any, **kwargs: Any) -> Any:
        return encode(self, tokens, *args, **kwargs)


def encode(clip: Any, tokens: TokenLists, *args: Any, **kwargs: Any) -> list[Any]:
    """The CONDITIONING of tokens, by ComfyUI's ``CLIP.encode_from_tokens_scheduled``.

    That function drops mT5's features and both masks when hooks are scheduled; they are put back, each into
    the entry that it was encoded for. The clip may be ComfyUI's own.
    """
    recorder = _Recorder(clip.cond_stage_model)
    view = copy.copy(clip)
    view.cond_stage_model = recorder
    conditioning = comfy.sd.CLIP.encode_from_tokens_scheduled(view, tokens, *args, **kwargs)
    return [
        [features, {**extra, **options}]
        for (features, options), extra in zip(conditioning, recorder.extras, strict=True)
    ]


class _Recorder:
    """Encoders that record the third value of each of their results."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.extras: list[dict[str, Any]] = []

    def encode_token_weights(self, tokens: TokenLists) -> Any:
        encoded = self._model.encode_token_weights(tokens)
        self.extras.append(encoded[2])
        return encoded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def encoder_info(clip: Any) -> dict[str, dict[str, Any]]:
    """``bert`` and ``t5`` of :class:`~hydit_core.facts.ModelInfo` for a file that holds this CLIP.

    Raises:
        ConfigError: it is not a CLIP of HunyuanDiT.
    """
    return _encoder_info(clip.cond_stage_model, tokenizers_of(clip).lowercase)


def _encoders(bert: Bundle, mt5: Bundle) -> tuple[TensorSource, TensorSource]:
    if bert.bert is None:
        raise WeightsError(_other(bert, "BERT", "bert_name"))
    if mt5.mt5 is None:
        raise WeightsError(_other(mt5, "mT5", "mt5_name"))
    return bert.bert, mt5.mt5


def _other(opened: Bundle, wanted: str, widget: str) -> str:
    advice = {
        "bert": "give it as bert_name, and mT5 as mt5_name",
        "t5": "give it as mt5_name, and BERT as bert_name",
        "dit": "it has no text encoders in it: load them with HyDiTTextEncoderLoader",
    }
    what = f"{opened.path} is {opened.kind.name}; expected a file or folder with {wanted}"
    other = f"{what_to_do(opened.source, opened.kind)}; choose another {widget}"
    return f"{what}; {advice.get(opened.kind.kind, other)}"


def _tokenizers(
    bert: Bundle, mt5: Bundle, bert_dims: Mapping[str, Any], mt5_dims: Mapping[str, Any]
) -> Tokenizers:
    rows, mt5_rows = bert_dims["vocab_size"], mt5_dims["vocab_size"]
    if mt5_rows in _OTHER_T5:
        raise WeightsError(
            f"{mt5.path} is {_OTHER_T5[mt5_rows]} with a vocabulary of {mt5_rows}; expected mT5, whose "
            "vocabulary has 250112: choose HunyuanDiT's own"
        )
    vocabulary = vocabulary_of(bert, default=shipped_vocabulary() if rows == _PUBLISHED_ROWS else None)
    folders = [Path(folder) for folder in folder_paths.get_folder_paths("text_encoders")]
    spiece_model = spiece_of(mt5, after=folders)
    positions = bert_dims["max_position_embeddings"]
    text_len, t5_len = _length(bert, "text_len", min(_TEXT_LEN, positions)), _length(mt5, "t5_len", _T5_LEN)
    if text_len > positions:
        raise ConfigError(
            f"{bert.path}: BERT has {positions} positions, fewer than the {text_len} tokens that the DiT "
            "expects; it belongs to another model"
        )
    lowercase = True if vocabulary.lowercase is None else vocabulary.lowercase
    lowercase = bool(bert.info.bert.get(LOWERCASE, lowercase))
    try:
        tokenizers = Tokenizers(
            vocabulary.content, spiece_model, text_len=text_len, t5_len=t5_len, lowercase=lowercase
        )
    except WeightsError as error:
        places = " and ".join(dict.fromkeys((str(bert.path), str(mt5.path))))
        raise WeightsError(f"the tokenizers of {places}: {error}") from None
    _named(bert, check_vocabulary, "BERT", tokenizers.bert_size, rows)
    _named(mt5, check_vocabulary, "mT5", tokenizers.t5_size, mt5_rows)
    return tokenizers


def _length(opened: Bundle, name: str, default: int) -> int:
    """Tokens per prompt, as the DiT in the same place expects them."""
    config = opened.kind.config if opened.dit is not None else None
    return default if config is None else int(getattr(config, name))


def _default(source: TensorSource, large: float = float("inf")) -> torch.dtype:
    usual: torch.dtype = comfy.model_management.text_encoder_dtype(
        comfy.model_management.text_encoder_device()
    )
    if any(getattr(args, f"{name}_text_enc", False) for name in HOST):
        return usual
    own = source.main_dtype() or torch.float32
    wide = own.itemsize >= 4
    return usual if wide and sum(map(source.nbytes, source)) > large else torch.float32 if wide else own


def _named(opened: Bundle, call: Callable[..., Any], *arguments: Any) -> Any:
    """Call it; add the file's name to an error that lacks it."""
    try:
        return call(*arguments)
    except HyditError as error:
        if str(opened.path) in str(error):
            raise
        raise type(error)(f"{opened.path}: {error}") from None
