"""Saved files open everywhere with the same bits; what fails leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
from types import SimpleNamespace

import comfy.sd
import comfy.utils
import pytest
import tiny
import torch
from graphs import Graph, text_to_image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hydit_core
from hydit_core.embedded import embedded_model
from hydit_core.facts import DiffusionConfig, ModelInfo
from hydit_core.text.loading import load_text_encoders
from hydit_core.weights.bundle import bundle

EMBEDDED = "[embedded] hydit-icons-128"


def checkpoint(g: Graph, name: str = EMBEDDED, **options):
    return g.add("HyDiTCheckpointLoader", _defaults=True, ckpt_name=name, **options)


def saving(g: Graph, model, clip=None, vae=None, prefix="checkpoints/hydit"):
    """Add the save node; its id."""
    parts = {name: part for name, part in (("clip", clip), ("vae", vae)) if part is not None}
    return g.add("HyDiTModelSave", model=model, filename_prefix=prefix, **parts).id


def whole(prefix="checkpoints/hydit", name=EMBEDDED, **options):
    """The graph that loads and saves everything, and the id of its save node."""
    g = Graph()
    ckpt = checkpoint(g, name, **options)
    return g, saving(g, ckpt.out(0), ckpt.out(1), ckpt.out(2), prefix)


def saved(host, graph, **options):
    """Run a graph with its save node; the file."""
    g, node = graph
    name = host.run(g, **options).check().outputs[node]["hydit_saved"][0]
    path = host.output_dir / name
    assert path.is_file()
    return path


def info_of(path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return ModelInfo.from_metadata(metadata, version="v1.0"), metadata


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.fixture
def folder(host, request):
    """A fresh folder below the output folder."""
    return f"checkpoints/{request.node.name.replace('[', '-').replace(']', '')}"


def files(host, folder):
    return sorted(path.name for path in (host.output_dir / folder).glob("*"))


@pytest.fixture
def tiny_file(host):
    """A small random model in the checkpoints folder; its writer."""
    paths = []

    def write(name, *args, **changes):
        paths.append(tiny.write_tiny_model(host.model_path("checkpoints", name), *args, **changes))
        host.refresh()
        return name

    yield write
    for path in paths:
        path.unlink()


def test_an_untouched_model_is_written_as_it_was(host, folder):
    path = saved(host, whole(f"{folder}/a"), extra_data={"extra_pnginfo": {"workflow": {"nodes": [7]}}})
    assert path == host.output_dir / folder / "a_00001_.safetensors"
    assert_same_tensors(load_file(path), load_file(embedded_model()))
    info, metadata = info_of(path)
    expected, _ = info_of(embedded_model())
    assert (info.defaults, info.diffusion, info.pooler_heads) == (
        expected.defaults, expected.diffusion, expected.pooler_heads,
    )  # fmt: skip
    assert (info.bert, info.t5) == (expected.bert, expected.t5)
    assert info.vae["preview_rgb"] == expected.vae["preview_rgb"]
    assert metadata["modelspec.architecture"] == "hunyuan-dit-v1_2"
    assert json.loads(metadata["workflow"]) == {"nodes": [7]}
    assert json.loads(metadata["prompt"])["2"]["class_type"] == "HyDiTModelSave"
    # It opens again, in the graph and without ComfyUI, and draws the same.
    host.refresh()
    pixels = [
        host.values(text_to_image(ckpt=name, save=False), ("6", 0))[0]
        for name in (EMBEDDED, path.relative_to(host.output_dir / "checkpoints").as_posix())
    ]
    assert pixels[0].std() > 0.05 and torch.equal(*pixels)
    pictures = [
        hydit_core.load(place, dtype="float32")("a red apple", seed=1, steps=2)[0]
        for place in (embedded_model(), path)
    ]
    assert pictures[0].tobytes() == pictures[1].tobytes()


def test_the_dit_alone(host, folder):
    g = Graph()
    ckpt = checkpoint(g)
    path = saved(host, (g, saving(g, ckpt.out(0), prefix=f"{folder}/dit")))
    source = load_file(embedded_model())
    dit = {name: value for name, value in source.items() if name.startswith("model.diffusion_model.")}
    assert_same_tensors(load_file(path), dit)
    host.refresh()
    name = path.relative_to(host.output_dir / "checkpoints").as_posix()
    g = Graph()
    again = g.add("HyDiTDiTLoader", model_name=name, weight_dtype="default")
    (model,) = host.values(g, again)
    assert host.module("nodes.host.model").model_info(model).defaults.steps == 25
    tensors = {f"model.diffusion_model.{k}": v for k, v in model.model.diffusion_model.state_dict().items()}
    assert_same_tensors(tensors, dit)


def test_names_count_on_and_know_the_date(host, folder):
    names = [saved(host, whole(f"{folder}/x_%year%")).name for _ in range(2)]
    year = names[0][2:6]
    assert year.isdecimal() and int(year) > 2024
    assert names == [f"x_{year}_00001_.safetensors", f"x_{year}_00002_.safetensors"]
    wrong = ("../x", "leads out of the output folder"), (" ", "is not a name"), ("x/..", "is not a name")
    for prefix, message in wrong:
        g, node = whole(prefix)
        error = host.run(g).error
        assert (error.node_id, error.exception_type.split(".")[-1]) == (node, "ConfigError")
        assert message in error.exception_message and "\n" not in error.exception_message


def test_no_spelling_of_a_name_replaces_a_file(host, folder):
    for count, name in enumerate(("y", "y/", "y//", "y/.", "z/../y"), start=1):
        assert saved(host, whole(f"{folder}/{name}")).name == f"y_{count:05}_.safetensors"


def test_names_that_differ_in_case_only_replace_nothing(host, folder, monkeypatch):
    """As where the file system takes both for one, and ComfyUI's counter does not."""
    save_path = host.module("nodes.host.save").save_path
    taken = host.output_dir / folder / "x_00001_.safetensors"
    monkeypatch.setattr(os.path, "exists", lambda path: str(path) == str(taken))
    assert save_path(f"{folder}/x").name == "x_00002_.safetensors"


