"""Tokens and their reports, fresh encoders and their export, and errors that say what is wrong."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import TEXT, TINY, bert_vocab, randomize, spiece_model

from hydit_core.errors import ConfigError, HyditError, WeightsError
from hydit_core.facts import ModelInfo
from hydit_core.model.dit import DiT
from hydit_core.text.encoders import TextEncoders
from hydit_core.text.features import TextFeatures
from hydit_core.text.loading import load_text_encoders
from hydit_core.text.tokenizers import Tokenizers
from hydit_core.weights.bundle import bundle
from hydit_core.weights.save import save_checkpoint

LENGTHS = {"text_len": 12, "t5_len": 16}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
T5 = {"d_model": 24, "d_kv": 8, "d_ff": 40, "num_heads": 2, "num_layers": 2}


def tokenizers(**options: Any) -> Tokenizers:
    return Tokenizers(bert_vocab(), spiece_model(), **{**LENGTHS, **options})


def fresh(seed: int = 0, **t5: Any) -> TextEncoders:
    return TextEncoders.build(BERT, {**T5, **t5}, bert_vocab(), spiece_model(), **LENGTHS, seed=seed)


def export(encoders: TextEncoders, path: Path, **changes: Any) -> Path:
    parts = {**encoders.state_parts(), **changes}
    info = ModelInfo("v1.2", pooler_heads=TINY.pooler_heads, **encoders.info())
    save_checkpoint(path, dit=DiT(TINY).state_dict(), info=info, **parts)
    return path


def assert_same(a: TextFeatures, b: TextFeatures) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_short_prompt_is_padded_on_the_right() -> None:
    tokens = tokenizers()(["  红苹果 ", "a red apple"])
    vocab = bert_vocab().decode().splitlines()
    rows = [[vocab[i] for i in row] for row in tokens.bert_ids.tolist()]
    assert rows[0] == ["[CLS]", "红", "苹", "果", "[SEP]"] + ["[PAD]"] * 7
    assert rows[1] == ["[CLS]", "a", "red", "apple", "[SEP]"] + ["[PAD]"] * 7
    assert tokens.bert_mask.tolist() == [[1] * 5 + [0] * 7] * 2
    assert tokens.t5_ids.shape == tokens.t5_mask.shape == (2, 16)
    lengths = tokens.t5_mask.sum(1)
    for row, n in zip(tokens.t5_ids, lengths, strict=True):
        assert row[n - 1] == 1 and not row[n:].any() and 1 not in row[: n - 1]
    for (bert, t5), n in zip(tokens.reports, lengths, strict=True):
        assert not bert.truncated and not t5.truncated and (bert.cut, t5.cut) == ("", "")
        assert (bert.n_tokens, t5.n_tokens) == (5, n)


@pytest.mark.parametrize(
    ("prompt", "cut"),
    [
        ("a red apple, the blue heart on the left cat dog Tree house", "cat dog Tree house"),
        ("一张蓝色爱心的图片，小鸟，一个绿色的汽车", "小鸟，一个绿色的汽车"),
    ],
)
def test_what_is_cut_off_is_reported_and_the_end_token_kept(prompt: str, cut: str) -> None:
    tokens = tokenizers()(prompt)
    bert, t5 = tokens.reports[0]
    assert bert.truncated and bert.limit == 12 and bert.cut == cut
    assert tokens.bert_mask.all() and tokens.t5_mask.all()
    assert tokens.bert_ids[0, -1] == 3 and tokens.t5_ids[0, -1] == 1
    assert "at most 12 tokens" in str(bert) and cut in str(bert)
    # mT5's report: the tokens that are seen and what is cut make up the whole prompt.
    processor = sentencepiece.SentencePieceProcessor(model_proto=spiece_model())
    whole = processor.encode(prompt)
    assert t5.n_tokens == len(whole) + 1 and tokens.t5_ids[0, :-1].tolist() == whole[:15]
    assert prompt.replace("，", ",").endswith(t5.cut) and processor.encode(t5.cut)[-3:] == whole[-3:]


def test_a_prompt_that_fits_exactly_is_not_cut() -> None:
    ten = "red " * 10
    assert not tokenizers()(ten).reports[0].bert.truncated
    eleven = tokenizers()(ten + "cat").reports[0].bert
    assert eleven.truncated and (eleven.n_tokens, eleven.cut) == (13, "cat")


def test_unknown_words_are_named() -> None:
    bert, t5 = tokenizers()("a Zebra 龘 apple").reports[0]
    assert bert.unknown == ("Zebra", "龘") and "not in its vocabulary: Zebra 龘" in str(bert)
    assert any("龘" in piece for piece in t5.unknown)
    assert tokenizers()("a red apple").reports[0].bert.unknown == ()


def test_two_texts_for_two_encoders() -> None:
    both = tokenizers()(["cat"], ["dog"])
    assert torch.equal(both.bert_ids, tokenizers()("cat").bert_ids)
    assert torch.equal(both.t5_ids, tokenizers()("dog").t5_ids)
    with pytest.raises(ValueError, match="1 prompts for BERT but 2 for mT5"):
        tokenizers()(["cat"], ["dog", "cat"])


def test_training_pad_id_changes_padded_rows_only() -> None:
    encoders = fresh().eval()
    plain, training = tokenizers()("红苹果"), tokenizers(t5_pad_id=1)("红苹果")
    n = int(plain.t5_mask.sum())
    assert torch.equal(plain.t5_mask, training.t5_mask) and torch.equal(plain.bert_ids, training.bert_ids)
    assert (training.t5_ids[0, n:] == 1).all()
    with torch.no_grad():
        a, b = encoders(plain), encoders(training)
    torch.testing.assert_close(a.t5[:, :n], b.t5[:, :n], rtol=0, atol=1e-6)
    assert (a.t5[:, n:] - b.t5[:, n:]).abs().mean() > 0.1


def test_cased_vocabularies() -> None:
    vocab = bert_vocab() + b"Red\n"
    assert Tokenizers(vocab, spiece_model(), lowercase=False)("Red").reports[0].bert.unknown == ()
    assert Tokenizers(vocab, spiece_model(), lowercase=False)("RED").reports[0].bert.unknown == ("RED",)
    assert Tokenizers(vocab, spiece_model())("RED").reports[0].bert.unknown == ()


def test_fresh_encoders_follow_the_seed_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = fresh(), fresh(), fresh(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    assert not torch.equal(one.bert.encoder.layer[0].output.dense.weight,
                           other.bert.encoder.layer[0].output.dense.weight)  # fmt: skip


def test_gradients_reach_every_weight_of_both_encoders() -> None:
    encoders = fresh()
    features = encoders(encoders.tokenize(TEXT[:2]))
    (features.bert.square().mean() + features.t5.square().mean()).backward()
    assert [name for name, p in encoders.named_parameters() if p.grad is None] == []
    assert encoders.t5.shared.weight is encoders.t5.encoder.embed_tokens.weight
    assert not encoders.encode("red").bert.requires_grad


def test_export_and_loading_give_the_same_features(tmp_path: Path) -> None:
    unusual = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 6}
    encoders = fresh(feed_forward_proj="relu", **unusual).eval()
    randomize(encoders, 1, std=0.4)
    path = export(encoders, tmp_path / "model.safetensors")
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    assert "text_encoders.mt5xl.transformer.shared.weight" in names
    assert not [name for name in names if "embed_tokens" in name]
    loaded = load_text_encoders(path, **LENGTHS)
    assert_same(loaded.encode(TEXT), encoders.encode(TEXT))
    assert_same(load_text_encoders(bundle(path), **LENGTHS).encode(TEXT), encoders.encode(TEXT))
    assert loaded.info() == encoders.info()
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])
    # Loaded encoders can be trained: one embedding, gradients everywhere, the file untouched.
    before = path.read_bytes()
    loaded.requires_grad_(True).train()
    features = loaded(loaded.tokenize("a red apple"))
    (features.bert.sum() + features.t5.sum()).backward()
    torch.optim.SGD(loaded.parameters(), lr=1.0).step()
    assert loaded.t5.shared.weight is loaded.t5.encoder.embed_tokens.weight
    assert path.read_bytes() == before


def test_case_of_the_vocabulary_travels_in_the_metadata(tmp_path: Path) -> None:
    built = fresh()
    cased = Tokenizers(bert_vocab(), spiece_model(), lowercase=False, **LENGTHS)
    path = export(TextEncoders(built.bert, built.t5, cased), tmp_path / "cased.safetensors")
    assert load_text_encoders(path, **LENGTHS).tokenize("RED").reports[0].bert.unknown == ("RED",)


def test_the_published_file_has_no_bert_vocabulary(tmp_path: Path) -> None:
    path = export(fresh(), tmp_path / "all_in_one.safetensors", bert_vocab=None)
    with pytest.raises(WeightsError, match=r"(?s)all_in_one.safetensors.*vocab.txt.*t2i/tokenizer.*"):
        load_text_encoders(path, **LENGTHS)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "tokenizer").mkdir(parents=True)
    with pytest.raises(WeightsError, match=r"neither in .*elsewhere"):
        load_text_encoders(path, tokenizers=elsewhere, **LENGTHS)
    (elsewhere / "tokenizer" / "vocab.txt").write_bytes(bert_vocab())
    expected = fresh().eval().encode(TEXT)
    for place in (elsewhere, elsewhere / "tokenizer", elsewhere / "tokenizer" / "vocab.txt"):
        assert_same(load_text_encoders(path, tokenizers=place, **LENGTHS).encode(TEXT), expected)
    (tmp_path / "vocab.txt").write_bytes(bert_vocab())
    assert_same(load_text_encoders(path, **LENGTHS).encode(TEXT), expected)


@pytest.mark.parametrize("name", ["tokenizer/vocab.txt", "mt5/spiece.model"])
def test_an_empty_file_of_a_tokenizer(name: str, tmp_path: Path) -> None:
    """In Tencent's folders, whose tokenizers become tensors on the way."""
    tensors = load_file(export(fresh(), tmp_path / "all_in_one.safetensors"))
    folder = tmp_path / "model"
    for place, mark in (("clip_text_encoder", "hydit_clip.transformer."), ("mt5", "mt5xl.transformer.")):
        (folder / "t2i" / place).mkdir(parents=True)
        found = {key.split(mark)[1]: value for key, value in tensors.items() if mark in key}
        save_file(found, folder / "t2i" / place / "model.safetensors")
    (folder / "t2i/tokenizer").mkdir()
    (folder / "t2i/tokenizer/vocab.txt").write_bytes(bert_vocab())
    (folder / "t2i/mt5/spiece.model").write_bytes(spiece_model())
    assert load_text_encoders(folder, **LENGTHS).encode(TEXT)
    (folder / "t2i" / name).write_bytes(b"")
    with pytest.raises(WeightsError, match=r"(vocabulary|tokenizer|sentencepiece)"):
        load_text_encoders(folder, **LENGTHS)


