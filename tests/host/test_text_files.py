"""Text encoders from every place that people have them in, and what is said when something is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import Graph
from in_process import Host
from memory import STATUS, Peak
from test_text import encode, load, pair, same, small  # noqa: F401 - fixtures
from text_models import (
    BERT_ROWS,
    SPIECE,
    T5_ROWS,
    VOCAB,
    all_in_one,
    bert_model,
    grown_spiece,
    metadata,
    t5_model,
    t5_tensors,
    write,
    write_published,
    write_tokenizers,
)
from transformers import BertModel, MT5EncoderModel

TEXT = "a red apple, 一个绿色的汽车"


@pytest.fixture(scope="module")
def models() -> tuple[BertModel, MT5EncoderModel]:
    return bert_model().half(), t5_model().half()


@pytest.fixture(scope="module")
def expected(host: Host, models: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("expected") / "both.safetensors"
    return encode(host, load(host, write(path, all_in_one(*models))), TEXT)


@pytest.fixture
def place(host: Host) -> Any:
    """ComfyUI's folder of models; what a test leaves there is removed."""
    yield host.models_dir
    for kind in ("text_encoders", "checkpoints", "diffusers"):
        shutil.rmtree(host.models_dir / kind, ignore_errors=True)
        (host.models_dir / kind).mkdir()
    host.refresh()


def through_loader(host: Host, bert: str, mt5: str = "same as bert_name", **widgets: str) -> Any:
    """The CONDITIONING of TEXT, or the error, with the loader node in the graph."""
    host.refresh()
    graph = Graph()
    loader = graph.add(
        "HyDiTTextEncoderLoader", **{"bert_name": bert, "mt5_name": mt5, "weight_dtype": "default", **widgets}
    )
    node = graph.add("HyDiTTextEncode", _defaults=True, clip=loader, text=TEXT, text_mt5="")
    tap = graph.add("HyDiTTestCapture", value=node.out(0))
    result = host.run(graph)
    if result.ok:
        return result.values[tap.id]
    assert result.error is not None and result.error.node_id == loader.id, result.error
    message = result.error.exception_message
    assert "\n" not in message
    return message


def two_files(root: Path, bert: BertModel, t5: MT5EncoderModel) -> tuple[str, str]:
    """As transformers' repositories have them, with what HunyuanDiT does not use."""
    folder = root / "text_encoders"
    heads = {f"bert.{k}": v for k, v in bert.state_dict().items()}
    heads["bert.pooler.dense.weight"] = torch.zeros(128, 128).half()
    heads["bert.embeddings.position_ids"] = torch.arange(512)[None]
    heads["cls.predictions.bias"] = torch.zeros(BERT_ROWS).half()
    write(folder / "roberta.safetensors", heads)
    (folder / "roberta.vocab.txt").write_bytes(VOCAB)
    whole = t5_tensors(t5) | {"encoder.embed_tokens.weight": t5.shared.weight.clone()}
    whole["decoder.final_layer_norm.weight"] = torch.ones(64).half()
    whole["lm_head.weight"] = torch.zeros(T5_ROWS, 64).half()
    torch.save(whole, folder / "mt5-xl.fp16.pt")
    (folder / "mt5-xl.fp16.spiece.model").write_bytes(SPIECE)
    return "roberta.safetensors", "mt5-xl.fp16.pt"


def plain_names(root: Path, bert: BertModel, t5: MT5EncoderModel) -> tuple[str, str]:
    folder = root / "text_encoders" / "hunyuan"
    folder.mkdir(parents=True)
    torch.save(dict(bert.state_dict()), folder / "pytorch_model.bin")
    write(folder / "mt5.safetensors", t5_tensors(t5))
    (folder / "vocab.txt").write_bytes(VOCAB)
    (root / "text_encoders" / "spiece.model").write_bytes(SPIECE)  # not in the sub-folder
    return "hunyuan/pytorch_model.bin", "hunyuan\\mt5.safetensors"


def one_folder_each(root: Path, bert: BertModel, t5: MT5EncoderModel) -> tuple[str, str]:
    folder = root / "text_encoders"
    bert.save_pretrained(folder / "bert")
    t5.save_pretrained(folder / "mt5")
    write_tokenizers(folder / "bert", folder / "mt5")
    return "bert/", "mt5/"


def diffusers(root: Path, bert: BertModel, t5: MT5EncoderModel) -> tuple[str, str]:
    folder = root / "diffusers" / "HunyuanDiT"
    bert.save_pretrained(folder / "text_encoder")
    t5.save_pretrained(folder / "text_encoder_2")
    write_tokenizers(folder / "tokenizer", folder / "tokenizer_2")
    (folder / "model_index.json").write_text("{}")
    return "HunyuanDiT/", "same as bert_name"


