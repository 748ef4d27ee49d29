"""The loaders in the graph: what they list, what they load, and what they say of wrong files."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from find_host import ROOT
from graphs import Graph, text_to_image
from loader_files import EMBEDDED, NAME, PARTS, stored, tensors, version, write_all, write_wrong
from safetensors.torch import load_file, save_file

CHECKPOINT, DIT, TEXT = "HyDiTCheckpointLoader", "HyDiTDiTLoader", "HyDiTTextEncoderLoader"
WIDGET = {CHECKPOINT: "ckpt_name", DIT: "model_name", TEXT: "bert_name"}


@pytest.fixture(scope="module")
def models(host):
    """The host's models folder with everything of `loader_files` in it, emptied afterwards."""
    before = set(host.models_dir.rglob("*"))
    write_all(host.models_dir)
    write_wrong(host.models_dir)
    host.refresh()
    yield host.models_dir
    for path in sorted(set(host.models_dir.rglob("*")) - before, reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    host.refresh()


def loader(kind: str, name: str, **widgets: str) -> Graph:
    """One loader, with something that makes ComfyUI run it."""
    graph = Graph()
    node = graph.add(kind, _defaults=True, **{WIDGET[kind]: name}, **widgets)
    graph.add("HyDiTTestCapture", value=node.out(0))
    return graph


def options(host, kind: str, widget: str | None = None) -> list[str]:
    return host.input_types(kind)["required"][widget or WIDGET[kind]][1]["options"]


def weights(module) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    wrong = [key for key, value in expected.items() if not torch.equal(found[key].to(value), value)]
    assert not wrong


# -- lists ---------------------------------------------------------------------------------------------------


def test_the_embedded_model_comes_first_and_only_for_us(host, models):
    for kind in (CHECKPOINT, DIT, TEXT):
        assert options(host, kind)[0] == NAME
    assert options(host, TEXT, "mt5_name")[:2] == ["same as bert_name", NAME]
    for kind, (folders, _) in host.folder_paths.folder_names_and_paths.items():
        inside = [folder for folder in folders if Path(folder).resolve().is_relative_to(ROOT)]
        assert not inside, (kind, inside)
    stock = host.input_types("CheckpointLoaderSimple")["required"]["ckpt_name"]
    assert "mine.safetensors" in str(stock) and "embedded" not in str(stock)


def test_a_fresh_install_draws(host, monkeypatch, tmp_path):
    """No model file anywhere, not even the folders."""
    paths = host.folder_paths.folder_names_and_paths
    for kind in ("checkpoints", "diffusion_models", "text_encoders", "diffusers"):
        monkeypatch.setitem(paths, kind, ([str(tmp_path / kind)], paths[kind][1]))
    host.refresh()
    assert [options(host, kind) for kind in (CHECKPOINT, DIT, TEXT)] == [[NAME]] * 3
    host.run(text_to_image(steps=1, width=64, height=64)).check()
    monkeypatch.undo()
    host.refresh()


def test_every_form_is_listed_where_it_can_be_loaded(host, models):
    checkpoints = options(host, CHECKPOINT)
    for name in ("mine.safetensors", os.path.join("sub", "mine.safetensors"), "pipe/", "tencent/"):
        assert name in checkpoints
    assert [name for name in checkpoints if name.endswith("/")] == ["pipe/", "tencent/"]
    assert {"dit.safetensors", "mine.safetensors", "pipe/", "tencent/"} <= set(options(host, DIT))
    encoders = options(host, TEXT)
    expected = {
        "bert.safetensors",
        "mt5.safetensors",
        "bert-folder/",
        "mt5-folder/",
        "mine.safetensors",
        "pipe/",
    }
    assert expected <= set(encoders) and "empty/" not in encoders
    for kind in (CHECKPOINT, DIT, TEXT):
        names = options(host, kind)
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["a/transformer/x.safetensors", "a/text_encoder/m.bin"], ["a/"]),
        (["deep/er/a/transformer/x-00001-of-00002.safetensors"], ["deep/er/a/"]),
        (["HunyuanDiT/t2i/model/pytorch_model_ema.pt", "HunyuanDiT/t2i/mt5/x.bin"], ["HunyuanDiT/"]),
        (["t2i/model/pytorch_model_ema.pt"], ["t2i/"]),
        (["renamed/model/pytorch_model_module.pt"], ["renamed/"]),
        (["sdxl/unet/x.safetensors", "my/model/cat.safetensors", "transformer/x.safetensors"], []),
        (["a/transformer/config.json"], []),
    ],
)
def test_folders_are_recognized(host, monkeypatch, tmp_path, files, found):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    paths = host.folder_paths.folder_names_and_paths
    for kind in ("checkpoints", "diffusers"):
        empty = ([str(tmp_path / "nothing")], paths[kind][1])
        for other in ("checkpoints", "diffusers"):
            monkeypatch.setitem(paths, other, empty)
        monkeypatch.setitem(paths, kind, ([str(tmp_path)], paths[kind][1]))
        host.refresh()
        names = host.module("nodes.host.folders").checkpoint_names()
        assert [name for name in names if name.endswith("/")] == found
        monkeypatch.undo()
    host.refresh()