def test_a_missing_sentencepiece_model_is_found_beside_the_file(tmp_path: Path) -> None:
    path = export(fresh(), tmp_path / "model.safetensors", spiece_model=None)
    with pytest.raises(WeightsError, match=r"(?s)mT5's tokenizer.*spiece.model.*mt5-xl"):
        load_text_encoders(path, **LENGTHS)
    (tmp_path / "spiece.model").write_bytes(spiece_model())
    expected = fresh().eval().encode(TEXT)
    assert_same(load_text_encoders(path, **LENGTHS).encode(TEXT), expected)
    assert_same(
        load_text_encoders(path, tokenizers=tmp_path / "spiece.model", **LENGTHS).encode(TEXT), expected
    )


def other_spiece(**ids: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 4), model_writer=model, vocab_size=80, hard_vocab_limit=False,
        minloglevel=2, **ids,
    )  # fmt: skip
    return model.getvalue()


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    def expect(match: str, error: type[HyditError] = WeightsError, **changes: Any) -> None:
        path = export(fresh(), tmp_path / "bad.safetensors", **changes)
        with pytest.raises(error, match=match):
            load_text_encoders(path, **LENGTHS)

    expect("bad.safetensors holds no mT5 text encoder", t5=None)
    expect("bad.safetensors holds no BERT and no mT5 text encoder", bert=None, t5=None)
    other_words = b"".join(b"word%d\n" % i for i in range(300))
    expect(r"BERT tokenizer has 3\d\d tokens.*different models", bert_vocab=bert_vocab() + other_words)
    expect(r"lacks \[CLS\], \[SEP\]", bert_vocab=b"[PAD]\n[UNK]\na\n")
    expect("not UTF-8", bert_vocab=b"\xff\xfe[PAD]")
    expect("spiece.model .9 bytes. cannot be read", spiece_model=b"not proto")
    expect("end token 2.*expected those of a T5 tokenizer", spiece_model=other_spiece())
    bert = fresh().state_parts()["bert"]
    del bert["encoder.layer.0.attention.self.key.bias"]
    expect("encoder.layer.0.attention.self.key.bias", bert=bert)
    bert.pop("embeddings.position_embeddings.weight")
    expect("text encoder is incomplete: embeddings.position_embeddings.weight", bert=bert)
    path = export(fresh(), tmp_path / "good.safetensors")
    with pytest.raises(ConfigError, match="BERT has 12 positions, fewer than the 77 tokens"):
        load_text_encoders(path)
    assert load_text_encoders(path, **LENGTHS).encode("cat").bert.shape == (1, 12, 32)


def test_fresh_encoders_take_the_lengths_of_the_published_model_by_default() -> None:
    encoders = TextEncoders.build(BERT, T5, bert_vocab(), spiece_model())
    tokens = encoders.tokenize(["a red apple", "cat"])
    assert tokens.bert_ids.shape == (2, 77) and tokens.t5_ids.shape == (2, 256)
    assert encoders.bert.config.max_position_embeddings == 77


def test_heads_default_to_64_wide(tmp_path: Path) -> None:
    wide = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    encoders = TextEncoders.build(wide, T5, bert_vocab(), spiece_model(), **LENGTHS).eval()
    path = export(encoders, tmp_path / "model.safetensors")
    tensors = load_file(path)
    save_file(tensors, tmp_path / "no_metadata.safetensors")
    loaded = load_text_encoders(tmp_path / "no_metadata.safetensors", **LENGTHS)
    assert loaded.bert.config.num_attention_heads == 2
    assert_same(loaded.encode(TEXT), encoders.encode(TEXT))
