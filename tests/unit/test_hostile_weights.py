"""Weights of strangers: each kind of hostile or quantised file is one line of error at every door."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_tiny_model

from hydit_core.errors import WeightsError
from hydit_core.facts import METADATA_KEY
from hydit_core.generate.__main__ import main as generate
from hydit_core.text.loading import load_text_encoders
from hydit_core.text.tokenizer_files import vocabulary_of
from hydit_core.untrusted import count_numbered, is_plain_name
from hydit_core.vae import load_vae
from hydit_core.weights import files
from hydit_core.weights.__main__ import main as weights
from hydit_core.weights.bundle import bundle
from hydit_core.weights.convert import convert
from hydit_core.weights.files import open_tensors
from hydit_core.weights.load import load_controlnet, load_dit
from hydit_core.weights.source import MemorySource
from hydit_core.weights.views import Piece, TensorView, unwrapped_name

DIT = "model.diffusion_model."
BERT = "text_encoders.hydit_clip.transformer.bert."
MT5 = "text_encoders.mt5xl.transformer."
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
ONE = torch.ones(1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("hostile") / "tiny.safetensors")


@pytest.fixture
def changed(tiny, tmp_path):
    """Write the tiny model with other tensors (None: without that one)."""

    def write(tensors: dict[str, torch.Tensor | None], name: str = "bad.safetensors") -> Path:
        everything = load_file(tiny) | tensors
        metadata = dict(open_tensors(tiny).metadata)
        path = tmp_path / name
        save_file({key: value for key, value in everything.items() if value is not None}, path, metadata)
        return path

    return write


NUMBERS = {
    "blocks": ({f"{DIT}blocks.1000000001.norm1.weight": ONE}, "blocks.4 is missing, but there is blocks.100"),
    "blocks of many digits": ({f"{DIT}blocks.{'9' * 900}.norm1.weight": ONE}, "blocks.4 is missing"),
    "blocks without the first": ({f"{DIT}blocks.0.norm1.weight": None}, ""),
    "padded": ({f"{DIT}blocks.04.norm1.weight": ONE}, "blocks.4 is missing, but there is blocks.04"),
    "BERT": ({f"{BERT}encoder.layer.7.output.dense.bias": ONE}, "encoder.layer.1 is missing"),
    "mT5": ({f"{MT5}encoder.block.99999999.x": ONE}, "encoder.block.1 is missing"),
    "VAE": ({"vae.encoder.down.1000000000.block.0.conv1.bias": ONE}, "encoder.down.4 is missing"),
    "VAE layers": ({"vae.encoder.down.0.block.1000000000.conv1.bias": ONE}, "block.1 is missing"),
    "head of 0": ({f"{DIT}blocks.0.attn1.q_norm.weight": torch.ones(0)}, "has shape (0,)"),
    "huge and empty": ({f"{DIT}mlp_t5.0.weight": torch.ones(10**9, 0)}, "has shape (1000000000, 0)"),
    "no rows": ({f"{DIT}style_embedder.weight": torch.tensor(1.0)}, "is a single number"),
    "flat BERT": ({f"{BERT}embeddings.word_embeddings.weight": torch.ones(5)}, "expected a matrix"),
    "flat VAE": ({"vae.encoder.conv_in.weight": torch.ones(5)}, "expected a convolution's"),
    "empty VAE": ({"vae.decoder.conv_in.weight": torch.ones(32, 0, 3, 3)}, "expected a convolution's"),
    "VAE attention": ({"vae.encoder.mid.attn_1.q.weight": torch.ones(32, 32, 2, 2)}, ""),
    "mT5 heads": ({f"{MT5}{BIAS}": torch.ones(32, 50)}, "cannot be split into 50 heads"),
    "mT5 positions": ({f"{MT5}{BIAS}": torch.ones(2, 2)}, "mT5 has 2 relative positions"),
    "integers": ({f"{DIT}blocks.0.norm1.weight": torch.ones(64, dtype=torch.int32)}, "fractions: blocks.0"),
    "integers, VAE": ({"vae.encoder.conv_in.bias": torch.ones(32).byte()}, "not floating-point"),
    "integers, BERT": ({f"{BERT}encoder.layer.0.output.dense.bias": torch.ones(32).byte()}, "without"),
}  # fmt: skip


@pytest.mark.parametrize("what", NUMBERS)
def test_nothing_is_sized_by_a_name_or_an_empty_tensor(changed, tmp_path, capsys, what):
    tensors, message = NUMBERS[what]
    path = changed(tensors)
    assert generate(["--model", str(path), "--prompt", "cat", "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and str(path) in err and message in err
    assert len(err) < 1500 and not list((tmp_path / "out").glob("*"))


def test_numbers_are_counted_without_a_gap():
    assert count_numbered(["a.0.x", "a.1.x", "a.1.y", "a.b", "c.9"], "a.") == 2
    assert count_numbered([], "a.") == 0
    for names in (["a.1.x"], ["a.0", "a.2"], ["a.0", "a.00"], ["a.0", "a.1_0"], ["a.٠"]):
        if names[-1] == "a.1_0":
            assert count_numbered(names, "a.") == 1  # no number, so a name that nothing knows
            continue
        with pytest.raises(WeightsError, match="without a gap"):
            count_numbered(names, "a.")


def header(entries: dict, data: int) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def entry(begin: int, end: int, **other) -> dict:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]} | other


HEADERS = {
    "gap": (header({"a": entry(0, 4), "b": entry(8, 12)}, 12), "4 bytes between a and b belong to no tensor"),
    "gap at the start": (
        header({"a": entry(4, 8)}, 8),
        "4 bytes between the header and a belong to no tensor",
    ),
    "trailing": (header({"a": entry(0, 4)}, 5), "1 bytes after the last tensor belong to none"),
    "trailing alone": (header({}, 5), "5 bytes after the last tensor"),
    "overlap": (header({"a": entry(0, 4), "b": entry(2, 6)}, 6), "a and b overlap"),
    "huge header": ((1 << 40).to_bytes(8, "little") + b"{" + bytes(100), "a safetensors header of 1,099,511"),
    "name": (header({"n" * 100_000: entry(0, 4)}, 4), "a tensor's name has 100,000 characters (nnnn"),
    "bool": (header({"a": entry(0, 1, shape=[True])}, 1), "the header entry of a is damaged"),
    "fraction": (header({"a": entry(0, 4, shape=[4.0])}, 4), "the header entry of a is damaged"),
    "text": (header({"a": entry(0, 4, shape="4")}, 4), "the header entry of a is damaged"),
    "dimensions": (header({"a": entry(0, 1, shape=[1] * 100)}, 1), "the header entry of a is damaged"),
    "huge": (header({"a": entry(0, 0, shape=[2**63, 0])}, 0), "the header entry of a is damaged"),
    "twice": (header({}, 4).replace(b"{}", b'{"a":1,"a":1}').replace(b"\x02", b"\x0d", 1), "occurs twice"),
    "tar": (b"pytorch_model/" + bytes(243) + b"ustar\x00" + bytes(300), "is a tar archive"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_headers_that_are_refused(tmp_path, capsys, what):
    content, message = HEADERS[what]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert weights(["inspect", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}") and message in err and len(err) < 500


def test_a_million_tensors_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MOST_TENSORS", 3)
    entries = {str(i): entry(i, i + 1) for i in range(4)}
    (tmp_path / "x.safetensors").write_bytes(header(entries, 4))
    with pytest.raises(WeightsError, match="holds 4 tensors; up to 3 are read"):
        open_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b", "a\\b", "C:x", "", "..", "a\0b", 5, None, "é" * 200]
)  # fmt: skip
def test_shards_are_files_of_the_folder(tmp_path, name):
    save_file({"w": ONE}, tmp_path / "x.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    assert not is_plain_name(name)
    with pytest.raises(WeightsError, match=r"index\.json"):
        open_tensors(folder)


def test_what_inspect_prints_has_no_control_characters(tmp_path, capsys):
    path = tmp_path / "esc.safetensors"
    metadata = {"a\x1b]0;title\x07": "\x1b[31mred\nerror: none", "b": "\u202eevil"}
    save_file({"w\x1b[2J": ONE}, path, metadata)
    assert weights(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "\u202e" not in out
    assert r"a\x1b]0;title\x07: \x1b[31mred error: none" in out


SCALES = (
    "x.weight_scale", "blocks.0.attn1.Wqkv.scale_input", "blocks.0.attn1.Wqkv.weight_scale",
    "x.weight_scale_2", "x.weight_scale_inv", "x.input_scale",
    "x.weight.absmax", "x.weight.quant_map", "x.weight.quant_state.bitsandbytes__nf4", "x.SCB", "x.qweight",
    "x.weight._data", "x.weight.scale", "x.weight_packed",
)  # fmt: skip
DOORS = {
    DIT: (load_dit, lambda path: convert(path, path.with_name("o.safetensors"), layout="tencent"), bundle),
    BERT: (load_text_encoders, bundle),
    MT5: (load_text_encoders, bundle),
    "vae.": (load_vae, bundle),
}


@pytest.mark.parametrize("part", DOORS)
def test_scales_of_quantised_weights_are_never_dropped(changed, part):
    for number, name in enumerate(SCALES):
        if number > 1 and part != DIT:
            break  # one mark for all parts
        path = changed({part + name: ONE}, f"{number}.safetensors")
        for door in DOORS[part]:
            with pytest.raises(WeightsError, match="it is quantised") as error:
                door(path)
            assert str(error.value).startswith(f"{path}: it is quantised") and name in str(error.value)
        assert not path.with_name("o.safetensors").exists()


def test_quantised_parts_in_files_of_their_own(tiny, tmp_path):
    full = load_file(tiny)
    for prefix, door in ((BERT, bundle), (MT5, bundle), ("vae.", load_vae), (DIT, load_dit)):
        part = {key.removeprefix(prefix): value for key, value in full.items() if key.startswith(prefix)}
        save_file({**part, "a.weight_scale": ONE}, tmp_path / "part.safetensors")
        with pytest.raises(WeightsError, match="it is quantised"):
            door(tmp_path / "part.safetensors")
    save_file({"w": ONE}, tmp_path / "q.safetensors", {"quantization_config": "{}"})
    with pytest.raises(WeightsError, match="metadata quantization_config"):
        bundle(tmp_path / "q.safetensors")


def test_inspect_tells_what_is_quantised(changed, capsys):
    assert weights(["inspect", str(changed({f"{DIT}x.qweight": ONE}))]) == 0
    assert "it is quantised (GPTQ or AWQ): model.diffusion_model.x.qweight" in capsys.readouterr().out


def test_text_encoders_of_others_hold_parts_that_are_known(tiny, tmp_path):
    full = load_file(tiny)
    bert = {f"bert.{key[len(BERT) :]}": value for key, value in full.items() if key.startswith(BERT)}
    mt5 = {key[len(MT5) :]: value for key, value in full.items() if key.startswith(MT5)}
    heads = {
        "bert.pooler.dense.weight": torch.ones(1),
        "cls.predictions.bias": torch.ones(1),
        "bert.embeddings.position_ids": torch.ones(1),
    }
    save_file(bert | heads, tmp_path / "bert.safetensors")
    names = ("decoder.block.0.layer.0.SelfAttention.q.weight", "lm_head.weight")
    decoder = {name: torch.ones(1) for name in names}
    save_file(
        mt5 | decoder | {"encoder.embed_tokens.weight": mt5["shared.weight"].clone()},
        tmp_path / "t5.safetensors",
    )
    assert bundle(tmp_path / "bert.safetensors").bert is not None
    assert "decoder.block.0.layer.0.SelfAttention.q.weight" not in bundle(tmp_path / "t5.safetensors").mt5
    for tensors, extra in ((bert, "bert.encoder.layer.0.adapter.weight"), (bert, "what.is.this")):
        save_file(tensors | {extra: torch.ones(1)}, tmp_path / "bert.safetensors")
        if extra == "what.is.this":
            with pytest.raises(WeightsError, match=r"BERT has no place for 1 tensors: what\.is\.this"):
                bundle(tmp_path / "bert.safetensors")
    save_file(mt5 | {"encoder_extra": torch.ones(1)}, tmp_path / "t5.safetensors")
    with pytest.raises(WeightsError, match=r"mT5's encoder has no place for 1 tensors: encoder_extra"):
        bundle(tmp_path / "t5.safetensors")


@pytest.mark.parametrize("prefix", [BERT, MT5])
def test_unknown_tensors_of_a_text_encoder_are_refused_when_it_loads(changed, prefix):
    with pytest.raises(WeightsError, match=r"has no place for 1 tensors: encoder\.strange"):
        load_text_encoders(changed({f"{prefix}encoder.strange": ONE}))


def test_convert_refuses_what_loading_refuses(changed, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    for tensors, message in (
        ({f"{DIT}blocks.1.norm1.weight": None}, "1 missing: blocks.1.norm1.weight"),
        ({f"{DIT}blocks.1.norm1.weight": torch.ones(63)}, "blocks.1.norm1.weight (63,) instead of (64,)"),
        ({f"{DIT}blocks.1.strange": ONE}, "1 unexpected: blocks.1.strange"),
    ):
        assert weights(["convert", str(changed(tensors)), "-o", str(out), "--layout", "tencent"]) == 2
        assert message in capsys.readouterr().err and not out.exists()


def test_convert_stops_where_float16_overflows(changed, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    path = changed({f"{DIT}blocks.1.norm1.weight": torch.full((64,), 70000.0)})
    assert weights(["convert", str(path), "-o", str(out), "--layout", "tencent", "--dtype", "fp16"]) == 2
    err = capsys.readouterr().err
    assert "blocks.1.norm1.weight has values up to 7e+04, which float16 cannot hold" in err
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert weights(["convert", str(path), "-o", str(out), "--layout", "tencent", "--dtype", "bf16"]) == 0


def test_parts_of_a_fused_tensor_must_fit_each_other():
    """(4, 1) would be spread over (4, 3) without a word."""
    view = TensorView(
        MemorySource({"q": torch.ones(4, 3), "k": torch.ones(4, 1)}), {"qk": (Piece("q"), Piece("k"))}
    )
    with pytest.raises(WeightsError, match=r"q \(4, 3\) and k \(4, 1\) cannot be one tensor"):
        view.shapes()


@pytest.mark.parametrize(
    "wrapped",
    ["_orig_mod.{}", "module.{}", "module._orig_mod.{}", "model.diffusion_model._fsdp_wrapped_module.{}"],
)  # fmt: skip
def test_wrappers_in_names_are_dropped(tiny, tmp_path, wrapped):
    full = load_file(tiny)
    dit = {key[len(DIT) :]: value for key, value in full.items() if key.startswith(DIT)}
    changes = ("blocks.1.", "blocks.1._orig_mod."), (".mlp.", ".mlp._checkpoint_wrapped_module.")
    inner = {key.replace(*changes[0]).replace(*changes[1]) for key in dit}
    names = dict(zip(sorted(dit), sorted(inner, key=unwrapped_name), strict=True))
    metadata = {METADATA_KEY: open_tensors(tiny).metadata[METADATA_KEY]}
    renamed = {wrapped.format(names[key]): value for key, value in dit.items()}
    save_file(renamed, tmp_path / "w.safetensors", metadata)
    loaded = load_dit(tmp_path / "w.safetensors")[0].state_dict()
    assert loaded.keys() == dit.keys() and all(torch.equal(loaded[key], dit[key]) for key in dit)


def test_wrapped_names_that_would_be_one_stay_apart(tmp_path):
    save_file({"module.w": ONE, "w": ONE.clone()}, tmp_path / "w.safetensors")
    assert sorted(open_tensors(tmp_path / "w.safetensors")) == ["module.w", "w"]
    assert unwrapped_name("my_module.modules.module_list.w") == "my_module.modules.module_list.w"


def test_a_controlnet_is_held_to_the_same(tiny, tmp_path):
    from hydit_core.embedded import embedded_model

    folder = embedded_model().parent / "controlnet"
    path = next(folder.glob("*.safetensors"))
    tensors, metadata = load_file(path), dict(open_tensors(path).metadata)
    save_file(tensors | {"blocks.0.mlp.fc1.weight_scale": ONE}, tmp_path / "c.safetensors", metadata)
    with pytest.raises(WeightsError, match="it is quantised"):
        load_controlnet(tmp_path / "c.safetensors")
    save_file(
        {f"_orig_mod.{key}": value for key, value in tensors.items()}, tmp_path / "c.safetensors", metadata
    )
    load_controlnet(tmp_path / "c.safetensors")


WORDS = '{"model": {"type": "WordPiece", "vocab": %s}}'
COMPANIONS = {
    "config": ("config.json", "[]", "holds a list; expected an object"),
    "config's kind": ("config.json", '{"model_type": ["bert"], "num_attention_heads": "2"}', "is '2';"),
    "tokenizer": ("tokenizer.json", "[]", "holds a list; expected an object"),
    "a model's kind": ("tokenizer.json", '{"model": []}', "vocabulary was found neither"),
    "a vocabulary of texts": ("tokenizer.json", WORDS % '["a"]', "does not map words to numbers"),
    "numbers of texts": ("tokenizer.json", WORDS % '{"a": "b"}', "does not map words to numbers"),
    "settings": ("tokenizer_config.json", "[]", "holds a list; expected an object"),
    "deep settings": ("tokenizer_config.json", "[" * 100_000, "nested 100,000 deep"),
    "not UTF-8": ("config.json", "\xff\xfe", "is not UTF-8"),
}


@pytest.mark.parametrize("what", COMPANIONS)
def test_files_beside_a_text_encoder(tiny, tmp_path, capsys, what):
    name, content, message = COMPANIONS[what]
    bert = {key[len(BERT) :]: value for key, value in load_file(tiny).items() if key.startswith(BERT)}
    folder = tmp_path / "bert"
    folder.mkdir()
    save_file(bert, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    if "settings" in what:
        (folder / "vocab.txt").write_text("[UNK]\n")
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(WeightsError, match=message) as error:
        vocabulary_of(bundle(folder, only=("bert",)))
    assert str(folder) in str(error.value) and len(str(error.value)) < 800


def test_a_vocabulary_of_any_size_is_not_read(tiny, tmp_path):
    with open(tmp_path / "vocab.txt", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(WeightsError, match=r"vocab\.txt is larger than 67,108,864 bytes"):
        vocabulary_of(bundle(tiny), tmp_path)
