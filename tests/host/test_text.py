"""Prompts in ComfyUI: the features of transformers, the CONDITIONING of ComfyUI's own CLIP, and our modes."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graphs import Graph, Node
from in_process import Host
from text_models import (
    PUBLISHED_ROWS,
    SPIECE,
    VOCAB,
    all_in_one,
    bert_model,
    data,
    metadata,
    t5_model,
    t5_tensors,
    write,
)

from hydit_core.text.tokenizers import Tokenizers

Conditioning = list[Any]
PROMPTS = [
    "",
    "a red apple",
    "  two small birds,  on the left!  ",
    "一个绿色的汽车，两只小鸟",
    "a (red:1.3) apple ((blue)) [star] \\(plain\\)",
    "[SEP] a [MASK] red apple 龘靐 zebra",
    "a red apple, a green car, two small birds on the left of the blue house; " * 7,
    "一张蓝色爱心的图片，小鸟，" * 30,
]
ODD_T5 = {
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "feed_forward_proj": "relu",
    "layer_norm_epsilon": 1e-3,
}
WIDE = (
    {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512},
    {"d_model": 256, "d_kv": 64, "d_ff": 512, "num_heads": 4, "num_layers": 4},
)
ODD = ({"num_attention_heads": 8, "layer_norm_eps": 1e-3, "max_position_embeddings": 90}, ODD_T5)


def load(host: Host, path: Path, **options: Any) -> Any:
    return host.module("nodes.host.clip").load_clip(
        host.module("hydit_core.weights.bundle").bundle(path), **options
    )


def encode(
    host: Host, clip: Any, text: str, text_mt5: str = "", mode: str = "exact", **size: int
) -> Conditioning:
    """The CONDITIONING of our node, run in a graph."""
    graph = Graph()
    node = ours(host, graph, clip, text, text_mt5, mode, **size)
    return host.values(graph, node)[0]


def ours(
    host: Host, graph: Graph, clip: Any, text: str, text_mt5: str = "", mode: str = "exact", **size: int
) -> Node:
    source = clip if isinstance(clip, (Node, list)) else host.give(graph, clip)
    values = {"clip": source, "text": text, "text_mt5": text_mt5, "mode": mode, **size}
    return graph.add("HyDiTTextEncode", _defaults=True, **values)


def stock(host: Host, clip: Any, *texts: str) -> Conditioning:
    """The CONDITIONING of ComfyUI's own node: one text, or one for each encoder."""
    graph = Graph()
    given = host.give(graph, clip)
    if len(texts) == 1:
        node = graph.add("CLIPTextEncode", clip=given, text=texts[0])
    else:
        node = graph.add("CLIPTextEncodeHunyuanDiT", clip=given, bert=texts[0], mt5xl=texts[1])
    return host.values(graph, node)[0]


def same(a: Conditioning, b: Conditioning) -> bool:
    """The same bits, keys and masks included."""
    if len(a) != len(b):
        return False
    for (one, extra), (other, more) in zip(a, b, strict=True):
        if not torch.equal(one, other) or extra.keys() != more.keys():
            return False
        for key, value in extra.items():
            equal = torch.equal(value, more[key]) if torch.is_tensor(value) else value == more[key]
            if not equal:
                return False
    return True


def features(conditioning: Conditioning) -> tuple[torch.Tensor, ...]:
    assert len(conditioning) == 1
    bert, extra = conditioning[0]
    return bert, extra["attention_mask"], extra["conditioning_mt5xl"], extra["attention_mask_mt5xl"]


