"""Prompts as the token lists that ComfyUI's CLIP objects encode, for HunyuanDiT's two encoders.

Their form is ComfyUI's own: {"hydit_clip": chunks, "mt5xl": chunks}, where a chunk is [(token, weight), ...].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from inspect import getfile
from numbers import Integral
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import comfy.sd1_clip
import comfy.text_encoders.hydit
import torch
from comfy.text_encoders.spiece_tokenizer import SPieceTokenizer

from ...hydit_core.errors import ConfigError
from ...hydit_core.text.features import PromptReport
from ...hydit_core.text.tokenizers import Tokenizers, well_formed

Token = tuple[Any, float]
TokenLists = dict[str, list[list[Token]]]

BERT, MT5 = "hydit_clip", "mt5xl"
# As ComfyUI looks for it, in the text between two weights
_EMBEDDING = re.compile(r"(?:^|[ \n])embedding:(\S+)")


class HyDiTTokenizer:
    """A CLIP's tokenizer: ComfyUI's prompt syntax on top of our tokenizers.

    Args:
        exact: the tokenizers; prompts are padded at least to their lengths.
        widths: of BERT's and mT5's embeddings; ComfyUI refuses learned embeddings of other widths.
        positions: how many tokens BERT takes at once; longer prompts are encoded in chunks.
    """

    def __init__(
        self,
        exact: Tokenizers,
        widths: tuple[int, int],
        positions: int,
        embedding_directory: Any = None,
        tokenizer_data: Any = None,
    ) -> None:
        self.exact = exact
        self.hydit_clip = _BertTokenizer(exact, widths[0], positions, embedding_directory)
        self.mt5xl = _Mt5Tokenizer(exact, widths[1], embedding_directory)

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: Any) -> TokenLists:
        return {
            BERT: self.hydit_clip.tokenize_with_weights(text, return_word_ids, **options),
            MT5: self.mt5xl.tokenize_with_weights(text, return_word_ids, **options),
        }

    def untokenize(self, token_weight_pair: Sequence[Token]) -> list[tuple[Token, str]]:
        return self.hydit_clip.untokenize(token_weight_pair)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a saved file needs to tokenize: mT5's model, and BERT's vocabulary unless ComfyUI ships it."""
        tensors = {f"{MT5}.spiece_model": _tensor(self.exact.spiece_model)}
        if _lines(self.exact.vocab) != _lines(shipped_vocabulary()):
            tensors[f"{BERT}.vocab"] = _tensor(self.exact.vocab)
        return tensors


class _LearnedEmbeddings(comfy.sd1_clip.SDTokenizer):
    """Reads ComfyUI's "embedding:name"; embeddings that the encoder cannot use become no tokens."""

    def _try_get_embedding(self, embedding_name: str) -> Any:
        found = self._read(embedding_name)
        return (None, *found[1:]) if self._misfit(found[0]) else found

    def left_out(self, text: str) -> tuple[str, ...]:
        """The embeddings of a prompt that the encoder does not get, each with the reason."""
        names = [word for segment, _ in _segments(text) for word in _EMBEDDING.findall(segment)]
        reasons = {name: self._problem(name) for name in names}
        return tuple(f"embedding:{name.strip(',')} ({reason})" for name, reason in reasons.items() if reason)

    def _problem(self, name: str) -> str:
        vectors = self._read(name)[0]
        return "not found, or not readable" if vectors is None else self._misfit(vectors)

    def _read(self, name: str) -> Any:
        """(vectors or None, ..., the text after the name), as ComfyUI's method returns it."""
        try:
            return super()._try_get_embedding(name)
        except Exception as error:  # a file can make ComfyUI raise anything
            raise ConfigError(
                f"embedding:{name.strip()} in the prompt cannot be used: {type(error).__name__}: "
                f"{' '.join(str(error).split())}; write the name of a file in ComfyUI/models/embeddings, or "
                "remove it"
            ) from error

    def _misfit(self, vectors: Any) -> str:
        if vectors is None:
            return ""
        if not isinstance(vectors, torch.Tensor) or not 1 <= vectors.ndim <= 2 or not vectors.numel():
            return "its file holds no embedding"
        width = vectors.shape[-1]
        return "" if width == self.embedding_size else f"{width} wide, not {self.embedding_size}"


class _BertTokenizer(_LearnedEmbeddings):
    def __init__(self, exact: Tokenizers, width: int, positions: int, embedding_directory: Any) -> None:
        super().__init__(
            exact,
            tokenizer_class=_WordPiece,
            max_length=positions,
            min_length=exact.text_len,
            pad_token=exact.bert_pad,
            pad_with_end=False,
            pad_to_max_length=False,
            embedding_directory=embedding_directory,
            embedding_size=width,
            embedding_key="chinese_roberta",
        )

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: Any) -> Any:
        """As in ComfyUI, but the chunks of a prompt beyond BERT's positions are made equally long.

        (ComfyUI's own HunyuanDiT leaves their lengths as they are, and then cannot stack them.)
        """
        chunks = super().tokenize_with_weights(text, return_word_ids, **options)
        longest = max(len(chunk) for chunk in chunks)
        padding = (self.pad_token, 1.0, 0) if return_word_ids else (self.pad_token, 1.0)
        return [[*chunk, *[padding] * (longest - len(chunk))] for chunk in chunks]


