"""The IP-Adapter nodes: files and lists, and what does not fit."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from control_models import control_weights
from graphs import Graph, Node, text_to_image
from image_prompt_models import (
    APPLY,
    EMBED,
    LOADER,
    add_apply,
    drawn,
    open_adapter,
    photo,
    save_adapter,
    save_encoder,
)
from key_lists import sparse_safetensors
from loader_files import LORA, SDXL, tensors
from model_runs import error
from PIL import Image
from safetensors.torch import save_file
from sampling_models import CONFIG, native_model, our_model, weights
from tiny import randomize
from torch import Tensor
from vision_files import vision_model

from hydit_core.embedded import embedded_ip_adapters, embedded_model
from hydit_core.model.ip_adapter import IPAdapter, IPAdapterConfig
from hydit_core.weights.bundle import bundle
from hydit_core.weights.load import load_ip_adapter

SD_IPA = {
    "image_proj.proj.weight": (3072, 1024),
    "ip_adapter.1.to_k_ip.weight": (320, 768),
    "ip_adapter.1.to_v_ip.weight": (320, 768),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("image-prompts")


@pytest.fixture(scope="module")
def model(host, folder):
    return our_model(host, folder)


@pytest.fixture(scope="module")
def paths(folder):
    return save_adapter(folder / "ipa.pt"), save_encoder(folder / "clip_img_encoder.pt")


@pytest.fixture(scope="module")
def adapter(host, paths):
    return open_adapter(host, *paths)


@pytest.fixture(scope="module")
def files(host):
    """models/ipadapter, which ComfyUI itself does not know, and models/clip_vision."""
    before = set(host.models_dir.rglob("*"))
    own, vision = host.models_dir / "ipadapter", host.models_dir / "clip_vision"
    save_adapter(own / "hydit" / "ipa.pt")
    save_encoder(own / "hydit" / "clip_img_encoder.pt")
    save_adapter(own / "alone.pt", seed=6)
    save_encoder(vision / "clip_img_encoder.pt", seed=1)
    tower = dict(vision_model(seed=2).state_dict())
    save_file(tower, vision / "tower.safetensors")
    inside = load_ip_adapter(own / "alone.pt").state_dict() | {
        f"image_encoder.{k}": v for k, v in tower.items()
    }
    save_file({k: v.contiguous() for k, v in inside.items()}, own / "both.safetensors")
    (own / "readme.txt").write_text("no weights")
    # What does not belong there
    save_file(tensors("bert"), own / "bert.safetensors")
    save_file(weights(), own / "dit.safetensors")
    save_file(control_weights(), own / "controlnet.safetensors")
    sparse_safetensors(own / "lora.safetensors", LORA)
    sparse_safetensors(own / "sdxl.safetensors", SDXL)
    sparse_safetensors(own / "ip-adapter_sd15.safetensors", SD_IPA)
    content = (own / "both.safetensors").read_bytes()
    (own / "cut.safetensors").write_bytes(content[: len(content) // 2])
    short = load_ip_adapter(own / "alone.pt").state_dict()
    del short["blocks.2.attn2.kv_proj_ip_adapter.weight"]
    torch.save(short, own / "short.pt")
    save_encoder(vision / "other.pt", embed_dim=20)
    save_file({k: v for k, v in tower.items() if "fc2" not in k}, vision / "short.safetensors")
    save_file(tensors("vae"), vision / "vae.safetensors")
    host.refresh()
    yield host.models_dir
    for path in sorted(set(host.models_dir.rglob("*")) - before, reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    host.refresh()


def loader(adapter: str, encoder: str = "automatic") -> Graph:
    g = Graph()
    g.add("HyDiTTestCapture", value=g.add(LOADER, ip_adapter_name=adapter, clip_vision_name=encoder))
    return g


def load(host: Any, adapter: str, encoder: str = "automatic") -> Any:
    return host.values(loader(adapter, encoder), ("1", 0))[0]


def failure(host: Any, graph: Graph, node_type: str = APPLY) -> str:
    """The one line that the node shows."""
    result = host.run(graph)
    assert not result.ok and result.error.node_type == node_type, result.error
    message = result.error.exception_message
    assert "\n" not in message and message
    return message


def failed_apply(host: Any, model: Any, adapter: Any, image: Tensor | None = None, **given: Any) -> str:
    g = Graph()
    node = add_apply(host, g, model, adapter, photo() if image is None else image, **given)
    g.add("HyDiTTestCapture", value=node)
    return failure(host, g)


# -- lists and files -----------------------------------------------------------------------------------------


def test_what_is_listed(host, files):
    inputs = host.input_types(LOADER)["required"]
    adapters, encoders = (inputs[n][1]["options"] for n in ("ip_adapter_name", "clip_vision_name"))
    own = [f"[embedded] {path.stem}" for path in embedded_ip_adapters()]
    assert own and adapters[: len(own)] == own
    assert {"hydit/ipa.pt", "alone.pt", "both.safetensors"} <= set(adapters)
    assert encoders[0] == "automatic" == inputs["clip_vision_name"][1]["default"]
    listed = [name.replace("\\", "/") for name in encoders]
    assert {"clip_img_encoder.pt", "tower.safetensors", "hydit/clip_img_encoder.pt"} <= set(listed)
    assert not any(name.endswith(".txt") for name in (*adapters, *encoders))


def test_a_folder_that_a_pack_or_a_setting_adds(host, files, tmp_path, monkeypatch):
    save_adapter(tmp_path / "mine.pt")
    known = {**host.folder_paths.folder_names_and_paths, "ipadapter": ([str(tmp_path)], {".pt"})}
    monkeypatch.setattr(host.folder_paths, "folder_names_and_paths", known)
    listed = host.input_types(LOADER)["required"]["ip_adapter_name"][1]["options"]
    assert {"mine.pt", "alone.pt"} <= set(listed)
    assert load(host, "mine.pt").adapter == tmp_path / "mine.pt"


def test_where_the_image_encoder_is(host, files):
    """In the adapter's file, beside it, in ComfyUI's folder; or where it is said to be."""
    own, vision = files / "ipadapter", files / "clip_vision"
    for name, encoder, expected in (
        ("both.safetensors", "automatic", own / "both.safetensors"),
        ("hydit/ipa.pt", "automatic", own / "hydit" / "clip_img_encoder.pt"),
        ("hydit\\ipa.pt", "automatic", own / "hydit" / "clip_img_encoder.pt"),
        ("alone.pt", "automatic", vision / "clip_img_encoder.pt"),
        ("both.safetensors", "tower.safetensors", vision / "tower.safetensors"),
        ("alone.pt", "both.safetensors", own / "both.safetensors"),
        ("alone.pt", "hydit/clip_img_encoder.pt", own / "hydit" / "clip_img_encoder.pt"),
    ):
        assert load(host, name, encoder).encoder == expected
    (vision / "clip_img_encoder.pt").rename(vision / "elsewhere.pt")
    try:
        message = failure(host, loader("alone.pt"), LOADER)
    finally:
        (vision / "elsewhere.pt").rename(vision / "clip_img_encoder.pt")
    assert "has no image encoder" in message and "choose it in clip_vision_name" in message


def test_a_checkpoint_with_an_adapter_inside(host, files):
    """It is found by its name, as pictures of `generate` have it; the list shows models/ipadapter alone."""
    inside = load_ip_adapter(files / "ipadapter" / "alone.pt").state_dict()
    target = host.model_path("checkpoints", "trained_with.safetensors")
    save_file({k: v.contiguous() for k, v in (weights() | inside).items()}, target)
    host.refresh()
    listed = host.input_types(LOADER)["required"]["ip_adapter_name"][1]["options"]
    own = load(host, "trained_with.safetensors", "tower.safetensors")
    target.unlink()
    assert own.adapter == target and "trained_with.safetensors" not in listed


def test_the_encoder_that_is_chosen_counts(host, files, model):
    """And every layout of one encoder gives the same."""
    first, second, third = (
        drawn(host, model, {"adapter": load(host, *names), "image": photo()})
        for names in (("both.safetensors",), ("alone.pt", "tower.safetensors"), ("alone.pt",))
    )
    assert torch.equal(first, second) and error(third, first) > 1e-3


def test_what_the_node_shows(host, files):
    (shown,) = host.run(loader("hydit/ipa.pt")).check().outputs["1"]["hydit_version"]
    assert shown.splitlines() == [
        "IP-Adapter for 4 blocks of width 64, 4 tokens for a picture, fp32",
        "image encoder of width 128, 2 layers, 28 px (clip_img_encoder.pt)",
    ]


def test_a_file_that_changed_is_read_again(host, files):
    g = loader("hydit/ipa.pt")
    host.run(g).check()
    assert "1" in host.run(g, keep_cache=True).check().cached
    for name in ("ipa.pt", "clip_img_encoder.pt"):
        os.utime(files / "ipadapter" / "hydit" / name, (1, len(name)))
        result = host.run(g, keep_cache=True).check()
        assert "1" in result.executed


WRONG = {
    "bert.safetensors": "is a BERT text encoder .*; expected a HunyuanDiT IP-Adapter; .*TextEncoderLoader",
    "dit.safetensors": r"64x4 v1\.2 checkpoint; expected a HunyuanDiT IP-Adapter; .*HyDiTDiTLoader",
    "controlnet.safetensors": "ControlNet; expected a HunyuanDiT IP-Adapter; .*HyDiTControlNetLoader",
    "lora.safetensors": "LoRA .*; expected a HunyuanDiT IP-Adapter; .*LoRA loader",
    "sdxl.safetensors": "is an SDXL checkpoint; expected a HunyuanDiT IP-Adapter; ComfyUI has loaders",
    "ip-adapter_sd15.safetensors": "is an IP-Adapter for Stable Diffusion; expected a HunyuanDiT IP-Adapter",
    "cut.safetensors": "is truncated: .* download or save it again",
    "short.pt": "1 missing: blocks.2.attn2.kv_proj_ip_adapter.weight",
    "hydit/clip_img_encoder.pt": "is a CLIP image encoder .*; expected a HunyuanDiT IP-Adapter; choose it as",
}
WRONG_ENCODERS = {
    "other.pt": r"other.pt does not go with .*alone.pt: the image encoder gives 20 values, .* takes 12: use",
    "short.safetensors": r"4 missing: vision_model.encoder.layers.0.mlp.fc2.\w+",
    "vae.safetensors": "is a VAE .*; expected a CLIP image encoder; load it with VAELoader",
    "alone.pt": "IP-Adapter; expected a CLIP image encoder; load it with HyDiTIPAdapterLoader",
}


def test_wrong_files(host, files):
    wrong = {}
    cases = [(name, "automatic", expected) for name, expected in WRONG.items()]
    cases += [("alone.pt", name, expected) for name, expected in WRONG_ENCODERS.items()]
    for name, encoder, expected in cases:
        message = failure(host, loader(name, encoder), LOADER)
        if not re.search(expected, message):
            wrong[name, encoder] = message
    assert not wrong


def test_a_name_that_is_gone_is_refused_before_anything_runs(host, files):
    for names in (
        ("gone.pt", "automatic"),
        ("../clip_vision/other.pt", "automatic"),
        ("alone.pt", "gone.pt"),
    ):
        result = host.run(loader(*names))
        assert not result.ok and not result.executed
        details = result.error.node_errors["1"]["errors"][0]["details"]
        assert "is not there" in details and "both.safetensors" in details and "\n" not in details


def test_the_embedded_model_draws_with_a_chain_in_the_graph(host, files, folder):
    """From file names to a picture, as people build it."""
    config = IPAdapterConfig.for_dit(bundle(embedded_model()).kind.config, EMBED, 4)
    torch.save(randomize(IPAdapter(config), 5, 0.3).state_dict(), files / "ipadapter" / "embedded.pt")
    host.refresh()
    Image.fromarray((photo(4, (50, 60))[0] * 255).byte().numpy()).save(host.input_dir / "shown.png")
    g = text_to_image("a red apple", save=False, steps=3)
    (plain,) = host.values(g, Node("6"))
    own = g.add(LOADER, _defaults=True, ip_adapter_name="embedded.pt")
    shown = g.add("LoadImage", image="shown.png")
    curve = g.add("HyDiTLayerWeights", weights="only-late(1)", layers=6)
    node = g.add(
        APPLY, _defaults=True, model=["1", 0], ip_adapter=own, image=shown.out(0), block_weights=curve
    )
    twice = g.add(APPLY, _defaults=True, model=node, ip_adapter=own, image=shown.out(0), weight=0.4)
    (found,) = host.values(g.set("5", model=twice.out(0)), Node("6"))
    assert found.shape == plain.shape and (found - plain).abs().mean() > 0.01


# -- models and inputs that do not fit -----------------------------------------------------------------------


def test_other_models(host, model, adapter):
    native = failed_apply(host, native_model(host), adapter)
    assert "ComfyUI's own HunyuanDiT" in native and "HyDiTCheckpointLoader" in native
    sdxl = type("Patcher", (), {"model": type("SDXL", (), {})()})()
    assert "the MODEL is SDXL, not HunyuanDiT: load one with" in failed_apply(host, sdxl, adapter)
    for other, said in (
        (replace(CONFIG, hidden_size=128, mlp_hidden=512), "hidden_size 64 instead of 128"),
        (replace(CONFIG, depth=8), "depth 4 instead of 8"),
    ):
        path = host.base / f"{other.depth}-{other.hidden_size}"
        path.mkdir()
        message = failed_apply(host, our_model(host, path, other), adapter)
        assert "the IP-Adapter ipa.pt does not fit this HunyuanDiT" in message and said in message


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"block_weights": "1, 2"}, "2 weights of an image prompt for a model with 4 blocks: give 4"),
        ({"block_weights": "1, nan, 1, 1"}, "not a finite number"),
        ({"block_weights": "steep"}, "'steep' is not a number; expected numbers such as"),
        ({"block_weights": ""}, "layer weights are empty"),
        ({"start_percent": 0.6, "end_percent": 0.5}, "from 0.6 to 0.5: use 0 <= start <= end <= 1"),
        ({"mask": torch.ones(3, 8, 8)}, "3 masks for 1 pictures: give one for all, or one for each"),
        ({"image": torch.zeros(1, 8, 8, 2)}, r"the image is \(1, 8, 8, 2\); expected"),
        ({"image": torch.zeros(0, 8, 8, 3)}, r"the image is \(0, 8, 8, 3\)"),
        ({"image": torch.zeros(8, 8, 3)}, r"the image is \(8, 8, 3\); expected"),
        ({"image": torch.full((1, 8, 8, 3), torch.nan)}, "values that are not finite"),
    ],
)
def test_wrong_inputs(host, model, adapter, given, expected):
    assert re.search(expected, failed_apply(host, model, adapter, **given))


def test_values_out_of_range_are_refused_before_anything_runs(host, model, adapter):
    for given in ({"weight": 10.5}, {"weight": -11.0}, {"end_percent": 1.5}, {"start_percent": -0.1}):
        g = Graph()
        g.add("HyDiTTestCapture", value=add_apply(host, g, model, adapter, photo(), **given))
        result = host.run(g)
        assert not result.ok and not result.executed and next(iter(given)) in str(result.error)


def test_a_picture_that_cannot_be_read(host, model, adapter):
    """LoadImage says so itself; nothing of ours runs."""
    (host.input_dir / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    g = Graph()
    image = g.add("LoadImage", image="broken.png")
    g.add("HyDiTTestCapture", value=add_apply(host, g, model, adapter, image.out(0)))
    result = host.run(g)
    assert not result.ok and "LoadImage" in str(result.error)


def test_after_a_mistake_the_next_picture_is_the_same(host, model, adapter):
    given = {"adapter": adapter, "image": photo()}
    before = drawn(host, model, given)
    failed_apply(host, model, adapter, block_weights="1, 2")
    assert torch.equal(drawn(host, model, given), before)
