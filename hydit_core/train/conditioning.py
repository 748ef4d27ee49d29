"""Captions as the model takes them: tokens if the text encoders are trained, features if not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..text.features import TextFeatures, Tokens

if TYPE_CHECKING:  # they bring transformers, which a configuration is checked without
    from ..text.encoders import TextEncoders
    from ..text.tokenizers import Tokenizers

CACHE_BYTES = 2 << 30


@dataclass
class CaptionFit:
    """How a run's captions fit one encoder."""

    encoder: str
    limit: int = 0
    captions: int = 0
    longest: int = 0
    cut: int = 0
    example: str = ""
    unknown: int = 0

    def lines(self) -> Iterator[str]:
        """For ``--dry-run``."""
        yield f"{self.encoder}: up to {self.longest} tokens, room for {self.limit}"
        if self.cut:
            yield f"  {self.cut} of {self.captions} captions are cut, for example: {self.example[:120]!r}"
        if self.unknown:
            yield f"  {self.unknown} captions hold words that it does not know"


def caption_fits(captions: Iterable[str], tokenizers: Tokenizers) -> list[CaptionFit]:
    """Tokenize captions and count what does not fit; one result per encoder."""
    fits: dict[str, CaptionFit] = {}
    for caption in captions:
        for report in tokenizers(caption).reports[0]:
            fit = fits.setdefault(report.encoder, CaptionFit(report.encoder, report.limit))
            fit.captions += 1
            fit.longest = max(fit.longest, report.n_tokens)
            fit.unknown += bool(report.unknown)
            fit.cut += report.truncated
            if report.truncated and not fit.example:
                fit.example = caption
    return list(fits.values())


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
