"""The dimensions of BERT and mT5, from their tensors' shapes: plain dictionaries, no transformers needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import WeightsError
from ..untrusted import count_numbered
from ..weights.source import TensorSource

#: What an encoder's shapes do not tell; stored in a file's ``hydit.config``.
BERT_OPTIONS = ("num_attention_heads", "hidden_act", "layer_norm_eps")
#: Whether BERT's vocabulary is lower-case; kept beside BERT_OPTIONS, named as in tokenizer_config.json.
LOWERCASE = "do_lower_case"
T5_OPTIONS = ("relative_attention_max_distance", "feed_forward_proj", "layer_norm_epsilon")
# An embedding may be padded to a round number of rows: mT5's has 12 more than its tokenizer has pieces.
_SPARE_ROWS = 128


def bert_dimensions(source: TensorSource, options: Mapping[str, Any]) -> dict[str, Any]:
    """BERT's dimensions, under the names of transformers' ``BertConfig``.

    ``options`` holds what shapes do not tell (:data:`BERT_OPTIONS`). By default heads are 64 wide, as in
    every published BERT.

    Raises:
        WeightsError: if a tensor that they are read from is missing, or the heads do not divide the width.
    """
    vocab, hidden = _shape(source, "embeddings.word_embeddings.weight")
    values: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": count_numbered(source, "encoder.layer."),
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
    return values


def t5_dimensions(source: TensorSource, options: Mapping[str, Any]) -> dict[str, Any]:
    """The dimensions of mT5's encoder, under the names of transformers' ``MT5Config``.

    ``options`` may hold :data:`T5_OPTIONS`. The relative bias has one column per head, so the heads'
    width need not be guessed.

    Raises:
        WeightsError: if a tensor that they are read from is missing.
    """
    vocab, d_model = _shape(source, "shared.weight")
    first = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = _shape(source, f"{first}relative_attention_bias.weight")
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in source
    inner = _shape(source, f"{first}q.weight")[0]
    if inner % heads:
        raise WeightsError(f"mT5's attention of width {inner} cannot be split into {heads} heads")
    values: dict[str, Any] = {
        "vocab_size": vocab,
        "d_model": d_model,
        "num_layers": count_numbered(source, "encoder.block."),
        "num_heads": heads,
        "d_kv": inner // heads,
        "d_ff": _shape(source, "encoder.block.0.layer.1.DenseReluDense.wo.weight")[1],
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }
    values.update({name: options[name] for name in T5_OPTIONS if name in options})
    farthest = values.get("relative_attention_max_distance", buckets)
    if buckets < 4 or farthest <= buckets // 4:
        raise WeightsError(
            f"mT5 has {buckets} relative positions and a largest distance of {farthest}: expected at least 4 "
            "positions, and a distance above a quarter of their number"
        )
    return values


def check_vocabulary(encoder: str, tokens: int, rows: int) -> None:
    """Check that a tokenizer with this number of tokens belongs to an embedding with this number of rows.

    Raises:
        WeightsError: if it has more tokens than rows, or far fewer.
    """
    if not tokens <= rows < tokens + _SPARE_ROWS:
        raise WeightsError(
            f"the {encoder} tokenizer has {tokens} tokens, the encoder's embedding {rows} rows: they "
            "belong to different models"
        )


def _shape(source: TensorSource, key: str) -> tuple[int, ...]:
    if key not in source:
        raise WeightsError(f"a text encoder is incomplete: {key} is missing")
    shape = source.shape(key)
    if len(shape) != 2 or 0 in shape:
        raise WeightsError(f"a text encoder's {key} has shape {shape}; expected a matrix")
    return shape