def tencent(root: Path, bert: BertModel, t5: MT5EncoderModel) -> tuple[str, str]:
    folder = root / "diffusers" / "ckpts" / "t2i"
    write_tokenizers(folder / "tokenizer", folder / "mt5")
    (folder / "clip_text_encoder").mkdir()
    tensors = {f"bert.{k}": v for k, v in bert.state_dict().items()} | {"visual.proj": torch.zeros(2, 2)}
    torch.save(tensors, folder / "clip_text_encoder" / "pytorch_model.bin")
    torch.save(t5_tensors(t5), folder / "mt5" / "pytorch_model.bin")
    return "ckpts/", "same as bert_name"


def whole_file(root: Path, bert: BertModel, t5: MT5EncoderModel) -> tuple[str, str]:
    write(root / "checkpoints" / "all.safetensors", all_in_one(bert, t5))
    return "all.safetensors", "same as bert_name"


def from_two_wholes(root: Path, bert: BertModel, t5: MT5EncoderModel) -> tuple[str, str]:
    """The BERT of one and the mT5 of another."""
    write(root / "checkpoints" / "a.safetensors", all_in_one(bert, t5_model(seed=9).half()))
    write(root / "checkpoints" / "b.safetensors", all_in_one(bert_model(seed=9).half(), t5))
    return "a.safetensors", "b.safetensors"


LAYOUTS = [two_files, plain_names, one_folder_each, diffusers, tencent, whole_file, from_two_wholes]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_gives_the_same(
    host: Host, place: Path, models: tuple[Any, Any], expected: Any, layout: Callable[..., tuple[str, str]]
) -> None:
    found = through_loader(host, *layout(place, *models))
    assert not isinstance(found, str), found
    assert same(found, expected)


def test_the_embedded_model(host: Host) -> None:
    found = through_loader(host, "[embedded] hydit-icons-128")
    assert found[0][0].shape == (1, 24, 128) and found[0][1]["conditioning_mt5xl"].shape == (1, 32, 64)


def test_files_that_comfyui_saved(host: Host, place: Path, small: Any, pair: Any) -> None:  # noqa: F811
    """CLIPSave writes each encoder into a file of its own, with its tokenizer."""
    for number, clip in enumerate((small.clip, pair.ours, pair.native)):
        graph = Graph()
        graph.add("CLIPSave", clip=host.give(graph, clip), filename_prefix=f"clip/saved{number}")
        host.run(graph).check()
        bert, mt5 = (f"saved{number}_{name}_00001_.safetensors" for name in ("hydit_clip", "mt5xl"))
        assert same(through_loader(host, bert, mt5), encode(host, clip, TEXT))


def test_a_saved_clip_has_the_names_of_a_checkpoint(small: Any, pair: Any) -> None:  # noqa: F811
    own, shipped = small.clip.get_sd(), pair.ours.get_sd()
    assert own["mt5xl.spiece_model"].numpy().tobytes() == SPIECE
    assert own["hydit_clip.vocab"].numpy().tobytes() == VOCAB
    assert shipped.keys() == pair.native.get_sd().keys()


def nothing_beside(host: Host, place: Path, bert: Any, t5: Any) -> tuple[str, str]:
    names = two_files(place, bert, t5)
    (place / "text_encoders" / "mt5-xl.fp16.spiece.model").unlink()
    return names


def swapped(host: Host, place: Path, bert: Any, t5: Any) -> tuple[str, str]:
    return two_files(place, bert, t5)[::-1]


def twice_bert(host: Host, place: Path, bert: Any, t5: Any) -> tuple[str, str]:
    return (two_files(place, bert, t5)[0],) * 2


def other_t5(host: Host, place: Path, bert: Any, t5: Any) -> tuple[str, str]:
    first = two_files(place, bert, t5)[0]
    write(place / "text_encoders" / "t5xxl.safetensors", t5_tensors(t5_model(rows=32128).half()))
    return first, "t5xxl.safetensors"


def other_spiece(host: Host, place: Path, bert: Any, t5: Any) -> tuple[str, str]:
    names = two_files(place, bert, t5)
    (place / "text_encoders" / "mt5-xl.fp16.spiece.model").write_bytes(grown_spiece(T5_ROWS + 600))
    return names


def damaged_spiece(host: Host, place: Path, bert: Any, t5: Any) -> tuple[str, str]:
    names = two_files(place, bert, t5)
    (place / "text_encoders" / "mt5-xl.fp16.spiece.model").write_bytes(b"version https://git-lfs")
    return names


