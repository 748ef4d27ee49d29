"""Prompts beyond the encoders' lengths, reports, and where tokenizers are sought."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from tiny import bert_vocab, spiece_model

from hydit_core.errors import WeightsError
from hydit_core.text.chunks import piece_starts, split
from hydit_core.text.tokenizer_files import spiece_of, vocabulary_of
from hydit_core.text.tokenizers import Tokenizers
from hydit_core.weights.bundle import Bundle, bundle

VOCAB = bert_vocab().decode().splitlines()
LONG = "a red apple, the blue heart on the left; cat dog tree house sun moon star fish " * 3
CHINESE = "一张蓝色爱心的图片，小鸟，一个绿色的汽车" * 3


def tokenizers(vocab: bytes | None = None) -> Tokenizers:
    return Tokenizers(vocab or bert_vocab(), spiece_model(), text_len=12, t5_len=16)


@pytest.mark.parametrize(
    ("starts", "room", "ranges"),
    [
        ("", 3, [(0, 0)]),
        ("110", 3, [(0, 3)]),
        ("1111", 3, [(0, 3), (3, 4)]),
        ("111011", 3, [(0, 2), (2, 5), (5, 6)]),
        ("1000000", 3, [(0, 3), (3, 6), (6, 7)]),
        ("1100001", 3, [(0, 1), (1, 4), (4, 7)]),
    ],
)
def test_ranges_are_as_long_as_words_allow(starts: str, room: int, ranges: list[tuple[int, int]]) -> None:
    assert split([c == "1" for c in starts], room) == ranges


def test_where_words_begin_in_sentencepiece() -> None:
    pieces = {
        "▁a": 1, "▁": 1, "R": 0, "ed": 0, "▁apple": 1, "-": 1, "t": 1, "ree": 0, ",": 1, "▁do": 1, "n": 0,
        "'": 0, "s": 0, " ": 1, "红": 1, "苹果": 1, "。": 1, "か": 1, "タ": 1, "é": 1, "ë": 0, "한": 0,
        "\uf900": 1, "㐀": 1, "鿿": 1, "ぁ": 1, "က": 1, "ក": 1, "ก": 1, "\U00020000": 1,
    }  # fmt: skip
    assert piece_starts(list(pieces)) == [bool(start) for start in pieces.values()]
    # The mark of a space and what follows it are one.
    assert piece_starts(["▁", "红", "苹"]) == [True, False, True]


@pytest.mark.parametrize("prompt", ["", "a red apple", "red " * 10, "一个绿色的汽车"])
def test_a_prompt_that_fits_is_one_chunk_and_the_same(prompt: str) -> None:
    prompt_t5 = prompt[:20]  # "red " five times fills mT5's row, ten times BERT's
    tokens, chunks = tokenizers()(prompt, prompt_t5), tokenizers().chunks(prompt, prompt_t5)
    assert len(chunks.bert) == len(chunks.t5) == 1
    assert [chunks.bert, chunks.t5] == [tokens.bert_ids.tolist(), tokens.t5_ids.tolist()]
    assert chunks.report == tokens.reports[0]


@pytest.mark.parametrize("prompt", [LONG, CHINESE, "apple, " * 20])
def test_chunks_hold_the_whole_prompt_and_break_no_word(prompt: str) -> None:
    vocab = bert_vocab() + b"##s\n##y\napple\n"
    tokenizer = tokenizers(vocab)
    chunks = tokenizer.chunks(prompt.replace("apple", "apples"))
    assert len(chunks.bert) > 2 and len(chunks.t5) > 2
    assert {len(row) for row in chunks.bert} == {12} and {len(row) for row in chunks.t5} == {16}
    bert, t5 = [], []
    for row in chunks.bert:
        end = row.index(3)
        assert row[0] == 2 and not any(row[end + 1 :])
        assert not vocab.decode().splitlines()[row[1]].startswith("##")
        bert += row[1:end]
    for row in chunks.t5:
        end = row.index(1)
        assert not any(row[end + 1 :])
        t5 += row[:end]
    processor = sentencepiece.SentencePieceProcessor(model_proto=spiece_model())
    assert t5 == processor.encode(prompt.replace("apple", "apples").strip())
    assert bert == tokenizer.bert_ids(prompt.replace("apple", "apples"))
    # Chinese may be cut between any two characters, so that only the last chunk has room left.
    if prompt == CHINESE:
        assert all(row[-1] == 3 for row in chunks.bert[:-1])
    report = chunks.report
    assert not report.truncated and (report.bert.cut, report.t5.cut) == ("", "")
    assert (report.bert.chunks, report.t5.chunks) == (len(chunks.bert), len(chunks.t5))
    assert report.bert.n_tokens == len(bert) + 2 * len(chunks.bert)
    assert f"BERT {report.bert.n_tokens} tokens in {len(chunks.bert)} chunks of 12, mT5 " in str(report)


def test_a_word_longer_than_a_chunk_is_broken() -> None:
    vocab = b"".join(b"##%c\n" % c for c in b"abc") + b"a\n"
    chunks = tokenizers(bert_vocab() + vocab).chunks("abc" * 8, "red")
    assert [sum(map(bool, row)) for row in chunks.bert] == [12, 12, 6]
    assert len(chunks.t5) == 1


def test_the_report_of_a_prompt() -> None:
    tokens = tokenizers()(LONG + " Zebra Zebra", "a red apple")
    first, cut, unknown = str(tokens.reports[0]).splitlines()
    assert first.startswith("BERT ") and "of 12 tokens, mT5 " in first and first.endswith("of 16 tokens")
    assert cut.startswith("BERT does not see: ; cat dog") and cut.endswith("Zebra Zebra")
    assert unknown.startswith("BERT does not know:") and unknown.count("Zebra") == 1
    assert tokens.reports[0].truncated and not tokens.reports[0].t5.truncated


def test_the_report_of_tokens_from_elsewhere() -> None:
    tokenizer = tokenizers(bert_vocab() + b"##s\n")
    bert = tokenizer.bert_ids("red cat red cat red cat red cat red cats dog")
    report = tokenizer.report([None, *bert, None], [5, None])
    assert report.bert.n_tokens == len(bert) + 4 and report.bert.cut == "cats dog (embedding)"
    assert report.t5.n_tokens == 3 and report.t5.cut == ""
    processor = sentencepiece.SentencePieceProcessor(model_proto=spiece_model())
    ids = processor.encode("a red apple a green car")
    report = tokenizer.report([], [*processor.encode("cat " * 20)[: 15 - 2], None, None, *ids, None])
    assert report.t5.cut == "a red apple a green car (embedding)"


def test_half_a_character_is_read_as_the_replacement_character() -> None:
    whole = tokenizers()("a \U0001f34e")
    assert torch.equal(tokenizers()("a \ud83c\udf4e").t5_ids, whole.t5_ids)
    half, chunks = tokenizers()("a \ud83c red"), tokenizers().chunks("a \ud83c red")
    assert torch.equal(half.t5_ids, tokenizers()("a \ufffd red").t5_ids)
    assert chunks.bert == half.bert_ids.tolist()


def encoder(path: Path, **more: bytes) -> Bundle:
    """A file that passes for a BERT and an mT5, as far as names go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {
        "text_encoders.hydit_clip.transformer.bert.": (
            "embeddings.word_embeddings.weight",
            "encoder.layer.0.attention.self.query.weight",
        ),
        "text_encoders.mt5xl.transformer.": (
            "shared.weight",
            "encoder.block.0.layer.0.SelfAttention.q.weight",
        ),
    }
    tensors = {prefix + name: torch.zeros(2, 2) for prefix, both in names.items() for name in both}
    data = {name: torch.frombuffer(bytearray(value), dtype=torch.uint8) for name, value in more.items()}
    save_file({**tensors, **data}, path)
    return bundle(path)