# -- loading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [NAME, "mine.safetensors", "sub/mine.safetensors", r"sub\mine.safetensors", "pipe/"]
)
def test_checkpoint_loader(host, models, name):
    graph = loader(CHECKPOINT, name)
    model, clip, vae = host.values(graph, ("1", 0), ("1", 1), ("1", 2))
    same(weights(model.model.diffusion_model), stored())
    bert, mt5 = clip.cond_stage_model.hydit_clip.transformer, clip.cond_stage_model.mt5xl.transformer
    same({k.removeprefix("bert."): v for k, v in weights(bert).items()}, _bert())
    same({k: v for k, v in weights(mt5).items() if k != "encoder.embed_tokens.weight"}, tensors("mt5"))
    found = {key: value.half() for key, value in weights(vae.first_stage_model).items()}
    same(found, tensors("vae"))
    assert model.model.hydit_info.to_json() == PARTS.info.to_json()
    assert host.run(graph).check().outputs["1"]["hydit_version"] == [f"{version()}, fp16"]


def _bert() -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors("bert").items() if not key.startswith("pooler")}


@pytest.mark.parametrize("name", [NAME, "dit.safetensors", "mine.safetensors", "pipe/", "tencent/"])
def test_dit_loader(host, models, name):
    graph = loader(DIT, name)
    (model,) = host.values(graph, ("1", 0))
    same(weights(model.model.diffusion_model), stored())
    (shown,) = host.run(graph).check().outputs["1"]["hydit_version"]
    assert shown.startswith(f"{version()}, ") and shown.endswith("fp16")
    assert ("ema" in shown) == (name == "tencent/")


@pytest.mark.parametrize(
    ("bert", "mt5"),
    [
        (NAME, "same as bert_name"),
        (NAME, NAME),
        ("mine.safetensors", "same as bert_name"),
        ("pipe/", "same as bert_name"),
        ("bert.safetensors", "mt5.safetensors"),
        ("bert-folder/", "mt5-folder/"),
        ("pipe/", "mt5.safetensors"),
    ],
)
def test_text_encoder_loader(host, models, bert, mt5):
    graph = loader(TEXT, bert, mt5_name=mt5)
    (clip,) = host.values(graph, ("1", 0))
    same(
        {
            k.removeprefix("bert."): v
            for k, v in weights(clip.cond_stage_model.hydit_clip.transformer).items()
        },
        _bert(),
    )
    found = weights(clip.cond_stage_model.mt5xl.transformer)
    same({k: v for k, v in found.items() if k != "encoder.embed_tokens.weight"}, tensors("mt5"))
    assert host.run(graph).check().outputs["1"]["hydit_version"] == ["BERT fp16, mT5 fp16"]


