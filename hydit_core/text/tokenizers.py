"""Prompts to token numbers, exactly as HunyuanDiT was trained and is run by Tencent and diffusers.

A prompt is stripped, tokenized as a whole, cut to the encoder's length with the end token kept, and padded on
the right. No prompt syntax, no chunks. Cutting is reported, never silent.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordPiece

from ..errors import WeightsError
from .chunks import piece_starts, split
from .features import ChunkedTokens, PromptReport, TokenReport, Tokens

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_T5_END = 1
_WORD_START = "▁"
_EMBEDDING = "(embedding)"


class Tokenizers:
    """BERT's WordPiece and mT5's sentencepiece tokenizer.

    Args:
        vocab: the content of BERT's ``vocab.txt`` (UTF-8, one token per line).
        spiece_model: the content of mT5's ``spiece.model``.
        text_len, t5_len: tokens per prompt, begin and end tokens included.
        lowercase: whether BERT's vocabulary is lower-case.
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
        self.bert_tokens = ids
        """BERT's vocabulary: the number of every token."""
        self.bert_begin, self.bert_end, self.bert_pad = ids["[CLS]"], ids["[SEP]"], ids["[PAD]"]
        self.t5_end = _T5_END
        self._unknown = ids["[UNK]"]
        self._bert = _wordpiece(ids, lowercase)
        self._t5 = _sentencepiece(spiece_model)
        self.bert_size = max(ids.values()) + 1
        """Rows that BERT's embedding needs."""
        self.t5_size: int = self._t5.get_piece_size()
        """Rows that mT5's embedding needs."""

    def __call__(self, prompts: str | Sequence[str], prompts_t5: str | Sequence[str] | None = None) -> Tokens:
        """Tokenize B prompts; ``prompts_t5`` are mT5's, if they differ from BERT's.

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
        bert = [self._bert_pieces(text) for text in texts]
        t5 = [self._t5_pieces(text) for text in texts_t5]
        return Tokens(
            *_padded([self._bert_row(pieces.ids) for pieces in bert], self.text_len, self.bert_pad),
            *_padded([self._t5_row(pieces.ids) for pieces in t5], self.t5_len, self.t5_pad_id),
            reports=tuple(
                PromptReport(self._bert_report(b), self._t5_report(t)) for b, t in zip(bert, t5, strict=True)
            ),
        )

    def chunks(self, prompt: str, prompt_t5: str | None = None) -> ChunkedTokens:
        """Tokenize one prompt of any length; nothing is cut off.

        Each chunk is as long as possible without breaking a word. A prompt that fits is one chunk, with the
        same numbers as from calling this object.
        """
        bert, t5 = self._bert_pieces(prompt), self._t5_pieces(prompt if prompt_t5 is None else prompt_t5)
        bert_ranges = split(bert.starts, self.text_len - 2)
        t5_ranges = split(t5.starts, self.t5_len - 1)
        bert_rows = [self._bert_row(bert.ids[a:b]) for a, b in bert_ranges]
        t5_rows = [self._t5_row(t5.ids[a:b]) for a, b in t5_ranges]
        return ChunkedTokens(
            _padded(bert_rows, self.text_len, self.bert_pad)[0].tolist(),
            _padded(t5_rows, self.t5_len, self.t5_pad_id)[0].tolist(),
            PromptReport(self._bert_report(bert, len(bert_rows)), self._t5_report(t5, len(t5_rows))),
        )

    def report(self, bert: Sequence[int | None], t5: Sequence[int | None]) -> PromptReport:
        """How a prompt fits that was tokenized elsewhere, given without begin and end tokens.

        None stands for a vector that is not a token (a learned embedding). Unknown pieces are not named.
        """
        return PromptReport(
            TokenReport("BERT", len(bert) + 2, self.text_len, self._bert_text(bert[self.text_len - 2 :])),
            TokenReport("mT5", len(t5) + 1, self.t5_len, self._t5_text(t5[self.t5_len - 1 :])),
        )

    def bert_ranges(self, ids: Sequence[int | None]) -> list[tuple[int, int]]:
        """Chunks (begin, end) of a prompt that was tokenized elsewhere, given as to :meth:`report`."""
        names = {i: name for name, i in self.bert_tokens.items()}
        return split([i is None or not names[i].startswith("##") for i in ids], self.text_len - 2)

    def t5_ranges(self, ids: Sequence[int | None]) -> list[tuple[int, int]]:
        """As :meth:`bert_ranges`, for mT5."""
        pieces = [_WORD_START if i is None else self._t5.id_to_piece(i) for i in ids]
        return split(piece_starts(pieces), self.t5_len - 1)

    def bert_ids(self, text: str) -> list[int]:
        """The token numbers of a text of any length, without begin and end tokens."""
        return list(self._bert.encode(well_formed(text), add_special_tokens=False).ids)

    def _bert_pieces(self, text: str) -> _Pieces:
        text = well_formed(text).strip()
        encoding = self._bert.encode(text, add_special_tokens=False)
        words = encoding.word_ids
        return _Pieces(
            list(encoding.ids),
            [text[a:b] for a, b in encoding.offsets],
            [word is None or i == 0 or word != words[i - 1] for i, word in enumerate(words)],
            text[encoding.offsets[self.text_len - 2][0] :] if len(words) > self.text_len - 2 else "",
        )

    def _t5_pieces(self, text: str) -> _Pieces:
        text = well_formed(text).strip()
        pieces = self._t5.encode(text, out_type=str)
        return _Pieces(
            self._t5.encode(text, out_type=int),
            pieces,
            piece_starts(pieces),
            "".join(pieces[self.t5_len - 1 :]).replace(_WORD_START, " ").strip(),
        )

    def _bert_row(self, ids: list[int]) -> list[int]:
        return [self.bert_begin, *ids[: self.text_len - 2], self.bert_end]

    def _t5_row(self, ids: list[int]) -> list[int]:
        return [*ids[: self.t5_len - 1], _T5_END]

    def _bert_report(self, pieces: _Pieces, chunks: int = 1) -> TokenReport:
        return pieces.report("BERT", 2 * chunks, self.text_len, self._unknown, chunks)

    def _t5_report(self, pieces: _Pieces, chunks: int = 1) -> TokenReport:
        return pieces.report("mT5", chunks, self.t5_len, self._t5.unk_id(), chunks)

    def _bert_text(self, ids: Sequence[int | None]) -> str:
        names = {i: name for name, i in self.bert_tokens.items()}
        text = " ".join(_EMBEDDING if i is None else names[i] for i in ids)
        return text.replace(" ##", "").removeprefix("##")

    def _t5_text(self, ids: Sequence[int | None]) -> str:
        pieces = (f" {_EMBEDDING}" if i is None else self._t5.id_to_piece(i) for i in ids)
        return "".join(pieces).replace(_WORD_START, " ").strip()


class _Pieces(NamedTuple):
    """A text as tokens, without begin and end tokens."""

    ids: list[int]
    texts: list[str]
    starts: list[bool]
    """which begin a word"""
    cut: str
    """what does not fit at once"""

    def report(self, encoder: str, special: int, limit: int, unknown: int, chunks: int) -> TokenReport:
        return TokenReport(
            encoder=encoder,
            n_tokens=len(self.ids) + special,
            limit=limit,
            cut="" if chunks > 1 else self.cut,
            unknown=tuple(text for i, text in zip(self.ids, self.texts, strict=True) if i == unknown),
            chunks=chunks,
        )


def well_formed(text: str) -> str:
    """Replace halves of characters (lone surrogates), which no tokenizer reads, with U+FFFD.

    They come from web pages that cut a text in the middle of an emoji.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


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
    # Imported here, so that ComfyUI's nodes can import this module without it.
    from sentencepiece import SentencePieceProcessor

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