def test_patches_are_written_and_taken_off_again(host, folder):
    """A LoRA from a file on both MODEL and CLIP, and a patch of a parameter that belongs to no layer."""
    generator = torch.Generator().manual_seed(1)
    source = load_file(embedded_model())
    layers = {
        "diffusion_model.blocks.1.attn1.Wqkv": "model.diffusion_model.blocks.1.attn1.Wqkv.weight",
        "text_encoders.mt5xl.transformer.encoder.block.0.layer.0.SelfAttention.q": (
            "text_encoders.mt5xl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"
        ),
    }
    lora, expected = {}, {}
    for name, weight in layers.items():
        rows, columns = source[weight].shape
        up = torch.randn(rows, 2, generator=generator) * 0.1
        down = torch.randn(2, columns, generator=generator)
        lora |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        expected[weight] = source[weight].float() + 0.5 * up @ down
    save_file(lora, host.model_path("loras", "save.safetensors"))
    host.refresh()

    g = Graph()
    ckpt = checkpoint(g)
    patched = g.add(
        "LoraLoader", model=ckpt.out(0), clip=ckpt.out(1), lora_name="save.safetensors",
        strength_model=0.5, strength_clip=0.5,
    )  # fmt: skip
    plain, model, clip, vae = host.values(g, ckpt, patched.out(0), patched.out(1), ckpt.out(2))
    padding = "model.diffusion_model.text_embedding_padding"
    expected[padding] = source[padding].float() + 0.25
    model.add_patches({padding.removeprefix("model."): ("diff", (torch.full_like(source[padding], 0.25),))})

    def write(model, clip):
        g = Graph()
        return saved(
            host, (g, saving(g, host.give(g, model), host.give(g, clip), host.give(g, vae), f"{folder}/p"))
        )

    found = load_file(write(model, clip))
    assert found.keys() == source.keys()
    for name, value in source.items():
        if name in expected:
            assert (found[name].float() - expected[name]).abs().max() <= 2e-3 * expected[name].abs().max()
            assert not torch.equal(found[name], value)
        else:
            assert torch.equal(found[name], value), name
    # The MODEL without patches shares its weights with the patched one.
    assert plain.model is model.model
    (clip,) = host.values(g, ckpt.out(1))
    assert_same_tensors(load_file(write(plain, clip)), source)