class _Mt5Tokenizer(_LearnedEmbeddings):
    def __init__(self, exact: Tokenizers, width: int, embedding_directory: Any) -> None:
        super().__init__(
            exact.spiece_model,
            tokenizer_class=SPieceTokenizer,
            has_start_token=False,
            max_length=99999999,
            min_length=exact.t5_len,
            pad_with_end=False,
            pad_to_max_length=False,
            embedding_directory=embedding_directory,
            embedding_size=width,
            embedding_key=MT5,
        )


class _WordPiece:
    """Our WordPiece tokenizer with the interface that SDTokenizer expects."""

    def __init__(self, exact: Tokenizers) -> None:
        self._exact = exact

    @classmethod
    def from_pretrained(cls, exact: Tokenizers, **_: Any) -> _WordPiece:
        return cls(exact)

    def __call__(self, text: str) -> dict[str, list[int]]:
        exact = self._exact
        return {"input_ids": [exact.bert_begin, *exact.bert_ids(text), exact.bert_end]}

    def get_vocab(self) -> dict[str, int]:
        return self._exact.bert_tokens


@cache
def shipped_vocabulary() -> bytes:
    """The vocabulary of the published BERT, which comes with ComfyUI."""
    folder = Path(getfile(comfy.text_encoders.hydit)).parent
    return (folder / "hydit_clip_tokenizer" / "vocab.txt").read_bytes()


_REBUILT: WeakKeyDictionary[Any, Tokenizers] = WeakKeyDictionary()


def tokenizers_of(clip: Any) -> Tokenizers:
    """The tokenizers of a CLIP, ours or ComfyUI's own HunyuanDiT.

    Raises:
        ConfigError: it is another model's CLIP, or None.
    """
    if clip is None:
        raise ConfigError(
            "no CLIP came in: the checkpoint has no text encoders; load them with HyDiTTextEncoderLoader"
        )
    tokenizer = clip.tokenizer
    if isinstance(tokenizer, HyDiTTokenizer):
        return tokenizer.exact
    if not (hasattr(tokenizer, BERT) and hasattr(tokenizer, MT5)):
        encoders = ", ".join(name for name, _ in clip.cond_stage_model.named_children())
        family = type(clip.cond_stage_model).__name__.removesuffix("_").removesuffix("ClipModel")
        raise ConfigError(
            f"this CLIP is of {family} (encoders: {encoders}), not HunyuanDiT's BERT and mT5; take the CLIP "
            "of HyDiTTextEncoderLoader or of a HunyuanDiT checkpoint"
        )
    if tokenizer not in _REBUILT:
        _REBUILT[tokenizer] = _rebuilt(tokenizer)
    return _REBUILT[tokenizer]


def _rebuilt(tokenizer: Any) -> Tokenizers:
    """Our tokenizers, made from the data of ComfyUI's."""
    bert, mt5 = getattr(tokenizer, BERT), getattr(tokenizer, MT5)
    names = (bert.inv_vocab[i] for i in sorted(bert.inv_vocab))
    return Tokenizers(
        "\n".join(names).encode(),
        mt5.tokenizer.tokenizer.serialized_model_proto(),
        text_len=bert.min_length,
        t5_len=mt5.min_length,
        lowercase=bool(getattr(bert.tokenizer, "do_lower_case", True)),
    )


def exact_tokens(clip: Any, text: str, text_mt5: str | None = None) -> tuple[TokenLists, PromptReport]:
    """One plain prompt, cut to the lengths that the DiT was trained on, as Tencent and diffusers do.

    Args:
        text_mt5: another prompt for mT5.
    """
    tokens = tokenizers_of(clip)(text, text if text_mt5 is None else text_mt5)
    lists = {BERT: _plain(tokens.bert_ids.tolist()), MT5: _plain(tokens.t5_ids.tolist())}
    return lists, tokens.reports[0]


def long_tokens(clip: Any, text: str, text_mt5: str | None = None) -> tuple[TokenLists, PromptReport]:
    """One plain prompt of any length, in chunks of the lengths that the DiT was trained on."""
    chunks = tokenizers_of(clip).chunks(text, text_mt5)
    return {BERT: _plain(chunks.bert), MT5: _plain(chunks.t5)}, chunks.report