def test_parts_from_anywhere_draw_the_same_picture(host, models):
    whole = text_to_image(steps=2, width=64, height=64, save=False)
    parts = whole.copy()
    model = parts.add(DIT, _defaults=True, model_name="dit.safetensors")
    clip = parts.add(TEXT, _defaults=True, bert_name="mine.safetensors")
    parts.set("2", clip=clip.out(0)).set("3", clip=clip.out(0)).set("5", model=model.out(0))
    first, second = host.values(whole, ("6", 0))[0], host.values(parts, ("6", 0))[0]
    assert torch.equal(first, second) and first.std() > 0.05


@pytest.mark.parametrize("weight_dtype", ["fp32", "bf16", "fp8_e4m3fn"])
def test_weight_dtypes(host, models, weight_dtype):
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8_e4m3fn": torch.float8_e4m3fn}[
        weight_dtype
    ]
    for kind in (CHECKPOINT, DIT):
        (model,) = host.values(loader(kind, NAME, weight_dtype=weight_dtype), ("1", 0))
        assert model.model.diffusion_model.blocks[0].attn1.Wqkv.weight.dtype == expected
    (clip,) = host.values(loader(TEXT, NAME, weight_dtype=weight_dtype), ("1", 0))
    matrix = clip.cond_stage_model.mt5xl.transformer.encoder.block[0].layer[0].SelfAttention.q.weight
    assert matrix.dtype == expected


@pytest.mark.parametrize(("kind", "folder"), [(CHECKPOINT, "checkpoints"), (DIT, "diffusion_models")])
def test_a_retrained_file_of_the_same_name_is_loaded_again(host, models, kind, folder):
    path = host.model_path(folder, "retrained.safetensors")
    shutil.copy(EMBEDDED, path)
    host.refresh()
    graph = loader(kind, "retrained.safetensors")
    (first,) = host.values(graph, ("1", 0))
    assert "1" in host.run(graph, keep_cache=True).check().cached
    trained = load_file(EMBEDDED)
    key = "model.diffusion_model.blocks.0.attn1.Wqkv.weight"
    trained[key] = trained[key] * 2
    save_file(trained, path, metadata=dict(PARTS.metadata))
    (second,) = host.values(graph, ("1", 0), keep_cache=True)
    before, after = (m.model.diffusion_model.blocks[0].attn1.Wqkv.weight for m in (first, second))
    assert torch.equal(after, before * 2) and torch.equal(before, stored()["blocks.0.attn1.Wqkv.weight"])
    path.unlink()


def test_a_changed_file_in_a_folder_is_noticed(host, models):
    fingerprint = host.module("nodes.host.folders").fingerprint
    folder = models / "text_encoders" / "bert-folder"
    before = fingerprint(folder)
    assert fingerprint(folder) == before
    (folder / "vocab.txt").touch()
    assert fingerprint(folder) != before


# -- errors --------------------------------------------------------------------------------------------------