def test_a_patched_model_draws_the_same_from_its_file(host, folder):
    def graph(name, patch):
        g = text_to_image(ckpt=name, save=False)
        if patch:
            merged = g.add(
                "ModelMergeSubtract", model1=["1", 0], model2=["1", 0], multiplier=0.02
            )  # W - 0.02 W
            g.set("5", model=merged.out(0))
            saving(g, merged.out(0), ["1", 1], ["1", 2], f"{folder}/m")
        return g

    with_patch = host.values(graph(EMBEDDED, True), ("6", 0))[0]
    host.refresh()
    (name,) = files(host, folder)
    read = host.values(graph(f"{folder.removeprefix('checkpoints/')}/{name}", False), ("6", 0))[0]
    plain = host.values(graph(EMBEDDED, False), ("6", 0))[0]
    assert (with_patch - plain).abs().max() > 0.02
    assert torch.equal(with_patch, read)


def test_encoders_of_another_file_bring_their_own_facts(host, tiny_file, folder):
    """The DiT's file says nothing of BERT's heads, whose number its width does not tell either."""
    mixed = tiny_file("other.safetensors")
    alone = host.model_path("diffusion_models", "alone.safetensors")
    save_file(dict(bundle(host.models_dir / "checkpoints" / mixed).dit), alone)
    host.refresh()
    g = Graph()
    dit = g.add("HyDiTDiTLoader", model_name="alone.safetensors", weight_dtype="default")
    clip = g.add(
        "HyDiTTextEncoderLoader", bert_name=mixed, mt5_name="same as bert_name", weight_dtype="default"
    )
    path = saved(host, (g, saving(g, dit, clip, prefix=f"{folder}/joined")))
    lengths = {"text_len": tiny.TINY.text_len, "t5_len": tiny.TINY.t5_len}
    found = load_text_encoders(path, **lengths)
    expected = load_text_encoders(host.models_dir / "checkpoints" / mixed, **lengths)
    assert found.info() == expected.info() and found.bert.config.num_attention_heads == 2
    for ours, theirs in zip(found.encode("a red apple"), expected.encode("a red apple"), strict=True):
        assert torch.equal(ours, theirs)
    alone.unlink()


def test_what_stock_loaders_would_misread_is_said(host, tiny_file, folder, caplog):
    epsilon = tiny_file("eps.safetensors", diffusion=DiffusionConfig(prediction="epsilon"))
    g, node = whole(f"{folder}/eps", epsilon)
    _, note = host.run(g).check().outputs[node]["hydit_saved"]
    assert "epsilon-prediction" in note and "HyDiTCheckpointLoader" in note and note in caplog.text
    info, _ = info_of(host.output_dir / folder / "eps_00001_.safetensors")
    assert info.diffusion.prediction == "epsilon"
    betas = tiny_file("betas.safetensors", diffusion=DiffusionConfig(beta_end=0.025))
    g, node = whole(f"{folder}/betas", betas)
    assert "betas 0.00085 to 0.025" in host.run(g).check().outputs[node]["hydit_saved"][1]
    g, node = whole(f"{folder}/v", tiny_file("v.safetensors"))
    assert len(host.run(g).check().outputs[node]["hydit_saved"]) == 1


def test_eight_bits_stay_eight_bits(host, folder):
    g, node = whole(f"{folder}/fp8", weight_dtype="fp8_e4m3fn")
    name, note = host.run(g).check().outputs[node]["hydit_saved"]
    assert "float8_e4m3fn" in note and "weight_dtype default" in note
    found = load_file(host.output_dir / name)
    assert found["model.diffusion_model.blocks.0.mlp.fc1.weight"].dtype == torch.float8_e4m3fn
    assert found["model.diffusion_model.blocks.0.mlp.fc1.bias"].dtype.itemsize > 1
    host.refresh()
    again, _ = whole(f"{folder}/fp8", name.removeprefix("checkpoints/"))
    assert_same_tensors(load_file(saved(host, (again, node))), found)