@pytest.fixture(scope="module")
def small(host: Host, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A CLIP with tokenizers of its own, and the models that it came from."""
    bert, t5 = bert_model(), t5_model()
    path = tmp_path_factory.mktemp("small") / "encoders.safetensors"
    write(path, all_in_one(bert, t5), metadata(bert, t5))
    return SimpleNamespace(bert=bert, t5=t5, path=path, clip=load(host, path))


@pytest.fixture(scope="module")
def pair(host: Host, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The same small encoders with BERT's published vocabulary as ComfyUI's own CLIP and as ours."""
    bert, t5 = bert_model(rows=PUBLISHED_ROWS).half(), t5_model().half()
    path = tmp_path_factory.mktemp("pair") / "encoders.safetensors"
    write(path, all_in_one(bert, t5, vocab=None), metadata(bert, t5))
    sd, hydit = host.comfy_module("comfy.sd"), host.comfy_module("comfy.text_encoders.hydit")
    models = host.comfy_module("comfy.supported_models_base")
    config = t5.config.to_dict() | {"dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True}
    native = sd.CLIP(
        models.ClipTarget(hydit.HyditTokenizer, hydit.HyditModel),
        embedding_directory=host.folder_paths.get_folder_paths("embeddings"),
        tokenizer_data={"mt5xl.spiece_model": data(SPIECE)},
        model_options={
            "dtype": torch.float16,
            "hydit_clip_model_config": bert.config.to_dict(),
            "mt5xl_model_config": config,
        },
    )
    for tensors in ({f"bert.{k}": v for k, v in bert.state_dict().items()}, t5_tensors(t5)):
        missing, unexpected = native.load_sd(tensors)
        assert not missing and not unexpected
    return SimpleNamespace(native=native, ours=load(host, path))


@pytest.mark.parametrize(("bert_options", "t5_options"), [WIDE, ODD], ids=["wide", "odd"])
def test_exact_mode_gives_the_features_of_transformers(
    host: Host, tmp_path: Path, bert_options: dict[str, Any], t5_options: dict[str, Any]
) -> None:
    bert, t5 = bert_model(std=0.1, **bert_options), t5_model(std=0.1, **t5_options)
    write(tmp_path / "encoders.safetensors", all_in_one(bert, t5), metadata(bert, t5))
    clip = load(host, tmp_path / "encoders.safetensors")
    tokenizers = Tokenizers(VOCAB, SPIECE)
    for prompt in PROMPTS:
        tokens = tokenizers(prompt)
        found = features(encode(host, clip, prompt))
        expected = (
            bert(input_ids=tokens.bert_ids, attention_mask=tokens.bert_mask).last_hidden_state,
            tokens.bert_mask,
            t5(input_ids=tokens.t5_ids, attention_mask=tokens.t5_mask).last_hidden_state,
            tokens.t5_mask,
        )
        assert [tuple(one.shape) for one in found] == [tuple(one.shape) for one in expected]
        assert found[0].shape[1] == 77 and found[2].shape[1] == 256
        for one, other in zip(found, expected, strict=True):
            assert (one - other).abs().max() <= 1e-4
            assert one.dtype == other.dtype


def test_both_encoders_have_every_weight_of_the_file(host: Host, small: SimpleNamespace) -> None:
    model = small.clip.cond_stage_model
    for mine, theirs in (
        (model.hydit_clip.transformer.bert, small.bert),
        (model.mt5xl.transformer, small.t5),
    ):
        state = mine.state_dict()
        expected = {k: v for k, v in theirs.state_dict().items() if "embed_tokens" not in k}
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], value) for key, value in expected.items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_comfyuis_own_nodes_give_the_conditioning_of_comfyuis_own_clip(
    host: Host, pair: SimpleNamespace
) -> None:
    for text in PROMPTS:
        if "[SEP]" in text:  # there ComfyUI's own mask ends, and ours does not
            continue
        a, b = stock(host, pair.native, text), stock(host, pair.ours, text)
        assert same(a, b), text
        assert a[0][0].shape[1] >= 77 and a[0][1]["conditioning_mt5xl"].shape[1] >= 256
    two = "a red apple", "a (green:0.5) car"
    assert same(stock(host, pair.native, *two), stock(host, pair.ours, *two))