@pytest.mark.parametrize(
    "place",
    [
        "enc/mt5.fp16.spiece.model",
        "enc/mt5.fp16.model",
        "enc/spiece.model",
        "enc/tokenizer_2/spiece.model",
        "enc/mt5/spiece.model",
        "tokenizer_2/spiece.model",
        "last/spiece.model",
    ],
)
def test_where_a_sentencepiece_model_is_found(tmp_path: Path, place: str) -> None:
    opened = encoder(tmp_path / "enc" / "mt5.fp16.safetensors")
    after = [tmp_path / "last"]
    with pytest.raises(WeightsError) as error:
        spiece_of(opened, after=after)
    text = str(error.value)
    for name in ("mt5.fp16.spiece.model", "spiece.model", "tokenizer_2/spiece.model", "last/spiece.model"):
        assert name in text
    assert "mt5.fp16.safetensors" in text and "Put the spiece.model of google/mt5-xl" in text
    assert "\n" not in text
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_bytes(b"found")
    assert spiece_of(opened, after=after) == b"found"
    # What is in the file itself comes first, under any of the names that ComfyUI writes.
    for name in ("text_encoders.mt5xl.spiece_model", "mt5xl.spiece_model", "spiece_model"):
        inside = encoder(tmp_path / "enc" / "mt5.fp16.safetensors", **{name: b"inside"})
        assert spiece_of(inside, after=after) == b"inside"


def test_where_a_vocabulary_is_found(tmp_path: Path) -> None:
    opened = encoder(tmp_path / "enc" / "bert.safetensors")
    with pytest.raises(WeightsError) as error:
        vocabulary_of(opened)
    for name in ("bert.vocab.txt", "tokenizer/vocab.txt", "../tokenizer/vocab.txt"):
        assert name in str(error.value)
    assert vocabulary_of(opened, default=b"shipped").content == b"shipped"
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.txt").write_bytes(b"parent")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert vocabulary_of(opened, default=b"shipped") == (b"parent", False)
    (tmp_path / "enc" / "bert.vocab.txt").write_bytes(b"own")
    assert vocabulary_of(opened) == (b"own", None)
    inside = encoder(tmp_path / "enc" / "bert.safetensors", vocab=b"inside")
    assert vocabulary_of(inside) == (b"inside", None)
    assert vocabulary_of(inside, tmp_path / "tokenizer").content == b"parent"
