"""Prompts as the token lists that ComfyUI's CLIP objects encode, for HunyuanDiT's two encoders.

What passes is ComfyUI's own: {"hydit_clip": chunks, "mt5xl": chunks}, a chunk being [(token, weight), ...].
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
_EMBEDDING = re.compile(r"(^|\s)embedding:\S+")


class HyDiTTokenizer:
    """What a CLIP tokenizes with: ComfyUI's prompt syntax over our tokenizers.

    Args:
        exact: the tokenizers, whose lengths are the least that a prompt is padded to.
        widths: of BERT's and mT5's embeddings; learned embeddings of another width are refused by ComfyUI.
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


class _BertTokenizer(comfy.sd1_clip.SDTokenizer):
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
        """As ComfyUI does; chunks of a prompt beyond BERT's positions are made equally long.

        (ComfyUI's own HunyuanDiT leaves them as they come, and cannot stack them.)
        """
        chunks = super().tokenize_with_weights(text, return_word_ids, **options)
        longest = max(len(chunk) for chunk in chunks)
        padding = (self.pad_token, 1.0, 0) if return_word_ids else (self.pad_token, 1.0)
        return [[*chunk, *[padding] * (longest - len(chunk))] for chunk in chunks]


class _Mt5Tokenizer(comfy.sd1_clip.SDTokenizer):
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
    """Our WordPiece tokenizer with the face that SDTokenizer expects."""

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
    """The vocabulary of the published BERT, which ComfyUI brings along."""
    folder = Path(getfile(comfy.text_encoders.hydit)).parent
    return (folder / "hydit_clip_tokenizer" / "vocab.txt").read_bytes()


_REBUILT: WeakKeyDictionary[Any, Tokenizers] = WeakKeyDictionary()


def tokenizers_of(clip: Any) -> Tokenizers:
    """The tokenizers of a CLIP, ours or ComfyUI's own HunyuanDiT.

    Raises:
        ConfigError: it is the CLIP of another model, or none.
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
    """Tokenizers from the data of ComfyUI's."""
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
    text = well_formed(text)
    text_mt5 = text if text_mt5 is None else well_formed(text_mt5)
    lists: TokenLists = clip.tokenize(text)
    if text_mt5 != text:
        lists[MT5] = clip.tokenize(text_mt5)[MT5]
    begin, end = [(exact.bert_begin, 1.0)], [(exact.bert_end, 1.0)]
    t5_end = [(exact.t5_end, 1.0)]
    bert = _content(lists[BERT], begin, end, exact.bert_pad)
    t5 = _content(lists[MT5], [], t5_end, exact.t5_pad_id)
    report = exact.report(_numbers(bert), _numbers(t5))
    plain = exact(_without_syntax(text), _without_syntax(text_mt5)).reports[0]
    report = PromptReport(
        replace(report.bert, unknown=plain.bert.unknown), replace(report.t5, unknown=plain.t5.unknown)
    )
    bert = [*begin, *bert[: exact.text_len - 2], *end]
    t5 = [*t5[: exact.t5_len - 1], *t5_end]
    bert += [(exact.bert_pad, 1.0)] * (exact.text_len - len(bert))
    t5 += [(exact.t5_pad_id, 1.0)] * (exact.t5_len - len(t5))
    return {BERT: [bert], MT5: [t5]}, report


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
    """None for a learned embedding's vector."""
    return [int(token) if isinstance(token, Integral) else None for token, _ in tokens]


def _without_syntax(text: str) -> str:
    segments = comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0)
    plain = "".join(comfy.sd1_clip.unescape_important(segment) for segment, _ in segments)
    return _EMBEDDING.sub(" ", plain)


def _lines(vocabulary: bytes) -> bytes:
    """Whatever wrote it, the same ends of lines."""
    return vocabulary.replace(b"\r\n", b"\n").rstrip(b"\n")


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
