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
TOGETHER = 8
"""Texts that encoders on a GPU take at once."""


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


def merged(fits: Iterable[CaptionFit]) -> list[CaptionFit]:
    """Those of all captions, of those of parts of them in their order; one result per encoder."""
    found: dict[str, CaptionFit] = {}
    for fit in fits:
        total = found.setdefault(fit.encoder, CaptionFit(fit.encoder, fit.limit))
        total.captions += fit.captions
        total.longest = max(total.longest, fit.longest)
        total.cut += fit.cut
        total.example = total.example or fit.example
        total.unknown += fit.unknown
    return list(found.values())


class TextSource:
    """Tokens or features of a batch, each caption's computed once and remembered.

    What a caption becomes depends neither on its batch nor on what was remembered before an interruption: on
    a CPU, which gains nothing from company, each is encoded alone; on a GPU always in groups of one size,
    filled up with empty captions.
    """

    def __init__(
        self,
        encoders: TextEncoders,
        device: torch.device,
        *,
        trained: bool,
        stored: Callable[[str], TextFeatures] | None = None,
        together: int | None = None,
    ) -> None:
        """``stored`` gives one text's features from disk; without it frozen encoders compute them.

        ``together`` is how many texts they take at once; default: by the device.
        """
        self.encoders = encoders
        self.device = device
        self.trained = trained
        self.stored = stored
        self.together = together or (1 if device.type == "cpu" else TOGETHER)
        self._memory = _Memory()

    def __call__(self, texts: Sequence[str], texts_t5: Sequence[str]) -> Tokens | TextFeatures:
        """Texts for the two encoders -> the batch's tensors on the device.

        Tokens, for the encoders' forward, if they are trained; their features if not.
        """
        found = self._found({*texts, *texts_t5})
        rows = [(*found[b][:2], *found[t][2:]) for b, t in zip(texts, texts_t5, strict=True)]
        columns = (torch.cat(column) for column in zip(*rows, strict=True))
        bert, bert_mask, t5, t5_mask = (self._sent(column) for column in columns)
        if self.trained:
            return Tokens(bert, bert_mask, t5, t5_mask, reports=())
        return TextFeatures(bert, bert_mask, t5, t5_mask)

    def _sent(self, column: Tensor) -> Tensor:
        if self.device.type == "cuda":
            column = column.pin_memory()
        return column.to(self.device, non_blocking=True)

    def _found(self, texts: set[str]) -> dict[str, tuple[Tensor, ...]]:
        """Every text's tensors on the CPU, batch dimension 1; what is not remembered is made now."""
        found = {text: kept for text in texts if (kept := self._memory.get(text)) is not None}
        missing = sorted(texts - found.keys())
        size = 1 if self.trained or self.stored is not None else self.together
        for start in range(0, len(missing), size):
            group = missing[start : start + size]
            for text, made in zip(group, self._made(group, size), strict=False):
                found[text] = made
                self._memory.put(text, made)
        return found

    def _made(self, group: list[str], size: int) -> list[tuple[Tensor, ...]]:
        if self.trained:
            return [self.encoders.tokenize(group)[:4]]
        if self.stored is not None:
            return [self.stored(group[0]).to("cpu")]
        filled = group + [""] * (size - len(group))
        features = self.encoders.encode(filled).to("cpu")
        # Copies: a view would keep the whole group in memory for as long as one of it is remembered.
        return [tuple(part[row : row + 1].clone() for part in features) for row in range(len(group))]


class _Memory:
    """Results by text, the most recently used up to a size."""

    def __init__(self) -> None:
        self.used = 0
        self.kept: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()

    def get(self, text: str) -> tuple[Tensor, ...] | None:
        if text in self.kept:
            self.kept.move_to_end(text)
        return self.kept.get(text)

    def put(self, text: str, made: tuple[Tensor, ...]) -> None:
        self.kept[text] = made
        self.used += _bytes(made)
        while self.used > CACHE_BYTES and len(self.kept) > 1:
            self.used -= _bytes(self.kept.popitem(last=False)[1])


def _bytes(tensors: Sequence[Any]) -> int:
    return sum(t.nbytes for t in tensors)
