"""Token numbers and features against transformers' own tokenizers and models, from every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import TINY, bert_vocab, randomize, spiece_model
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    MT5Config,
    MT5EncoderModel,
    MT5ForConditionalGeneration,
    T5EncoderModel,
)

from hydit_core.facts import ModelInfo
from hydit_core.model.dit import DiT
from hydit_core.text.encoders import TextEncoders
from hydit_core.text.features import TextFeatures
from hydit_core.text.loading import load_text_encoders
from hydit_core.text.tokenizers import Tokenizers
from hydit_core.weights.save import save_checkpoint

LENGTHS = {"text_len": 20, "t5_len": 28}
PROMPTS = [
    "a red apple",
    "  A Red APPLE, on the left!  ",
    "一个绿色的汽车",
    "一张red apple的图片，小鸟",
    "",
    "café naïve Ünïcode ｆｕｌｌ　ｗｉｄｔｈ",
    "unknown words 龘靐 zebra \U0001f34e",
    "line\nbreak\tand  spaces\u200bhere",
    "[SEP] a [MASK] red apple",
    "a (red:1.2) apple \\(plain\\)",
    "the blue heart " * 20,
    "一张蓝色爱心的图片，" * 9,
]


def bert_model() -> BertModel:
    config = BertConfig(
        vocab_size=bert_vocab().count(b"\n"),
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,  # not hidden / 64: must be told, not guessed
        intermediate_size=96,
        max_position_embeddings=40,
    )
    return randomize(BertModel(config, add_pooling_layer=False), 1, std=0.3)


def t5_model(cls: type = MT5EncoderModel) -> MT5EncoderModel:
    config = MT5Config(
        vocab_size=100,  # more rows than the tokenizer has pieces, as mT5 has
        d_model=48,
        d_kv=20,  # heads * d_kv is not d_model
        d_ff=80,
        num_heads=3,
        num_layers=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,  # shapes do not tell it
    )
    return randomize(cls(config), 2, std=0.3)


def write_tokenizers(bert: Path, t5: Path) -> None:
    for folder in (bert, t5):
        folder.mkdir(parents=True, exist_ok=True)
    (bert / "vocab.txt").write_bytes(bert_vocab())
    (t5 / "spiece.model").write_bytes(spiece_model())
    bert_options = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 20}
    t5_options = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 28}
    (bert / "tokenizer_config.json").write_text(json.dumps(bert_options), encoding="utf-8")
    (t5 / "tokenizer_config.json").write_text(json.dumps(t5_options), encoding="utf-8")


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text part of a diffusers HunyuanDiT pipeline, saved by transformers."""
    folder = tmp_path_factory.mktemp("diffusers")
    bert_model().save_pretrained(folder / "text_encoder")
    t5_model().save_pretrained(folder / "text_encoder_2")
    write_tokenizers(folder / "tokenizer", folder / "tokenizer_2")
    return folder


@pytest.fixture(scope="module")
def tencent_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tencent's layout: torch files, BERT inside a larger model, all of mT5 with its decoder."""
    t2i = tmp_path_factory.mktemp("tencent") / "t2i"
    bert, t5 = bert_model(), t5_model()
    whole = MT5ForConditionalGeneration(MT5Config.from_dict({**t5.config.to_dict(), "num_decoder_layers": 1}))
    whole.shared.load_state_dict(t5.shared.state_dict())
    whole.encoder.load_state_dict(t5.encoder.state_dict())
    clip = {f"bert.{name}": tensor for name, tensor in bert.state_dict().items()}
    clip["bert.pooler.dense.weight"] = torch.ones(64, 64)
    clip["visual.transformer.resblocks.0.ln_1.weight"] = torch.ones(8)
    clip["logit_scale"] = torch.ones(())
    for name, config, state in (
        ("clip_text_encoder", bert.config, clip),
        ("mt5", t5.config, whole.state_dict()),
    ):
        (t2i / name).mkdir(parents=True)
        torch.save(state, t2i / name / "pytorch_model.bin")
        config.save_pretrained(t2i / name)
    write_tokenizers(t2i / "tokenizer", t2i / "mt5")
    return t2i


@pytest.fixture(scope="module")
def all_in_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("all_in_one") / "model.safetensors"
    save_checkpoint(
        path,
        dit=DiT(TINY).state_dict(),
        bert=bert_model().state_dict(),
        t5=t5_model().state_dict(),
        bert_vocab=bert_vocab(),
        spiece_model=spiece_model(),
        info=ModelInfo(
            "v1.2",
            pooler_heads=TINY.pooler_heads,
            bert={"num_attention_heads": 4},
            t5={"relative_attention_max_distance": 20},
        ),
    )
    return path