def no_vocabulary(host: Host, place: Path, bert: Any, t5: Any) -> tuple[str, str]:
    names = two_files(place, bert, t5)
    (place / "text_encoders" / "roberta.vocab.txt").unlink()
    return names


def incomplete(host: Host, place: Path, bert: Any, t5: Any) -> tuple[str, str]:
    tensors = all_in_one(bert, t5)
    del tensors["text_encoders.hydit_clip.transformer.bert.encoder.layer.1.output.dense.bias"]
    write(place / "checkpoints" / "incomplete.safetensors", tensors)
    return "incomplete.safetensors", "same as bert_name"


def too_much(host: Host, place: Path, bert: Any, t5: Any) -> tuple[str, str]:
    tensors = all_in_one(bert, t5)
    tensors["text_encoders.mt5xl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight_scale"] = (
        torch.ones(1)
    )
    write(place / "checkpoints" / "scaled.safetensors", tensors)
    return "scaled.safetensors", "same as bert_name"


def truncated(host: Host, place: Path, bert: Any, t5: Any) -> tuple[str, str]:
    path = write(place / "checkpoints" / "cut.safetensors", all_in_one(bert, t5))
    path.write_bytes(path.read_bytes()[:-1000])
    return "cut.safetensors", "same as bert_name"


def something_else(host: Host, place: Path, bert: Any, t5: Any) -> tuple[str, str]:
    write(place / "checkpoints" / "other.safetensors", {"some.weight": torch.zeros(2)})
    return "other.safetensors", "same as bert_name"


def wrong_activation(host: Host, place: Path, bert: Any, t5: Any) -> tuple[str, str]:
    text = metadata(bert, t5)["hydit.config"].replace('"bert": {', '"bert": {"hidden_act": "silu", ')
    write(place / "checkpoints" / "silu.safetensors", all_in_one(bert, t5), {"hydit.config": text})
    return "silu.safetensors", "same as bert_name"


ERRORS: dict[Any, list[str]] = {
    nothing_beside: ["mt5-xl.fp16.pt", "mt5-xl.fp16.spiece.model, ", "tokenizer_2/", "Put the spiece.model"],
    swapped: ["mt5-xl.fp16.pt is an mT5", "expected a file or folder with BERT", "give it as mt5_name"],
    twice_bert: ["roberta.safetensors is a BERT text encoder (width 128", "with mT5", "give it as bert_name"],
    other_t5: ["t5xxl.safetensors is T5 v1.1 (of SD3", "32128", "mT5, whose vocabulary has 250112"],
    other_spiece: [
        "mt5-xl.fp16.pt: the mT5 tokenizer has ",
        f"has {T5_ROWS + 600} tokens, the encoder's embedding {T5_ROWS} rows",
    ],
    damaged_spiece: ["mt5-xl.fp16.pt", "spiece.model (23 bytes) cannot be read"],
    no_vocabulary: ["roberta.safetensors", "roberta.vocab.txt, vocab.txt, tokenizer/", "Put the vocab.txt"],
    incomplete: ["incomplete.safetensors", "1 missing: encoder.layer.1.output.dense.bias"],
    too_much: ["scaled.safetensors: it is quantised (scaled fp8 or int8)", "the model in fp16 or bf16"],
    truncated: ["cut.safetensors is truncated"],
    something_else: ["other.safetensors is not a weights file of a kind", "choose another bert_name"],
    wrong_activation: ["silu.safetensors: BERT's activation is silu, ComfyUI's BERT only has gelu"],
}  # fmt: skip


def test_errors_name_the_file_and_say_what_to_do(host: Host, place: Path, models: tuple[Any, Any]) -> None:
    for provoke, words in ERRORS.items():
        for kind in ("text_encoders", "checkpoints"):
            shutil.rmtree(place / kind)
            (place / kind).mkdir()
        message = through_loader(host, *provoke(host, place, *models))
        assert isinstance(message, str), provoke.__name__
        missing = [word for word in words if word not in message]
        assert not missing, f"{provoke.__name__}: {message}"
    # Nothing is left behind: the next prompt succeeds.
    assert not isinstance(through_loader(host, "[embedded] hydit-icons-128"), str)