WRONG = {
    CHECKPOINT: {
        "sdxl.safetensors": "is an SDXL checkpoint; expected a HunyuanDiT all-in-one .*; ComfyUI has loaders",
        "controlnet.safetensors": r"HunyuanDiT-g/2 v1\.2 ControlNet; expected .*HyDiTControlNetLoader",
        "lora.safetensors": r"HunyuanDiT LoRA \(PEFT layout\); expected .*LoRA loader",
        "cut.safetensors": "is truncated: .* download or save it again",
        "v12.safetensors": r"v1\.2 checkpoint without BERT and mT5 and VAE; .*HyDiTDiTLoader, .*VAELoader",
        "no_vae.safetensors": "without VAE; .*HyDiTDiTLoader, .*HyDiTTextEncoderLoader and VAELoader",
        "vae.safetensors": "is a VAE .*; load it with VAELoader",
        "empty/": "holds no HunyuanDiT and no BERT .*no weights in itself, nor in transformer",
    },
    DIT: {
        "sdxl.safetensors": r"is an SDXL checkpoint; expected a HunyuanDiT \(DiT\) .*; ComfyUI has loaders",
        "controlnet.safetensors": r"HunyuanDiT-g/2 v1\.2 ControlNet; expected .*HyDiTControlNetLoader",
        "lora.safetensors": r"HunyuanDiT LoRA \(PEFT layout\); expected .*LoRA loader",
        "cut.safetensors": "is truncated: .* download or save it again",
        "vae.safetensors": "is a VAE .*; load it with VAELoader",
        "empty/": "holds no HunyuanDiT: no weights in itself, nor in transformer",
    },
    TEXT: {
        "sdxl.safetensors": "is an SDXL checkpoint; expected a file or folder with BERT; .*choose another",
        "cut.safetensors": "is truncated: .* download or save it again",
        "v12.safetensors": "v1.2 checkpoint; expected a file or folder with BERT; it has no text encoders",
        "mt5.safetensors": "is an mT5 .*; expected a file or folder with BERT; give it as mt5_name",
        "empty/": "holds no BERT and no mT5: no weights in itself",
    },
}
WRONG_MT5 = {
    "no-tokenizer/": r"mT5's tokenizer was found neither in .*no-tokenizer\S* nor beside it .*spiece\.model",
    "bert-folder/": "holds no mT5|is a BERT .*; expected a file or folder with mT5",
    "bert.safetensors": "is a BERT .*; expected a file or folder with mT5; give it as bert_name",
    "t5xxl.safetensors": "is T5 v1.1 .*; expected mT5",
    "v12.safetensors": "expected a file or folder with mT5",
    "same as bert_name": "is a BERT .*; expected a file or folder with mT5",
}


def fails(host, graph: Graph, expected: str) -> str:
    """Why the loader, node "1", does not show one line that says what to do, or the next prompt fails."""
    result = host.run(graph)
    if result.ok or result.error.node_id != "1":
        return f"no error on the loader: {result.error}"
    message, kind = result.error.exception_message, result.error.exception_type
    if not re.search(expected, message) or "\n" in message or not kind.endswith("WeightsError"):
        return f"{kind}: {message}"
    after = host.run(loader(graph.prompt["1"]["class_type"], NAME), keep_cache=True)
    return "" if after.ok else f"then: {after.error}"


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_files(host, models, kind):
    wrong = {name: fails(host, loader(kind, name), expected) for name, expected in WRONG[kind].items()}
    assert not any(wrong.values()), wrong


def test_wrong_second_encoder(host, models):
    graphs = {name: loader(TEXT, "bert.safetensors", mt5_name=name) for name in WRONG_MT5}
    wrong = {name: fails(host, graph, WRONG_MT5[name]) for name, graph in graphs.items()}
    assert not any(wrong.values()), wrong


def test_after_a_wrong_file_the_next_picture_is_the_same(host, models):
    graph = text_to_image(steps=2, width=64, height=64, save=False)
    (before,) = host.values(graph, ("6", 0))
    wrong = graph.copy().set("1", ckpt_name="sdxl.safetensors")
    wrong.add("PreviewImage", images=["6", 0])
    assert host.run(wrong, keep_cache=True).error.node_id == "1"
    (after,) = host.values(graph, ("6", 0), keep_cache=True)
    assert torch.equal(before, after)


@pytest.mark.parametrize("kind", [CHECKPOINT, DIT, TEXT])
def test_a_name_that_is_gone_is_refused_before_anything_runs(host, models, kind):
    for name in ("gone.safetensors", "gone/", "../checkpoints/", "[embedded] another", ""):
        result = host.run(loader(kind, name))
        assert not result.ok and not result.executed
        details = result.error.node_errors["1"]["errors"][0]["details"]
        assert name in details and "\n" not in details
        assert (NAME if name.startswith("[") else "There is: ") in details
    host.run(loader(kind, NAME)).check()