def test_learned_embeddings(host: Host, small: SimpleNamespace) -> None:
    """ComfyUI's own HunyuanDiT reads "embedding:name" as words."""
    folder = Path(host.folder_paths.get_folder_paths("embeddings")[0])
    folder.mkdir(parents=True, exist_ok=True)
    words = {
        "chinese_roberta": small.bert.embeddings.word_embeddings.weight[[41, 42]],
        "mt5xl": small.t5.shared.weight[[50]],
    }
    write(folder / "styled.safetensors", words)
    tokens = small.clip.tokenize("red, (a embedding:styled:1.2) apple")
    bert = [token for token, _ in tokens["hydit_clip"][0]]
    assert [torch.is_tensor(token) for token in bert[:8]] == [False] * 4 + [True] * 2 + [False] * 2
    assert torch.equal(torch.stack(bert[4:6]), words["chinese_roberta"])
    for mode in ("weighted", "stock"):
        text = "a embedding:styled"
        found = (
            stock(host, small.clip, text) if mode == "stock" else encode(host, small.clip, text, mode=mode)
        )
        ids = torch.tensor([[2, 5, 41, 42, 3] + [0] * 72])
        expected = small.bert(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
        assert (found[0][0] - expected).abs().max() <= 1e-4
        assert torch.equal(found[0][1]["attention_mask"], (ids != 0).long())
    report = host.module("nodes.host.tokens").weighted_tokens(small.clip, "a " * 74 + "embedding:styled")[1]
    assert report.bert.cut == "(embedding)" and report.bert.n_tokens == 78


def test_clip_skip(host: Host, pair: SimpleNamespace) -> None:
    results = []
    for clip in (pair.native, pair.ours):
        graph = Graph()
        last = graph.add("CLIPSetLastLayer", clip=host.give(graph, clip), stop_at_clip_layer=-2)
        results += host.values(graph, graph.add("CLIPTextEncode", clip=last, text="a red apple"))
    assert same(*results)
    assert not same(results[1], stock(host, pair.ours, "a red apple"))


@pytest.mark.parametrize("mode", ["exact", "weighted", "long"])
def test_our_node_gives_the_same_on_both_clips(host: Host, pair: SimpleNamespace, mode: str) -> None:
    for text in PROMPTS[:5] + PROMPTS[6:]:
        assert same(
            encode(host, pair.native, text, "two birds", mode),
            encode(host, pair.ours, text, "two birds", mode),
        )


def test_tokenizers_of_comfyuis_own_clip_are_made_once(host: Host, pair: SimpleNamespace) -> None:
    tokenizers_of = host.module("nodes.host.tokens").tokenizers_of
    first = tokenizers_of(pair.native)
    assert tokenizers_of(pair.native.clone()) is first
    assert (first.text_len, first.t5_len, first.bert_size) == (77, 256, PUBLISHED_ROWS)
    # But for U+2028, which transformers reads as an empty line, and which no cleaned prompt has.
    other = {i: token.replace("\u2028", "") for token, i in tokenizers_of(pair.ours).bert_tokens.items()}
    assert other == {i: token for token, i in first.bert_tokens.items()}


@pytest.mark.parametrize("mode", ["exact", "weighted", "long"])
def test_half_a_character_is_read_as_the_replacement_character(
    host: Host, small: SimpleNamespace, mode: str
) -> None:
    """Such as the page sends when an emoji is cut."""
    half = encode(host, small.clip, "a red \ud83c apple", mode=mode)
    assert same(half, encode(host, small.clip, "a red \ufffd apple", mode=mode))


def test_prompts_beyond_berts_positions_are_encoded_in_chunks(host: Host, pair: SimpleNamespace) -> None:
    found = stock(host, pair.ours, "红苹果" * 300)
    assert found[0][0].shape == (1, 1024, 128) and found[0][1]["attention_mask"].shape == (1, 1024)
    assert found[0][1]["attention_mask"].sum() == 900 + 2 * 2


def test_exact_mode_reads_no_syntax(host: Host, small: SimpleNamespace) -> None:
    plain, weighted = "a \\(red:1.3\\) apple", "a (red:1.3) apple"
    exact = encode(host, small.clip, weighted)
    assert same(exact, stock(host, small.clip, plain))
    assert not same(exact, encode(host, small.clip, weighted, mode="weighted"))
    assert same(encode(host, small.clip, weighted, mode="weighted"), stock(host, small.clip, weighted))
    assert same(encode(host, small.clip, " \n a red apple  "), encode(host, small.clip, "a red apple"))


def test_two_prompts(host: Host, small: SimpleNamespace) -> None:
    both, one, other = (
        encode(host, small.clip, *texts) for texts in (("red", "a car"), ("red",), ("a car",))
    )
    assert torch.equal(both[0][0], one[0][0])
    assert torch.equal(both[0][1]["conditioning_mt5xl"], other[0][1]["conditioning_mt5xl"])
    assert same(encode(host, small.clip, "red", " \n"), one)  # nothing but space means: the same


def test_weighted_mode_cuts_and_says_what(host: Host, small: SimpleNamespace, caplog: Any) -> None:
    graph = Graph()
    text = "(red:1.5) " * 50 + "apple " * 210 + "(green:1.2) house Zebra"
    node = ours(host, graph, small.clip, text, mode="weighted")
    with caplog.at_level(logging.INFO):
        conditioning, report = host.values(graph, node.out(0), node.out(1))
    bert, mask, t5, t5_mask = features(conditioning)
    assert bert.shape[1] == 77 and mask.sum() == 77 and t5.shape[1] == 256 and t5_mask.sum() == 256
    assert "BERT 265 of 77 tokens, mT5 " in report
    assert "BERT does not see: apple apple" in report and "green house" in report
    line = next(record for record in caplog.records if "HyDiTTextEncode" in record.getMessage())
    assert line.levelno == logging.WARNING and "\n" not in line.getMessage()
    # What is seen has its weights: stock's first 76 rows see the same neighbors only without weights beyond.
    plain = encode(host, small.clip, "red " * 50 + "apple " * 210, mode="weighted")
    assert not torch.equal(plain[0][0], conditioning[0][0])
    assert (conditioning[0][0][0, 76] - plain[0][0][0, 76]).abs().max() == 0  # [SEP], weight 1


def test_long_mode_encodes_each_chunk_alone(host: Host, small: SimpleNamespace) -> None:
    graph = Graph()
    text = "a red apple, a green car, two small birds on the left of the blue house; " * 20
    node = ours(host, graph, small.clip, text, mode="long")
    conditioning, report = host.values(graph, node.out(0), node.out(1))
    bert, mask, t5, t5_mask = features(conditioning)
    chunks = Tokenizers(VOCAB, SPIECE).chunks(text)
    assert len(chunks.bert) > 2 and len(chunks.t5) > 1
    assert bert.shape[1] == 77 * len(chunks.bert) and t5.shape[1] == 256 * len(chunks.t5)
    for all_rows, all_mask, rows, model, end in (
        (bert, mask, chunks.bert, small.bert, 3),
        (t5, t5_mask, chunks.t5, small.t5, 1),
    ):
        ids = torch.tensor(rows)
        valid = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            valid[i, : row.index(end) + 1] = 1
        expected = model(input_ids=ids, attention_mask=valid).last_hidden_state
        assert (all_rows[0] - expected.flatten(0, 1)).abs().max() <= 1e-4
        assert torch.equal(all_mask[0], valid.flatten())
    assert f"tokens in {len(chunks.bert)} chunks of 77" in report and "does not see" not in report
    short = encode(host, small.clip, "a red apple", mode="long")
    assert same(short, encode(host, small.clip, "a red apple"))


def test_the_report_is_shown_returned_and_logged(host: Host, small: SimpleNamespace, caplog: Any) -> None:
    graph = Graph()
    node = ours(host, graph, small.clip, "a red apple Ω")
    preview = graph.add("PreviewAny", source=node.out(1))
    with caplog.at_level(logging.INFO):
        result = host.run(graph).check()
    shown = result.outputs[node.id]["hydit_report"]
    assert shown == list(result.outputs[preview.id]["text"])
    assert shown[0].startswith("BERT 6 of 77 tokens, mT5 ") and "BERT does not know: Ω" in shown[0]
    record = next(record for record in caplog.records if "HyDiTTextEncode" in record.getMessage())
    assert record.levelno == logging.INFO and "BERT 6 of 77 tokens" in record.getMessage()


def test_size(host: Host, small: SimpleNamespace) -> None:
    extra = encode(host, small.clip, "red", width=1280, height=768)[0][1]
    assert (extra["width"], extra["height"]) == (1280, 768)
    assert not {"width", "height"} & encode(host, small.clip, "red")[0][1].keys()
    graph = Graph()
    node = ours(host, graph, small.clip, "red", width=1280)
    graph.add("PreviewAny", source=node.out(1))
    error = host.run(graph).error
    assert error is not None and error.node_id == node.id
    assert "width is 1280, height 0: give both" in error.exception_message


def test_the_same_twice_gives_the_same_bits(host: Host, small: SimpleNamespace) -> None:
    texts = ["a red apple", "一个绿色的汽车", "(red:1.2) " * 90]
    for mode in ("exact", "weighted", "long"):
        first = [encode(host, small.clip, text, mode=mode) for text in texts]
        again = [encode(host, small.clip, text, mode=mode) for text in texts]
        assert all(same(a, b) for a, b in zip(first, again, strict=True))


def test_a_conditioning_in_the_cache_is_not_altered(host: Host) -> None:
    graph = Graph()
    loaded = graph.add("HyDiTCheckpointLoader", _defaults=True, ckpt_name="[embedded] hydit-icons-128")
    nodes = [ours(host, graph, loaded.out(1), text) for text in ("a red star", "")]
    before = [
        [
            [one.clone(), {k: v.clone() if torch.is_tensor(v) else v for k, v in extra.items()}]
            for one, extra in value
        ]
        for value in host.values(graph, *nodes)
    ]
    latent = graph.add("EmptyLatentImage", width=128, height=128, batch_size=1)
    sampled = graph.add(
        "KSampler", model=loaded.out(0), positive=nodes[0], negative=nodes[1], latent_image=latent, seed=1,
        steps=2, cfg=3.0, sampler_name="ddim", scheduler="normal", denoise=1.0,
    )  # fmt: skip
    after = host.values(graph, *nodes, sampled)
    assert all(same(a, b) for a, b in zip(before, after, strict=False))
    assert before[0][0][0].shape == (1, 24, 128) and before[0][0][1]["conditioning_mt5xl"].shape[1] == 32


def tiny_clip(host: Host, family: str) -> Any:
    sd, models = host.comfy_module("comfy.sd"), host.comfy_module("comfy.supported_models_base")
    small = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 64}
    options = {"clip_l_model_config": small, "clip_g_model_config": small}
    if family == "SDXL":
        module = host.comfy_module("comfy.sdxl_clip")
        target = models.ClipTarget(module.SDXLTokenizer, module.SDXLClipModel)
    else:
        module = host.comfy_module("comfy.sd1_clip")
        target = models.ClipTarget(module.SD1Tokenizer, module.SD1ClipModel)
    return sd.CLIP(target, model_options=options)