def reference(folder: Path, prompts: list[str], dtype: torch.dtype = torch.float32) -> TextFeatures:
    """What diffusers' HunyuanDiT pipeline computes: everything padded, every row of the last hidden state."""
    outputs = []
    for number, model_class, tokenizer_class, length in (
        ("", BertModel, BertTokenizer, LENGTHS["text_len"]),
        ("_2", MT5EncoderModel, AutoTokenizer, LENGTHS["t5_len"]),
    ):
        options = {} if number else {"add_pooling_layer": False}
        model = model_class.from_pretrained(folder / f"text_encoder{number}", dtype=dtype, **options).eval()
        tokenizer = tokenizer_class.from_pretrained(folder / f"tokenizer{number}")
        encoded = tokenizer(
            [prompt.strip() for prompt in prompts],
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            hidden = model(encoded.input_ids, attention_mask=encoded.attention_mask)[0]
        outputs += [hidden, encoded.attention_mask]
    return TextFeatures(*outputs)


def assert_same(ours: TextFeatures, theirs: TextFeatures) -> None:
    for name, a, b in zip(TextFeatures._fields, ours, theirs, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


def test_token_numbers_are_those_of_transformers(pipeline_folder: Path) -> None:
    tokenizers = Tokenizers(bert_vocab(), spiece_model(), **LENGTHS)
    bert = BertTokenizer.from_pretrained(pipeline_folder / "tokenizer")
    t5 = AutoTokenizer.from_pretrained(pipeline_folder / "tokenizer_2")
    for prompt in PROMPTS:
        tokens = tokenizers(prompt)
        for tokenizer, length, ids, mask, report in (
            (bert, 20, tokens.bert_ids, tokens.bert_mask, tokens.reports[0].bert),
            (t5, 28, tokens.t5_ids, tokens.t5_mask, tokens.reports[0].t5),
        ):
            options = {"padding": "max_length", "max_length": length, "truncation": True}
            expected = tokenizer(prompt.strip(), **options)
            assert ids[0].tolist() == expected.input_ids, prompt
            assert mask[0].tolist() == expected.attention_mask, prompt
            assert report.n_tokens == len(tokenizer(prompt.strip()).input_ids), prompt


def test_features_of_a_diffusers_folder_are_bit_equal_to_transformers(pipeline_folder: Path) -> None:
    encoders = load_text_encoders(pipeline_folder, **LENGTHS)
    ours = encoders.encode(PROMPTS)
    assert_same(ours, reference(pipeline_folder, PROMPTS))
    # Padded rows are features too: neither zero nor alike.
    padding = ours.t5[0][ours.t5_mask[0] == 0]
    assert padding.abs().mean() > 0.1 and ours.bert[4][2:].abs().mean() > 0.1
    # MT5EncoderModel is what diffusers names; T5EncoderModel computes the same.
    t5 = T5EncoderModel.from_pretrained(pipeline_folder / "text_encoder_2").eval()
    tokens = encoders.tokenize(PROMPTS)
    with torch.no_grad():
        hidden = t5(tokens.t5_ids, attention_mask=tokens.t5_mask)[0]
    torch.testing.assert_close(ours.t5, hidden, rtol=1e-5, atol=1e-5)


def test_every_layout_gives_the_same_features(
    pipeline_folder: Path, tencent_folder: Path, all_in_one: Path
) -> None:
    expected = reference(pipeline_folder, PROMPTS)
    for path in (tencent_folder, tencent_folder.parent, all_in_one):
        assert_same(load_text_encoders(path, **LENGTHS).encode(PROMPTS), expected)


def test_wrong_heads_or_distances_would_show(pipeline_folder: Path, tmp_path: Path) -> None:
    """The bit-equality above depends on values that only config.json or the metadata tell."""
    expected = reference(pipeline_folder, PROMPTS)
    save_checkpoint(
        tmp_path / "bare.safetensors",
        dit=DiT(TINY).state_dict(),
        **TextEncoders(
            bert_model(), t5_model(), Tokenizers(bert_vocab(), spiece_model(), **LENGTHS)
        ).state_parts(),
        info=ModelInfo("v1.2", pooler_heads=TINY.pooler_heads),
    )
    guessed = load_text_encoders(tmp_path / "bare.safetensors", **LENGTHS).encode(PROMPTS)
    assert not torch.allclose(guessed.bert, expected.bert, atol=1e-2)
    assert not torch.allclose(guessed.t5, expected.t5, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_follows_transformers(pipeline_folder: Path, dtype: torch.dtype) -> None:
    encoders = load_text_encoders(pipeline_folder, dtype=dtype, **LENGTHS)
    dtypes = {(name.split(".")[-2] == "wo", p.dtype) for name, p in encoders.t5.named_parameters()}
    assert dtypes == {(True, torch.float32 if dtype == torch.float16 else dtype), (False, dtype)}
    assert_same(encoders.encode(PROMPTS[:4]), reference(pipeline_folder, PROMPTS[:4], dtype))


def test_mixed_dtypes_as_tencent_runs_them(pipeline_folder: Path) -> None:
    encoders = load_text_encoders(pipeline_folder, dtype=torch.float32, t5_dtype=torch.bfloat16, **LENGTHS)
    features = encoders.encode("a red apple")
    assert (features.bert.dtype, features.t5.dtype) == (torch.float32, torch.bfloat16)


def test_tokenizers_saved_by_transformers_5(pipeline_folder: Path, tmp_path: Path) -> None:
    """It writes tokenizer.json and no vocab.txt; case and words must survive."""
    words = bert_vocab() + b"Red\nApple\n"
    (tmp_path / "cased").mkdir()
    (tmp_path / "cased" / "vocab.txt").write_bytes(words)
    cased = BertTokenizer.from_pretrained(tmp_path / "cased", do_lower_case=False)
    cased.save_pretrained(tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer" / "vocab.txt").exists()
    bert = bert_model()
    bert.resize_token_embeddings(words.count(b"\n"))
    bert.save_pretrained(tmp_path / "text_encoder")
    t5_model().save_pretrained(tmp_path / "text_encoder_2")
    write_tokenizers(tmp_path / "unused", tmp_path / "tokenizer_2")
    tokens = load_text_encoders(tmp_path, **LENGTHS).tokenize("a Red Apple red")
    expected = cased("a Red Apple red", padding="max_length", max_length=20)
    assert tokens.bert_ids[0].tolist() == expected.input_ids
    assert cased.unk_token_id not in expected.input_ids