def weighted_tokens(clip: Any, text: str, text_mt5: str | None = None) -> tuple[TokenLists, PromptReport]:
    """One prompt in ComfyUI's syntax, cut to the lengths that the DiT was trained on.

    A prompt that fits gives what ComfyUI's own text nodes give.
    """
    exact = tokenizers_of(clip)
    bert, t5, report = _read_weighted(clip, text, text_mt5)
    return {BERT: [_bert_chunk(exact, bert)], MT5: [_t5_chunk(exact, t5)]}, report


def long_weighted_tokens(
    clip: Any, text: str, text_mt5: str | None = None
) -> tuple[TokenLists, PromptReport]:
    """One prompt in ComfyUI's syntax of any length, in chunks of the lengths that the DiT was trained on."""
    exact = tokenizers_of(clip)
    bert, t5, report = _read_weighted(clip, text, text_mt5)
    bert_chunks = [_bert_chunk(exact, bert[a:b]) for a, b in exact.bert_ranges(_numbers(bert))]
    t5_chunks = [_t5_chunk(exact, t5[a:b]) for a, b in exact.t5_ranges(_numbers(t5))]
    report = PromptReport(
        replace(report.bert, n_tokens=len(bert) + 2 * len(bert_chunks), cut="", chunks=len(bert_chunks)),
        replace(report.t5, n_tokens=len(t5) + len(t5_chunks), cut="", chunks=len(t5_chunks)),
    )
    return {BERT: bert_chunks, MT5: t5_chunks}, report


def _read_weighted(
    clip: Any, text: str, text_mt5: str | None
) -> tuple[list[Token], list[Token], PromptReport]:
    """Both encoders' tokens of a prompt of any length, without begin, end and padding, and what is cut."""
    exact = tokenizers_of(clip)
    text = well_formed(text)
    text_mt5 = text if text_mt5 is None else well_formed(text_mt5)
    lists: TokenLists = clip.tokenize(text)
    if text_mt5 != text:
        lists[MT5] = clip.tokenize(text_mt5)[MT5]
    begin, end = [(exact.bert_begin, 1.0)], [(exact.bert_end, 1.0)]
    bert = _content(lists[BERT], begin, end, exact.bert_pad)
    t5 = _content(lists[MT5], [], [(exact.t5_end, 1.0)], exact.t5_pad_id)
    report = exact.report(_numbers(bert), _numbers(t5))
    plain = exact(_without_syntax(text), _without_syntax(text_mt5)).reports[0]
    return (
        bert,
        t5,
        PromptReport(
            replace(report.bert, unknown=plain.bert.unknown, left_out=_left_out(clip, BERT, text)),
            replace(report.t5, unknown=plain.t5.unknown, left_out=_left_out(clip, MT5, text_mt5)),
        ),
    )


def _left_out(clip: Any, encoder: str, text: str) -> tuple[str, ...]:
    """Nothing for ComfyUI's own HunyuanDiT, which reads "embedding:name" as words."""
    tokenizer = getattr(clip.tokenizer, encoder)
    return tokenizer.left_out(text) if isinstance(tokenizer, _LearnedEmbeddings) else ()


def _bert_chunk(exact: Tokenizers, content: list[Token]) -> list[Token]:
    chunk = [(exact.bert_begin, 1.0), *content[: exact.text_len - 2], (exact.bert_end, 1.0)]
    return chunk + [(exact.bert_pad, 1.0)] * (exact.text_len - len(chunk))


def _t5_chunk(exact: Tokenizers, content: list[Token]) -> list[Token]:
    chunk = [*content[: exact.t5_len - 1], (exact.t5_end, 1.0)]
    return chunk + [(exact.t5_pad_id, 1.0)] * (exact.t5_len - len(chunk))


def _plain(rows: list[list[int]]) -> list[list[Token]]:
    return [[(token, 1.0) for token in row] for row in rows]


def _content(chunks: list[list[Token]], begin: list[Token], end: list[Token], pad: int) -> list[Token]:
    """The tokens of a prompt without the begin, end and padding tokens of its chunks."""
    content: list[Token] = []
    for chunk in chunks:
        stop = len(chunk)
        while stop and _is(chunk[stop - 1], pad):
            stop -= 1
        content += chunk[len(begin) : stop - len(end)]
    return content


def _is(token: Token, number: int) -> bool:
    return isinstance(token[0], Integral) and int(token[0]) == number


def _numbers(tokens: list[Token]) -> list[int | None]:
    """Token numbers; None for a learned embedding's vector."""
    return [int(token) if isinstance(token, Integral) else None for token, _ in tokens]


def _without_syntax(text: str) -> str:
    return "".join(_EMBEDDING.sub(" ", segment) for segment, _ in _segments(text))


def _segments(text: str) -> list[tuple[str, float]]:
    """The stretches of a text with the same weight, and their weights."""
    weighted = comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0)
    return [(comfy.sd1_clip.unescape_important(segment), weight) for segment, weight in weighted]


def _lines(vocabulary: bytes) -> bytes:
    """With the same line ends, whichever program wrote it."""
    return vocabulary.replace(b"\r\n", b"\n").rstrip(b"\n")


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