@pytest.mark.parametrize("family", ["SDXL", "SD1"])
def test_the_clip_of_another_model_is_refused_by_name(
    host: Host, small: SimpleNamespace, family: str
) -> None:
    clip = tiny_clip(host, family)
    graph = Graph()
    node = ours(host, graph, clip, "red")
    graph.add("PreviewAny", source=node.out(1))
    error = host.run(graph).error
    assert error is not None and error.node_id == node.id
    assert f"this CLIP is of {family} (encoders: clip_l" in error.exception_message
    assert "HyDiTTextEncoderLoader" in error.exception_message and "\n" not in error.exception_message
    encode(host, small.clip, "the next prompt succeeds")


def test_no_clip_at_all(host: Host) -> None:
    graph = Graph()
    node = ours(host, graph, None, "red")
    graph.add("PreviewAny", source=node.out(1))
    error = host.run(graph).error
    assert error is not None and "the checkpoint has no text encoders" in error.exception_message


def lora(host: Host, name: str, scale: float = 1.0) -> tuple[str, torch.Tensor]:
    """A kohya LoRA of one matrix of BERT, and what it adds to it."""
    generator = torch.Generator().manual_seed(5)
    down, up = torch.randn(4, 128, generator=generator) * 0.2, torch.randn(128, 4, generator=generator) * 0.2
    key = "lora_te1_encoder_layer_0_attention_self_query"
    tensors = {
        f"{key}.lora_down.weight": down,
        f"{key}.lora_up.weight": up * scale,
        f"{key}.alpha": torch.tensor(4.0),
    }
    write(host.model_path("loras", name), tensors)
    host.refresh()
    return name, up @ down * scale


