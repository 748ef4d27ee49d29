"""ComfyUI's BERT and T5 with a file's dimensions and weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.text_encoders.bert
import comfy.text_encoders.hydit
import comfy.text_encoders.t5
import torch

from ...hydit_core.dtypes import FP8_DTYPES
from ...hydit_core.errors import ConfigError
from ...hydit_core.text.dimensions import LOWERCASE
from ...hydit_core.text.tokenizers import Tokenizers
from ...hydit_core.weights.load import check_names
from ...hydit_core.weights.source import TensorSource
from . import quantised

_COMFY_BUCKETS = 32
_CPU = torch.device("cpu")
# Matrices for look-ups, not products: the host would expand all of them from 8 bits for each prompt.
_TABLES = ("embeddings.", "shared.", "relative_attention_bias.")


class Bert(comfy.text_encoders.hydit.HyditBertModel):
    """BERT of any size, with the special tokens of its own vocabulary.

    Args:
        dimensions: :func:`~hydit_core.text.dimensions.bert_dimensions` of ``source``.

    Raises:
        WeightsError, ConfigError: the weights do not fit, or ComfyUI's BERT does not compute that.
    """

    def __init__(
        self,
        source: TensorSource,
        dimensions: Mapping[str, Any],
        tokenizers: Tokenizers,
        dtype: torch.dtype,
        model_options: Mapping[str, Any],
        packed: bool = False,
    ) -> None:
        model_options = _with_quantised(model_options, packed)
        config = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0, **dimensions}
        if config["hidden_act"] != "gelu":
            raise ConfigError(f"BERT's activation is {config['hidden_act']}, ComfyUI's BERT only has gelu")
        super().__init__(
            device="meta", dtype=dtype, model_options={**model_options, "hydit_clip_model_config": config}
        )
        self.special_tokens = {
            "start": tokenizers.bert_begin,
            "end": tokenizers.bert_end,
            "pad": tokenizers.bert_pad,
        }
        shell = comfy.text_encoders.bert.BertModel_(config, None, "meta", torch.nn)
        fill(self.transformer.bert, shell, source, dtype, packed=packed)

    def process_tokens(self, tokens: Any, device: Any) -> Any:
        """Let the mask reach to the last end token: a "[SEP]" written in a prompt does not end it."""
        embeds, mask, counts, info = super().process_tokens(tokens, device)
        for row, chunk in enumerate(tokens):
            ends = [i for i, token in enumerate(chunk) if isinstance(token, int) and token == self._end]
            if len(ends) > 1:
                counts[row] += ends[-1] - ends[0]
                mask[row, : counts[row]] = 1
        return embeds, mask, counts, info

    @property
    def _end(self) -> int:
        return int(self.special_tokens["end"])


class MT5(comfy.text_encoders.hydit.MT5XLModel):
    """mT5's encoder of any size.

    Args:
        dimensions: :func:`~hydit_core.text.dimensions.t5_dimensions` of ``source``.

    Raises:
        WeightsError, ConfigError: the weights do not fit, or ComfyUI's T5 does not compute that.
    """

    def __init__(
        self,
        source: TensorSource,
        dimensions: Mapping[str, Any],
        dtype: torch.dtype,
        model_options: Mapping[str, Any],
        packed: bool = False,
    ) -> None:
        model_options = _with_quantised(model_options, packed)
        config = {"model_type": "mt5", **dimensions}
        projection = config["feed_forward_proj"]
        if projection not in ("gated-gelu", "relu"):
            raise ConfigError(f"mT5's projection is {projection}; ComfyUI's T5 has gated-gelu and relu")
        gated = projection == "gated-gelu"
        config.update(is_gated_act=gated, dense_act_fn="gelu_pytorch_tanh" if gated else "relu")
        super().__init__(
            device="meta", dtype=dtype, model_options={**model_options, "mt5xl_model_config": config}
        )
        shell = comfy.text_encoders.t5.T5(config, None, "meta", torch.nn)
        for model, operations in ((self.transformer, self.operations), (shell, torch.nn)):
            _relative_bias(model, config, operations, dtype)
        for module in self.transformer.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = config.get("layer_norm_epsilon", 1e-6)
        fill(self.transformer, shell, source, dtype, packed=packed)


def _with_quantised(model_options: Mapping[str, Any], packed: bool) -> dict[str, Any]:
    """ComfyUI's options for an encoder, with its layers for quantised weights if it has such."""
    return {**model_options, **({"quantization_metadata": quantised.MIXED} if packed else {})}