def test_metadata_can_be_turned_off(host, folder, monkeypatch):
    monkeypatch.setattr(host.comfy_module("comfy.cli_args").args, "disable_metadata", True)
    path = saved(host, whole(f"{folder}/x"), extra_data={"extra_pnginfo": {"workflow": {}}})
    _, metadata = info_of(path)
    assert "prompt" not in metadata and "workflow" not in metadata and "hydit.config" in metadata


def failed(host, graph):
    g, node = graph
    result = host.run(g)
    assert not result.ok and result.error.node_id == node, result.error
    assert "\n" not in result.error.exception_message
    return result.error


def failing_writer(error):
    def write(tensors, path, metadata=None):
        with open(path, "wb") as file:
            file.write(b"half")
        raise error

    return write


@pytest.mark.parametrize("kind", ["full", "limit", "memory"])
def test_a_failed_write_leaves_what_was_there(host, folder, monkeypatch, kind):
    before = saved(host, whole(f"{folder}/x")).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        if kind == "limit":  # a real failure in the middle of the real writing
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        elif kind == "full":
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            patch.setattr(comfy.utils, "save_torch_file", failing_writer(full))
        else:
            patch.setattr(comfy.utils, "save_torch_file", failing_writer(MemoryError("none")))
        try:
            error = failed(host, whole(f"{folder}/x"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if kind != "memory":
        assert error.exception_type.endswith("WeightsError")
        assert "cannot write" in error.exception_message and "x_00002_" in error.exception_message
    assert files(host, folder) == ["x_00001_.safetensors"]
    assert (host.output_dir / folder / "x_00001_.safetensors").read_bytes() == before
    assert saved(host, whole(f"{folder}/x")).name == "x_00002_.safetensors"


def test_an_interrupted_save_leaves_nothing(host, folder, monkeypatch):
    write = comfy.utils.save_torch_file

    def slow(*args, **kwargs):
        write(*args, **kwargs)
        host.interrupt()

    with monkeypatch.context() as patch:
        patch.setattr(comfy.utils, "save_torch_file", slow)
        g, _ = whole(f"{folder}/x")
        assert host.run(g).interrupted
    assert files(host, folder) == []
    assert saved(host, whole(f"{folder}/x")).name == "x_00001_.safetensors"


def test_a_file_that_cannot_be_replaced_keeps_the_new_one_beside_it(host, folder, monkeypatch):
    """As on Windows, where another program may have the file open."""

    def refuse(source, target):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(host.module("hydit_core.weights.writer").os, "replace", refuse)
        message = failed(host, whole(f"{folder}/x")).exception_message
    (kept,) = files(host, folder)
    assert "open in another program" in message and kept in message
    assert_same_tensors(load_file(host.output_dir / folder / kept), load_file(embedded_model()))


def sd_vae(channels):
    config = {
        "double_z": True, "z_channels": channels, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    vae = comfy.sd.VAE(sd={}, config={"params": {"ddconfig": config, "embed_dim": channels}})
    vae.latent_channels = channels
    return vae


def test_parts_of_other_models_are_refused(host, tiny_file, folder):
    g = Graph()
    ckpt = checkpoint(g)
    other = checkpoint(g, tiny_file("narrow.safetensors"))
    model, clip, vae, narrow = host.values(g, *(ckpt.out(i) for i in range(3)), other.out(1))
    foreign = SimpleNamespace(model=torch.nn.Linear(1, 1))
    no_clip = SimpleNamespace(tokenizer=object(), cond_stage_model=torch.nn.Module())
    no_vae = SimpleNamespace(first_stage_model=torch.nn.Linear(1, 1), latent_channels=4)
    cases = (
        ((foreign, clip, vae), "Linear.*HunyuanDiT"),
        ((model, no_clip, vae), "CLIP is of"),
        ((model, narrow, vae), "BERT is 32 wide, the MODEL expects 128"),
        ((model, clip, sd_vae(16)), "VAE has 16 latent channels, the MODEL 4"),
        ((model, clip, no_vae), "VAE is Linear"),
    )
    for parts, message in cases:
        g = Graph()
        node = saving(g, *(host.give(g, part) for part in parts), f"{folder}/x")
        error = failed(host, (g, node))
        assert re.search(message, error.exception_message), error.exception_message
        assert error.exception_type.split(".")[-1] in ("HyditError", "ConfigError")
    assert files(host, folder) == []