def test_a_lora_of_bert_by_comfyuis_own_loader(host: Host, small: SimpleNamespace) -> None:
    name, delta = lora(host, "bert.safetensors")
    before = encode(host, small.clip, "a red apple")
    graph = Graph()
    with_lora = graph.add(
        "LoraLoader", model=host.give(graph, None), clip=host.give(graph, small.clip), lora_name=name,
        strength_model=0.0, strength_clip=0.5,
    )  # fmt: skip
    found = host.values(graph, ours(host, graph, with_lora.out(1), "a red apple"))[0]
    merged = bert_model()
    merged.encoder.layer[0].attention.self.query.weight += 0.5 * delta
    tokens = Tokenizers(VOCAB, SPIECE)("a red apple")
    expected = merged(input_ids=tokens.bert_ids, attention_mask=tokens.bert_mask).last_hidden_state
    assert (found[0][0] - expected).abs().max() <= 1e-4
    assert not torch.equal(found[0][0], before[0][0])
    assert same(encode(host, small.clip, "a red apple"), before)  # the clip given is not altered


@pytest.mark.parametrize("which", ["ours", "native", "ours with ComfyUI's node"])
def test_scheduled_hooks_keep_mt5_and_masks(host: Host, pair: SimpleNamespace, which: str) -> None:
    clip = pair.native if which == "native" else pair.ours
    name, _ = lora(host, "hook.safetensors")
    plain = encode(host, clip, "a red apple")
    graph = Graph()
    hook = graph.add("CreateHookLora", lora_name=name, strength_model=0.0, strength_clip=1.0)
    frames = graph.add("CreateHookKeyframe", strength_mult=1.0, start_percent=0.0)
    frames = graph.add("CreateHookKeyframe", strength_mult=0.0, start_percent=0.5, prev_hook_kf=frames)
    hook = graph.add("SetHookKeyframes", hooks=hook, hook_kf=frames)
    hooked = graph.add(
        "SetClipHooks", clip=host.give(graph, clip), hooks=hook, apply_to_conds=True, schedule_clip=True
    )
    if which in ("ours", "native"):
        node = ours(host, graph, hooked, "a red apple", width=64, height=64)
    else:
        node = graph.add("CLIPTextEncode", clip=hooked, text="a red apple")
    conditioning = host.values(graph, node)[0]
    assert len(conditioning) == 2
    for bert, extra in conditioning:
        assert bert.shape == plain[0][0].shape and "hooks" in extra
        assert extra.get("width", 64) == 64 and ("width" in extra) == (which in ("ours", "native"))
        for key in ("conditioning_mt5xl", "attention_mask", "attention_mask_mt5xl"):
            assert torch.equal(extra[key], plain[0][1][key])
    assert not torch.equal(conditioning[0][0], plain[0][0])
    assert torch.equal(conditioning[1][0], plain[0][0])
    assert same(encode(host, clip, "a red apple"), plain)
