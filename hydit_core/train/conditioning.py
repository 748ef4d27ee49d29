"""Captions as the model takes them: tokens where the text encoders are trained, features where not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..text import TextEncoders, TextFeatures, Tokens

CACHE_BYTES = 2 << 30


class TextSource:
    """Tokens or features of a batch, each caption's computed once and remembered.

    Every caption is encoded alone, so what it becomes depends neither on its batch nor on what was
    remembered before an interruption.
    """

    def __init__(
        self,
        encoders: TextEncoders,
        device: torch.device,
        *,
        trained: bool,
        stored: Callable[[str], TextFeatures] | None = None,
    ) -> None:
        """``stored`` gives one text's features from disk; without it frozen encoders compute them."""
        self.encoders = encoders
        self.device = device
        self.trained = trained
        features = stored or encoders.encode
        self._memory = _Memory(self._tokens if trained else lambda text: features(text).to("cpu"))

    def __call__(self, texts: Sequence[str], texts_t5: Sequence[str]) -> Tokens | TextFeatures:
        """Texts for the two encoders -> the batch's tensors on the device.

        Tokens, for the encoders' forward, if they are trained; their features if not.
        """
        rows = [(*self._memory(b)[:2], *self._memory(t)[2:]) for b, t in zip(texts, texts_t5, strict=True)]
        columns = (torch.cat(column) for column in zip(*rows, strict=True))
        bert, bert_mask, t5, t5_mask = (c.to(self.device, non_blocking=True) for c in columns)
        if self.trained:
            return Tokens(bert, bert_mask, t5, t5_mask, reports=())
        return TextFeatures(bert, bert_mask, t5, t5_mask)

    def _tokens(self, text: str) -> tuple[Tensor, ...]:
        return self.encoders.tokenize(text)[:4]


class _Memory:
    """Results by text, the most recently used up to a size."""

    def __init__(self, make: Callable[[str], tuple[Tensor, ...]]) -> None:
        self.make = make
        self.used = 0
        self.kept: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()

    def __call__(self, text: str) -> tuple[Tensor, ...]:
        if text in self.kept:
            self.kept.move_to_end(text)
            return self.kept[text]
        made = self.make(text)
        self.kept[text] = made
        self.used += _bytes(made)
        while self.used > CACHE_BYTES and len(self.kept) > 1:
            self.used -= _bytes(self.kept.popitem(last=False)[1])
        return made


def _bytes(tensors: Sequence[Any]) -> int:
    return sum(t.nbytes for t in tensors)