def test_a_file_that_goes_between_queueing_and_running(host, models):
    path = host.model_path("checkpoints", "going.safetensors")
    shutil.copy(EMBEDDED, path)
    host.refresh()
    graph = loader(CHECKPOINT, "going.safetensors")
    node = host.nodes.NODE_CLASS_MAPPINGS[CHECKPOINT]
    assert node.validate_inputs(ckpt_name="going.safetensors") is True
    path.unlink()
    with pytest.raises(Exception, match=r"going\.safetensors is not there \(any more\)"):
        node.execute("going.safetensors", "default")
    assert not host.run(graph).ok


def test_a_linked_name_is_judged_when_it_is_known(host, models):
    """Its value is not there when the prompt is validated."""
    graph = Graph()
    name = host.give(graph, "mine.safetensors")
    node = graph.add(CHECKPOINT, ckpt_name=name.out(0), weight_dtype="default")
    assert host.values(graph, node)[0].model is not None
    graph = Graph()
    name = host.give(graph, "gone.safetensors")
    node = graph.add(CHECKPOINT, ckpt_name=name.out(0), weight_dtype="default")
    graph.add("HyDiTTestCapture", value=node.out(0))
    result = host.run(graph)
    assert result.error.node_id == node.id and "is not there" in result.error.exception_message


def test_every_folder_is_walked_once(host, monkeypatch, tmp_path):
    """Lists of many files: all nodes together, and again only where something changed."""
    folders = host.module("nodes.host.folders")
    roots = {
        kind: [str(tmp_path / kind)] for kind in (*folders.DIT, *folders.TEXT_ENCODERS, "controlnet", "loras")
    }
    for kind in roots:
        (tmp_path / kind / "pipeline" / "transformer").mkdir(parents=True)
        (tmp_path / kind / "pipeline" / "transformer" / "model.safetensors").write_bytes(b"")
    known = host.folder_paths.folder_names_and_paths
    for kind, paths in roots.items():
        monkeypatch.setitem(known, kind, (paths, known[kind][1]))
    host.refresh()
    walked: list[str] = []
    walk = os.walk
    monkeypatch.setattr(
        os, "walk", lambda top, *args, **given: walked.append(str(top)) or walk(top, *args, **given)
    )

    def lists() -> list[list[str]]:
        names = "checkpoint_names", "dit_names", "text_encoder_names", "control_names", "lora_names"
        return [getattr(folders, name)() for name in names]

    found = lists()
    assert "pipeline/" in found[0] and sorted(walked) == sorted(
        path for paths in roots.values() for path in paths
    )
    assert lists() == found and len(walked) == len(roots)
    new = tmp_path / "diffusers" / "other" / "transformer"
    new.mkdir(parents=True)
    (new / "model.safetensors").write_bytes(b"")
    assert "other/" in lists()[0] and walked[len(roots) :] == roots["diffusers"]
    host.refresh()


NAMED = {
    "HyDiTCheckpointLoader": ("ckpt_name",),
    "HyDiTDiTLoader": ("model_name",),
    "HyDiTTextEncoderLoader": ("bert_name", "mt5_name"),
    "HyDiTControlNetLoader": ("control_net_name",),
    "HyDiTLoraMerge": ("lora_name",),
}


@pytest.mark.parametrize("kind", NAMED)
def test_names_of_odd_types_give_one_line(host, kind):
    """Prompts come from programs as well as from pages."""
    for widget in NAMED[kind]:
        for name in (None, 3, 1.5, True, {"a": 1}, [], ["1"], "a" * 5000, "\x1b[31m"):
            g = Graph()
            node = g.add(kind, _defaults=True, **{widget: name})
            g.add("PreviewAny", source=node)
            result = host.run(g)
            assert not result.ok
            if name is None:  # as a name that another node gives is, before it runs
                said = result.error.exception_message
            else:
                told = result.error.node_errors[node.id]["errors"][-1]
                assert told["type"] == "custom_validation_failed", (name, told)
                said = told["details"]
            expected = "is not there" if isinstance(name, str) else f"{name!r} is not the name of a file;"
            assert expected in said and said.isprintable() and len(said) < 1500
