"""The data types that tokenizers, text encoders and the DiT exchange."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class TextFeatures(NamedTuple):
    """Hidden states of both encoders for B prompts. No row is zeroed or dropped.

    The DiT replaces masked rows, but its pooler reads all of mT5's rows, padding included
    (Tencent/HunyuanDiT, ``hydit/modules/poolers.py``): what stands in them changes the picture.
    """

    bert: Tensor
    """(B, L1, D1)"""
    bert_mask: Tensor
    """(B, L1) integers, 1 for tokens and 0 for padding"""
    t5: Tensor
    """(B, L2, D2)"""
    t5_mask: Tensor
    """(B, L2) integers"""

    @staticmethod
    def cat(features: Sequence[TextFeatures]) -> TextFeatures:
        """Join several batches into one."""
        return TextFeatures(*(torch.cat(parts) for parts in zip(*features, strict=True)))

    def to(self, device: torch.device | str) -> TextFeatures:
        return TextFeatures(*_moved(self, device))


def _moved(tensors: Iterable[Tensor], device: torch.device | str) -> list[Tensor]:
    """The tensors on ``device``. Copies to a GPU are asynchronous; copies from one have finished."""
    to_host = torch.device(device).type == "cpu"
    return [tensor.to(device, non_blocking=not to_host) for tensor in tensors]


@dataclass(frozen=True)
class TokenReport:
    """How one prompt fits one encoder."""

    encoder: str
    """"BERT" or "mT5"."""
    n_tokens: int
    """Tokens of the whole prompt, begin and end tokens included."""
    limit: int
    """The most tokens that the encoder takes at once, begin and end tokens included."""
    cut: str = ""
    """What the encoder does not see; for mT5 in its normalized spelling."""
    unknown: tuple[str, ...] = ()
    """Pieces of the prompt that are not in the vocabulary: the encoder cannot tell them apart."""
    left_out: tuple[str, ...] = ()
    """Embeddings that the prompt names but the encoder cannot use, each with the reason."""
    chunks: int = 1
    """How many times the encoder runs on this prompt, each time on at most ``limit`` tokens."""

    @property
    def truncated(self) -> bool:
        return self.n_tokens > self.limit * self.chunks

    @property
    def length(self) -> str:
        """For example "BERT 9 of 77 tokens"."""
        if self.chunks == 1:
            return f"{self.encoder} {self.n_tokens} of {self.limit} tokens"
        return f"{self.encoder} {self.n_tokens} tokens in {self.chunks} chunks of {self.limit}"

    def __str__(self) -> str:
        text = f"{self.encoder}: {self.n_tokens} of at most {self.limit} tokens"
        if self.truncated:
            text += f", cut off: {self.cut!r}"
        if self.unknown:
            text += f", not in its vocabulary: {' '.join(self.unknown)}"
        if self.left_out:
            text += f", left out: {', '.join(self.left_out)}"
        return text


class PromptReport(NamedTuple):
    """Both encoders' reports on one prompt."""

    bert: TokenReport
    t5: TokenReport

    @property
    def truncated(self) -> bool:
        return self.bert.truncated or self.t5.truncated

    def __str__(self) -> str:
        lines = [f"{self.bert.length}, {self.t5.length}"]
        lines += [f"{report.encoder} does not see: {report.cut}" for report in self if report.truncated]
        lines += [
            f"{report.encoder} is not given: {', '.join(report.left_out)}"
            for report in self
            if report.left_out
        ]
        for report in self:
            shown = (piece.strip(" ▁") for piece in report.unknown)
            if unknown := dict.fromkeys(piece if piece.isprintable() else ascii(piece) for piece in shown):
                lines.append(f"{report.encoder} does not know: {' '.join(unknown)}")
        return "\n".join(lines)


class ChunkedTokens(NamedTuple):
    """One prompt of any length as token numbers: rows of the encoders' full lengths, padded on the right."""

    bert: list[list[int]]
    """chunks of L1 numbers, each with its own begin and end token"""
    t5: list[list[int]]
    """chunks of L2 numbers, each with its own end token"""
    report: PromptReport


class Tokens(NamedTuple):
    """B prompts as token numbers, padded on the right to the encoders' full lengths."""

    bert_ids: Tensor
    """(B, L1) int64"""
    bert_mask: Tensor
    """(B, L1) int64, 1 for tokens and 0 for padding"""
    t5_ids: Tensor
    """(B, L2) int64"""
    t5_mask: Tensor
    """(B, L2) int64"""
    reports: tuple[PromptReport, ...]
    """one per prompt"""

    def to(self, device: torch.device | str) -> Tokens:
        bert_ids, bert_mask, t5_ids, t5_mask = _moved(self[:4], device)
        return Tokens(bert_ids, bert_mask, t5_ids, t5_mask, self.reports)