def test_weight_dtypes(host: Host, tmp_path: Path) -> None:
    models = bert_model(std=0.05), t5_model(std=0.05)
    path = write(tmp_path / "both.safetensors", all_in_one(*models))
    reference = encode(host, load(host, path), TEXT)
    wide = torch.float32
    for name, matrix, rest, least in (
        ("default", wide, wide, 1.0),
        ("fp32", wide, wide, 1.0),
        ("fp16", torch.float16, torch.float16, 0.9999),
        ("bf16", torch.bfloat16, torch.bfloat16, 0.999),
        ("fp8_e4m3fn", torch.float8_e4m3fn, torch.float16, 0.99),
        ("fp8_e5m2", torch.float8_e5m2, torch.float16, 0.98),
    ):
        clip = load(host, path, weight_dtype=name)
        bert, t5 = clip.cond_stage_model.hydit_clip.transformer.bert, clip.cond_stage_model.mt5xl.transformer
        matrices = bert.encoder.layer[1].output.dense, t5.encoder.block[1].layer[0].SelfAttention.o
        others = [bert.embeddings.LayerNorm, bert.embeddings.word_embeddings]
        others += [t5.shared, t5.encoder.final_layer_norm]
        assert {layer.weight.dtype for layer in matrices} == {matrix}, name
        assert {layer.weight.dtype for layer in others} == {rest}, name
        found = encode(host, clip, TEXT)
        for one, other in (
            (found[0][0], reference[0][0]),
            (found[0][1]["conditioning_mt5xl"], reference[0][1]["conditioning_mt5xl"]),
        ):
            assert one.dtype == torch.float32
            similar = torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0)
            assert similar >= least - 1e-6, (name, similar)
            assert name in ("default", "fp32") or not torch.equal(one, other)


def test_what_default_means(host: Host, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    module = host.module("nodes.host.clip")

    def dtypes() -> tuple[torch.dtype, torch.dtype]:
        model = load(host, small.path).cond_stage_model
        layer = model.hydit_clip.transformer.bert.encoder.layer[0].output.dense
        return layer.weight.dtype, model.mt5xl.transformer.shared.weight.dtype

    assert dtypes() == (torch.float32, torch.float32)
    monkeypatch.setattr(module, "_LARGE", 1000)  # as if mT5 were the published one
    assert dtypes() == (torch.float32, torch.float16)
    monkeypatch.setattr(host.comfy_module("comfy.cli_args").args, "fp16_text_enc", True)
    assert dtypes() == (torch.float16, torch.float16)


def test_the_file_may_go_once_it_is_loaded(
    host: Host, tmp_path: Path, models: tuple[Any, Any], expected: Any
) -> None:
    path = write(tmp_path / "both.safetensors", all_in_one(*models))
    clip = load(host, path)
    with path.open("r+b") as file:
        file.truncate(100)
    assert same(encode(host, clip, TEXT), expected)
    host.forget()  # unloads the models
    assert same(encode(host, clip, TEXT), expected)


def test_the_same_encoders_once_more(host: Host, small: Any) -> None:  # noqa: F811
    """What the newest host asks for where it cannot stream weights."""
    load_again, arguments = small.clip.patcher.cached_patcher_init
    patcher = load_again(*arguments)
    assert patcher.model is not small.clip.cond_stage_model
    state = small.clip.cond_stage_model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in patcher.model.state_dict().items())


def test_a_clone_is_one_of_ours(host: Host, small: Any) -> None:  # noqa: F811
    clone = small.clip.clone()
    assert type(clone) is type(small.clip) and clone.cond_stage_model is small.clip.cond_stage_model
    assert isinstance(clone, host.comfy_module("comfy.sd").CLIP)
    assert same(encode(host, clone, TEXT), encode(host, small.clip, TEXT))


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="reads Linux's /proc")
def test_published_dimensions_load_once(host: Host, tmp_path: Path) -> None:
    """BERT (0.7 GB) and mT5-XL (3.3 GB) in fp16, random, from two files: memory, time and shapes."""
    bert, mt5 = tmp_path / "bert.safetensors", tmp_path / "mt5.safetensors"
    write_published(bert, mt5)
    (tmp_path / "mt5.spiece.model").write_bytes(grown_spiece(250100))
    size = bert.stat().st_size + mt5.stat().st_size
    bundle = host.module("hydit_core.weights.bundle").bundle
    with Peak() as peak:
        clip = host.module("nodes.host.clip").load_clip(bundle(bert), bundle(mt5))
    print(f"files {size / 1e9:.2f} GB, peak {peak.grown / size:.2f} x")
    assert peak.grown <= 1.2 * size
    model = clip.cond_stage_model
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == 350_986_240 + 1_669_958_656 + 2  # and ComfyUI's two logit scales
    found = encode(host, clip, TEXT)
    assert found[0][0].shape == (1, 77, 1024) and found[0][1]["conditioning_mt5xl"].shape == (1, 256, 2048)
    assert found[0][0].isfinite().all() and found[0][1]["conditioning_mt5xl"].isfinite().all()
