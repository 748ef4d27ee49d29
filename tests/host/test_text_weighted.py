"""Weights at any length, and learned embeddings that do not reach an encoder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from graphs import Graph
from in_process import Host
from test_text import encode, load, ours, same
from text_models import all_in_one, bert_model, metadata, t5_model, write


@pytest.fixture(scope="module")
def small(host: Host, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A CLIP, and the models that it came from."""
    bert, t5 = bert_model(), t5_model()
    path = tmp_path_factory.mktemp("small") / "encoders.safetensors"
    write(path, all_in_one(bert, t5), metadata(bert, t5))
    return SimpleNamespace(bert=bert, t5=t5, clip=load(host, path))


@pytest.fixture
def wrong_embeddings(host: Host, small: SimpleNamespace) -> Iterator[Path]:
    """Files in models/embeddings that fit neither encoder, one of them, or that are none."""
    folder = Path(host.folder_paths.get_folder_paths("embeddings")[0])
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    write(folder / "sd15.safetensors", {"emb_params": torch.ones(3, 768)})
    write(
        folder / "half.safetensors", {"chinese_roberta": small.bert.embeddings.word_embeddings.weight[[41]]}
    )
    write(folder / "deep.safetensors", {"x": torch.ones(1, 2, 3, 4)})
    write(folder / "empty.safetensors", {})
    (folder / "broken.safetensors").write_bytes(b"no weights")
    torch.save([1, "two"], folder / "odd.pt")
    yield folder
    for path in set(folder.iterdir()) - before:
        path.unlink()


def test_embeddings_that_do_not_reach_an_encoder_are_not_counted(
    host: Host, small: SimpleNamespace, wrong_embeddings: Path
) -> None:
    """The report is what is encoded: as if the prompt did not name them, and it says which it leaves out."""
    tokens = host.module("nodes.host.tokens")
    width = small.bert.config.hidden_size
    plain, plain_report = tokens.weighted_tokens(small.clip, "a red apple")
    for name, reason in {
        "sd15": rf"768 wide, not {width}", "missing": "not found, or not readable",
        "broken": "not found, or not readable", "deep": "its file holds no embedding",
    }.items():  # fmt: skip
        for text in (
            f"a embedding:{name} red apple",
            f"a (embedding:{name}:1.3) red apple, embedding:{name}",
        ):
            lists, report = tokens.weighted_tokens(small.clip, text)
            bert = [token for token, _ in lists["hydit_clip"][0]]
            assert not any(torch.is_tensor(token) for token in bert)
            assert re.search(rf"BERT is not given: embedding:{name} \({reason}\)", str(report)), str(report)
            assert str(report).count(f"embedding:{name}") == 2  # once for each encoder
        lists, report = tokens.weighted_tokens(small.clip, f"a embedding:{name} red apple")
        assert lists["hydit_clip"] == plain["hydit_clip"]
        assert report.bert.n_tokens == plain_report.bert.n_tokens
    report = tokens.weighted_tokens(small.clip, "a embedding:half, red apple")[1]
    assert not report.bert.left_out and report.t5.left_out[0].startswith("embedding:half (")
    assert report.bert.n_tokens == plain_report.bert.n_tokens + 2  # the embedding and the comma
    # What is cut is counted without them too
    report = tokens.weighted_tokens(small.clip, "embedding:sd15 " + "a " * 75)[1]
    assert report.bert.n_tokens == 77 and not report.bert.truncated


def test_embeddings_that_comfyui_cannot_read_are_told_on_the_node(
    host: Host, small: SimpleNamespace, wrong_embeddings: Path
) -> None:
    for name in ("empty", "odd", ""):
        graph = Graph()
        graph.add("PreviewAny", source=ours(host, graph, small.clip, f"a embedding:{name}", mode="weighted"))
        error = host.run(graph).error
        assert error.node_type == "HyDiTTextEncode" and "\n" not in error.exception_message
        assert f"embedding:{name} in the prompt cannot be used" in error.exception_message


def test_long_weighted_mode_is_both(host: Host, small: SimpleNamespace) -> None:
    tokens = host.module("nodes.host.tokens")
    text = "a red apple, a green car, two small birds on the left of the blue house; " * 20
    plain, weighted = (encode(host, small.clip, text, mode=mode) for mode in ("long", "long weighted"))
    assert same(plain, weighted)
    short = "a (red:1.5) apple"
    assert same(*(encode(host, small.clip, short, mode=mode) for mode in ("weighted", "long weighted")))
    # Words and weights go through the chunks in their order, and every chunk has its own ends
    lists, report = tokens.long_weighted_tokens(small.clip, "(red:1.5) apple " * 60 + "(green:0.5)")
    chunks = lists["hydit_clip"]
    assert len(chunks) == report.bert.chunks == 2 and all(len(chunk) == 77 for chunk in chunks)
    assert all(chunk[0][0] == 2 and [t for t, _ in chunk].count(3) == 1 for chunk in chunks)
    content = [pair for chunk in chunks for pair in chunk if pair[0] not in (0, 2, 3)]
    assert [weight for _, weight in content] == [1.5, 1.0] * 60 + [0.5]
    assert "does not see" not in str(report) and "BERT 125 tokens in 2 chunks of 77" in str(report)
    heavy = encode(host, small.clip, text.replace("house", "(house:1.4)"), mode="long weighted")
    assert not torch.equal(heavy[0][0], plain[0][0]) and heavy[0][0].shape == plain[0][0].shape
