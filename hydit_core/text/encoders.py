"""The two text encoders of HunyuanDiT, as transformers implements them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..quiet import quiet_imports
from .dimensions import BERT_OPTIONS, LOWERCASE, T5_OPTIONS, check_vocabulary
from .features import TextFeatures, Tokens
from .tokenizers import Tokenizers

with quiet_imports():
    from transformers import BertConfig, BertModel, MT5Config, MT5EncoderModel


class TextEncoders(nn.Module):
    """BERT and an mT5 encoder with their tokenizers.

    Args:
        bert: without its pooling layer.
        t5: its last hidden state, after the final norm, is the feature.
        tokenizers: for these encoders.

    Raises:
        WeightsError: a tokenizer does not belong to its encoder.
        ConfigError: BERT has fewer positions than the tokenizers' ``text_len``.
    """

    def __init__(self, bert: BertModel, t5: MT5EncoderModel, tokenizers: Tokenizers) -> None:
        super().__init__()
        check_vocabulary("BERT", tokenizers.bert_size, bert.config.vocab_size)
        check_vocabulary("mT5", tokenizers.t5_size, t5.config.vocab_size)
        if bert.config.max_position_embeddings < tokenizers.text_len:
            raise ConfigError(
                f"BERT has {bert.config.max_position_embeddings} positions, fewer than the "
                f"{tokenizers.text_len} tokens that the DiT expects; it belongs to another model"
            )
        self.bert = bert
        self.t5 = t5
        self.tokenizers = tokenizers
        self.t5.set_input_embeddings(self.t5.shared)  # one table, even if loading made two

    @classmethod
    def build(
        cls,
        bert_config: Mapping[str, Any],
        t5_config: Mapping[str, Any],
        vocab: bytes,
        spiece_model: bytes,
        text_len: int = 77,
        t5_len: int = 256,
        *,
        seed: int = 0,
    ) -> TextEncoders:
        """New encoders in training mode, initialized as transformers does.

        Args:
            bert_config, t5_config: fields of ``BertConfig`` and ``MT5Config``; the vocabulary sizes default
                to the tokenizers', BERT's positions to ``text_len``.
            vocab, spiece_model: see :class:`~.tokenizers.Tokenizers`.
            seed: of the initial weights; the global random state is left alone.
        """
        tokenizers = Tokenizers(vocab, spiece_model, text_len=text_len, t5_len=t5_len)
        defaults = {"vocab_size": tokenizers.bert_size, "max_position_embeddings": text_len}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            bert = BertModel(BertConfig(**{**defaults, **bert_config}), add_pooling_layer=False)
            t5 = MT5EncoderModel(MT5Config(**{"vocab_size": tokenizers.t5_size, **t5_config}))
        return cls(bert, t5, tokenizers)

    @property
    def device(self) -> torch.device:
        """The device to compute on. Tables of embeddings may be elsewhere, see :mod:`~..offload.guests`."""
        return self.bert.embeddings.LayerNorm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """BERT's dtype; mT5's is ``t5.dtype``."""
        return self.bert.embeddings.word_embeddings.weight.dtype

    def tokenize(self, prompts: str | Sequence[str], prompts_t5: str | Sequence[str] | None = None) -> Tokens:
        """B prompts as token numbers, with a report of lengths and of what was cut (see :class:`Tokens`).

        ``prompts_t5`` are mT5's prompts, if they differ from BERT's.
        """
        return self.tokenizers(prompts, prompts_t5)

    def forward(self, tokens: Tokens) -> TextFeatures:
        """Hidden states of all rows, padded ones included, in the encoders' dtypes. Differentiable."""
        tokens = tokens.to(self.device)
        bert = self.bert(input_ids=tokens.bert_ids, attention_mask=tokens.bert_mask)
        t5 = self.t5(input_ids=tokens.t5_ids, attention_mask=tokens.t5_mask)
        return TextFeatures(bert.last_hidden_state, tokens.bert_mask, t5.last_hidden_state, tokens.t5_mask)

    @torch.no_grad()
    def encode(
        self, prompts: str | Sequence[str], prompts_t5: str | Sequence[str] | None = None
    ) -> TextFeatures:
        """Features of B prompts, without gradients; see :meth:`tokenize` and :meth:`forward`."""
        return self(self.tokenize(prompts, prompts_t5))

    def state_parts(self) -> dict[str, Any]:
        """The encoders as :func:`~..weights.save.save_checkpoint` takes them.

        ``bert`` and ``t5`` under transformers' names (mT5's embedding once), ``bert_vocab`` and
        ``spiece_model`` as bytes. Tensors are shared, not copied.
        """
        t5: dict[str, Tensor] = self.t5.state_dict()
        t5.pop("encoder.embed_tokens.weight", None)
        return {
            "bert": self.bert.state_dict(),
            "t5": t5,
            "bert_vocab": self.tokenizers.vocab,
            "spiece_model": self.tokenizers.spiece_model,
        }

    def info(self) -> dict[str, dict[str, Any]]:
        """``bert`` and ``t5`` of :class:`~..facts.ModelInfo`: what the encoders' shapes do not tell."""
        bert = {name: getattr(self.bert.config, name) for name in BERT_OPTIONS}
        return {
            "bert": {**bert, LOWERCASE: self.tokenizers.lowercase},
            "t5": {name: getattr(self.t5.config, name) for name in T5_OPTIONS},
        }