def _relative_bias(model: Any, config: Mapping[str, Any], operations: Any, dtype: torch.dtype) -> None:
    """Set a file's numbers of relative positions, which are constants in ComfyUI's T5."""
    attention = model.encoder.block[0].layer[0].SelfAttention
    buckets = config["relative_attention_num_buckets"]
    attention.relative_attention_max_distance = config.get("relative_attention_max_distance", 128)
    attention.relative_attention_num_buckets = buckets
    if buckets != _COMFY_BUCKETS:
        attention.relative_attention_bias = operations.Embedding(
            buckets, config["num_heads"], device="meta", dtype=dtype
        ).requires_grad_(False)


class TextModel(comfy.text_encoders.hydit.HyditModel):
    """Both encoders, under the names that ComfyUI gives HunyuanDiT's."""

    def __init__(self, bert: Bert, mt5: MT5) -> None:
        torch.nn.Module.__init__(self)
        self.hydit_clip = bert
        self.mt5xl = mt5
        self.requires_grad_(False).eval()
        self.dtypes = {parameter.dtype for parameter in self.parameters()}


def encoder_info(model: Any, lowercase: bool = True) -> dict[str, dict[str, Any]]:
    """``bert`` and ``t5`` of a file's ModelInfo: what the shapes of a CLIP's encoders do not tell.

    Args:
        model: ours, or ComfyUI's own HyditModel.
        lowercase: whether BERT's vocabulary is lower-case.
    """
    bert, mt5 = model.hydit_clip.transformer.bert, model.mt5xl.transformer
    first = mt5.encoder.block[0].layer
    gated = hasattr(first[1].DenseReluDense, "wi_0")
    return {
        "bert": {
            "num_attention_heads": bert.encoder.layer[0].attention.self.heads,
            "hidden_act": "gelu",
            "layer_norm_eps": bert.embeddings.LayerNorm.eps,
            LOWERCASE: lowercase,
        },
        "t5": {
            "relative_attention_max_distance": first[0].SelfAttention.relative_attention_max_distance,
            "feed_forward_proj": "gated-gelu" if gated else "relu",
            "layer_norm_epsilon": mt5.encoder.final_layer_norm.variance_epsilon,
        },
    }


def fill(
    model: torch.nn.Module,
    shell: torch.nn.Module,
    source: TensorSource,
    dtype: torch.dtype,
    *,
    packed: bool = False,
) -> None:
    """Copy a model's weights into it, one tensor at a time.

    Args:
        shell: the same model with torch's own layers on the meta device. (The host's layers may come without
            parameters, and then do not say what they need.)
        dtype: of the weights; if it has 8 bits, only of the matrices.
        packed: see :func:`~.filling.fill`.

    Raises:
        WeightsError: listing tensors that are missing, unexpected or of another shape.
    """
    expected = {key: tuple(value.shape) for key, value in shell.state_dict().items()}
    check_names(expected, source)
    state: dict[str, torch.Tensor] = {}
    if packed:
        quantised.place(model, _CPU)
    # The largest first: it exists twice for a moment, which matters least while nothing else is loaded.
    for key in sorted(expected, key=source.nbytes, reverse=True):
        if packed and source.scheme(key):
            state |= quantised.entries(source, key, _CPU)
            source.release(key)
            continue
        kept = _kept(source, key, dtype)
        tensor = source.get(key, kept)
        # What was not cast may be a view of the file, which others may overwrite.
        state[key] = tensor.clone() if source.dtype(key) == kept else tensor
        source.release(key)
    model.load_state_dict(state, assign=True)


def _kept(source: TensorSource, key: str, dtype: torch.dtype) -> torch.dtype:
    matrix = len(source.shape(key)) == 2 and not any(name in key for name in _TABLES)
    return dtype if matrix or dtype not in FP8_DTYPES else torch.float16
