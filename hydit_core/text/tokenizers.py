"""Prompts to token numbers, exactly as HunyuanDiT was trained and is run by Tencent and diffusers.

A prompt is stripped, tokenized as a whole, cut to the encoder's length with the end token kept, and padded on
the right. No prompt syntax, no chunks. Cutting is reported, never silent.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordPiece

from ..errors import WeightsError
from .features import PromptReport, TokenReport, Tokens

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_T5_END = 1
_WORD_START = "▁"


class Tokenizers:
    """BERT's WordPiece and mT5's sentencepiece tokenizer.

    Args:
        vocab: the content of BERT's ``vocab.txt`` (UTF-8, one token a line).
        spiece_model: the content of mT5's ``spiece.model``.
        text_len, t5_len: tokens per prompt, begin and end tokens included.
        lowercase: whether BERT's vocabulary is a lower-case one.
        t5_pad_id: what pads mT5's input. Inference uses 0; Tencent's training used 1, which leaves the valid
            rows alone but changes the padded ones, which the DiT's pooler sees.

    Raises:
        WeightsError: a tokenizer's data is damaged or lacks special tokens.
    """

    def __init__(
        self,
        vocab: bytes,
        spiece_model: bytes,
        *,
        text_len: int = 77,
        t5_len: int = 256,
        lowercase: bool = True,
        t5_pad_id: int = 0,
    ) -> None:
        self.vocab = vocab
        self.spiece_model = spiece_model
        self.text_len = text_len
        self.t5_len = t5_len
        self.lowercase = lowercase
        self.t5_pad_id = t5_pad_id
        ids = _read_vocab(vocab)
        self._begin, self._end, self._pad = ids["[CLS]"], ids["[SEP]"], ids["[PAD]"]
        self._unknown = ids["[UNK]"]
        self._bert = _wordpiece(ids, lowercase)
        self._t5 = _sentencepiece(spiece_model)
        self.bert_size = max(ids.values()) + 1
        """Rows that BERT's embedding needs."""
        self.t5_size: int = self._t5.get_piece_size()
        """Rows that mT5's embedding needs."""

    def __call__(self, prompts: str | Sequence[str], prompts_t5: str | Sequence[str] | None = None) -> Tokens:
        """Tokenize B prompts; ``prompts_t5`` gives mT5 other texts than BERT.

        Raises:
            ValueError: the two lists differ in length.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if prompts_t5 is None:
            texts_t5 = texts
        else:
            texts_t5 = [prompts_t5] if isinstance(prompts_t5, str) else list(prompts_t5)
        if len(texts) != len(texts_t5):
            raise ValueError(f"{len(texts)} prompts for BERT but {len(texts_t5)} for mT5")
        bert = [self._bert_ids(text.strip()) for text in texts]
        t5 = [self._t5_ids(text.strip()) for text in texts_t5]
        return Tokens(
            *_padded([ids for ids, _ in bert], self.text_len, self._pad),
            *_padded([ids for ids, _ in t5], self.t5_len, self.t5_pad_id),
            reports=tuple(PromptReport(b, t) for (_, b), (_, t) in zip(bert, t5, strict=True)),
        )

    def _bert_ids(self, text: str) -> tuple[list[int], TokenReport]:
        encoding = self._bert.encode(text, add_special_tokens=False)
        ids, spans = encoding.ids, encoding.offsets
        room = self.text_len - 2
        report = TokenReport(
            encoder="BERT",
            n_tokens=len(ids) + 2,
            limit=self.text_len,
            cut=text[spans[room][0] :] if len(ids) > room else "",
            unknown=tuple(text[a:b] for i, (a, b) in zip(ids, spans, strict=True) if i == self._unknown),
        )
        return [self._begin, *ids[:room], self._end], report

    def _t5_ids(self, text: str) -> tuple[list[int], TokenReport]:
        ids = self._t5.encode(text, out_type=int)
        pieces = self._t5.encode(text, out_type=str)
        room = self.t5_len - 1
        unknown = self._t5.unk_id()
        report = TokenReport(
            encoder="mT5",
            n_tokens=len(ids) + 1,
            limit=self.t5_len,
            cut="".join(pieces[room:]).replace(_WORD_START, " ").strip(),
            unknown=tuple(piece for i, piece in zip(ids, pieces, strict=True) if i == unknown),
        )
        return [*ids[:room], _T5_END], report


def _padded(rows: list[list[int]], length: int, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers and mask, both (B, length) int64."""
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask


def _read_vocab(vocab: bytes) -> dict[str, int]:
    try:
        # Not splitlines(): a vocabulary may hold U+2028 and the like as tokens.
        lines = io.TextIOWrapper(io.BytesIO(vocab), encoding="utf-8").readlines()
    except UnicodeDecodeError as error:
        raise WeightsError(f"BERT's vocabulary is not UTF-8 text: {error}") from None
    ids = {line.rstrip("\n"): i for i, line in enumerate(lines)}
    missing = [token for token in _SPECIAL[:4] if token not in ids]
    if missing:
        raise WeightsError(
            f"BERT's vocabulary ({len(lines)} lines) lacks {', '.join(missing)}: expected a vocab.txt with "
            "one token a line"
        )
    return ids


def _wordpiece(ids: dict[str, int], lowercase: bool) -> Tokenizer:
    """BERT's basic tokenizer and WordPiece (Devlin et al. 2018), as transformers' BertTokenizer has them."""
    tokenizer = Tokenizer(WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=lowercase
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens([token for token in _SPECIAL if token in ids])
    return tokenizer


def _sentencepiece(model: bytes) -> SentencePieceProcessor:
    try:
        processor = SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise WeightsError(f"mT5's spiece.model ({len(model)} bytes) cannot be read: {error}") from None
    if processor.eos_id() != _T5_END or processor.unk_id() < 0:
        raise WeightsError(
            f"mT5's spiece.model has end token {processor.eos_id()} and unknown token {processor.unk_id()}; "
            "expected those of a T5 tokenizer (pad 0, end 1, unknown 2)"
        )
    return processor
