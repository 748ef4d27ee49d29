"""Runs with image prompts: memory, what else is on the MODEL, and the pictures of the command line."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from graphs import Graph, Node, text_to_image
from image_prompt_models import (
    EMBED,
    add_apply,
    applied,
    drawn,
    open_adapter,
    photo,
    save_adapter,
    save_encoder,
)
from lora_files import KV, draw
from model_runs import error, ksampler
from PIL import Image
from safetensors.torch import save_file
from sampling_models import CONFIG, our_model
from tiny import randomize
from torch import Tensor

import hydit_core
from hydit_core.generate.__main__ import main
from hydit_core.image_prompts.encoder import load_image_encoder
from hydit_core.image_prompts.run import ImagePrompt
from hydit_core.layer_weights import LayerWeights
from hydit_core.model.ip_adapter import IPAdapter, IPAdapterConfig
from hydit_core.weights.bundle import bundle

ROUGH = torch.rand(1, 64, 96, generator=torch.Generator().manual_seed(8)).round()


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


# -- memory --------------------------------------------------------------------------------------------------


def loaded(host: Any) -> list[Any]:
    models = host.comfy_module("comfy.model_management").current_loaded_models
    return [one.model.model for one in models if one.model is not None]


def test_networks_are_read_when_they_are_needed_and_then_comfyuis(host, paths, model):
    own = open_adapter(host, *paths)
    plain = applied(host, model, own, photo(), weight=0.0)
    assert not {"_adapter", "_encoder"} & set(vars(own))
    seeing = applied(host, plain, own, photo())
    assert own._adapter.model in loaded(host) and own._encoder.model in loaded(host)
    expected = ksampler(host, seeing)
    host.comfy_module("comfy.model_management").unload_all_models()
    assert not loaded(host)
    assert torch.equal(ksampler(host, seeing), expected)
    # Encoded once: sampling needs neither network
    assert own._adapter.model not in loaded(host) and own._encoder.model not in loaded(host)
    assert torch.equal(ksampler(host, applied(host, model, own, photo())), expected)
    assert own._adapter.model in loaded(host)


def test_streamed_weights(host, paths, model, adapter):
    """Low memory: layers are cast at use."""
    expected = ksampler(host, applied(host, model, adapter, photo()))
    own = open_adapter(host, *paths)
    for patcher in (own._adapter, own._encoder):
        patcher.model.to(torch.float16)
        patcher.patch_model(device_to=torch.device("cpu"), lowvram_model_memory=1)
    found = ksampler(host, applied(host, model, own, photo()))
    assert 0 < error(found, expected) < 0.1
    assert all(p.dtype == torch.float16 for p in own._adapter.model.parameters())


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp8_e4m3fn"])
def test_models_in_other_dtypes(host, folder, model, adapter, dtype):
    (path,) = folder.glob("tiny-*.safetensors")
    short = host.module("nodes.host.model").load_model(path, weight_dtype=dtype)
    given = {"adapter": adapter, "image": photo(), "weight": 0.5}
    plain, expected = ksampler(host, model), drawn(host, model, given)
    found = drawn(host, short, given)
    assert torch.isfinite(found).all()
    assert (found - expected).std() < 0.5 * (expected - plain).std()


# -- what else is on the MODEL -------------------------------------------------------------------------------


def through(host: Any, model: Any, node: str, **inputs: Any) -> Any:
    g = Graph()
    links = {k: host.give(g, v) if not isinstance(v, int | float | str) else v for k, v in inputs.items()}
    first = "model1" if node.startswith("ModelMerge") else "model"
    return host.values(g, g.add(node, _defaults=True, **{first: host.give(g, model)}, **links))[0]


def test_loras_before_and_after(host, folder, model, adapter):
    made = draw(3)
    save_file(
        {
            f"base_model.model.{KV}.lora_A.weight": made(4, 32),
            f"base_model.model.{KV}.lora_B.weight": made(128, 4),
        },
        host.model_path("loras", "seen.safetensors"),
    )
    host.refresh()
    name = {"lora_name": "seen.safetensors"}
    before = applied(host, through(host, model, "HyDiTLoraLoader", **name), adapter, photo())
    after = through(host, applied(host, model, adapter, photo()), "HyDiTLoraLoader", **name)
    found = ksampler(host, before)
    assert torch.equal(found, ksampler(host, after))
    assert error(found, ksampler(host, applied(host, model, adapter, photo()))) > 1e-3


def test_merged_models_keep_the_first_ones_pictures(host, model, adapter):
    seeing = applied(host, model, adapter, photo())
    merged = through(host, seeing, "ModelMergeSimple", model2=model, ratio=0.5)
    assert error(ksampler(host, merged), ksampler(host, seeing)) < 1e-4
    other = through(host, model, "ModelMergeSimple", model2=seeing, ratio=0.5)
    assert error(ksampler(host, other), ksampler(host, model)) < 1e-4


def test_a_model_is_saved_without_its_pictures(host, model, adapter, tmp_path):
    saved = []
    for one in (model, applied(host, model, adapter, photo())):
        g = Graph()
        node = g.add("HyDiTModelSave", model=host.give(g, one), filename_prefix="diffusion_models/seen")
        (name,) = host.run(g).check().outputs[node.id]["hydit_saved"]
        saved.append(dict(bundle(host.output_dir / name).dit))
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(value, saved[1][key]) for key, value in saved[0].items())


def test_forecasts_and_caches(host, model, adapter):
    seeing = applied(host, model, adapter, photo())
    expected = ksampler(host, seeing, steps=12)
    off = through(host, seeing, "HyDiTForecast", preset="off", tolerance=0.0)
    assert torch.equal(ksampler(host, off, steps=12), expected)
    safe = through(host, seeing, "HyDiTForecast", preset="safe", tolerance=0.0)
    assert error(ksampler(host, safe, steps=12), expected) < 1
    easy = through(host, seeing, "EasyCache", reuse_threshold=0.0, start_percent=0.0, end_percent=1.0)
    assert error(ksampler(host, easy, steps=12), expected) < 1e-4


def test_patches_of_the_attention_to_the_text_leave_the_pictures(host, model, adapter):
    """A replacement that computes the same changes nothing, and one that gives zeros leaves the picture."""
    seeing = applied(host, model, adapter, photo())
    optimized = host.comfy_module("comfy.ldm.modules.attention").optimized_attention

    def same(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        return optimized(q, k, v, extra["n_heads"])

    def none(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        return torch.zeros_like(q)

    def replaced(one: Any, function: Any) -> Any:
        one = one.clone()
        for block in range(CONFIG.depth):
            one.set_model_attn2_replace(function, "double_block", block)
        return one

    expected = ksampler(host, seeing)
    assert error(ksampler(host, replaced(seeing, same)), expected) < 1e-5
    alone = ksampler(host, replaced(seeing, none))
    assert error(alone, expected) > 1e-3
    assert error(alone, ksampler(host, replaced(model, none))) > 1e-3


def compiled(host: Any, model: Any, graphs: list[Any]) -> Any:
    def replay(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    return host.nodes.NODE_CLASS_MAPPINGS["TorchCompileModel"].execute(model, replay)[0]


@pytest.mark.parametrize(("given", "most"), [({}, 1), ({"end_percent": 0.6}, 9)])
def test_torch_compile_traces(host, model, adapter, given, most):
    """One graph for all steps; pieces of two where a picture acts only in some, which has to be asked for."""
    seeing = applied(host, model, adapter, photo(), mask=ROUGH, **given)
    expected, graphs = ksampler(host, seeing), []
    assert error(ksampler(host, compiled(host, seeing, graphs)), expected) < 1e-5
    assert 1 <= len(graphs) <= most


# -- the headless pipeline on the embedded model -------------------------------------------------------------


CASES = {
    "as it is": {},
    "off-square, with all": {
        "weight": 0.8,
        "blocks": LayerWeights.parse("1, 0.5, 0, 1, 2, -0.5"),
        "start": 0.1,
        "end": 0.8,
        "masked": True,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_one_seed_gives_the_picture_of_the_pipeline(host, folder, case):
    pipeline = hydit_core.load(device="cpu", dtype="float32")
    config = IPAdapterConfig.for_dit(pipeline.dit.config, EMBED, 4)
    net = randomize(IPAdapter(config), 5, 0.3).requires_grad_(False)
    torch.save(net.state_dict(), folder / "embedded.pt")
    path = save_encoder(folder / "clip_img_encoder.pt")
    image = photo(3, (40, 30))
    given = dict(CASES[case])
    size = (160, 128) if given else (128, 128)
    mask = None
    if given.pop("masked", False):
        mask = Image.fromarray((np.indices((size[1], size[0])).sum(0) % 97 * 2).astype(np.uint8))
    shown = Image.fromarray((image[0] * 255).round().byte().numpy())
    prompted = ImagePrompt(net, load_image_encoder(path), shown, mask=mask, **given)
    drawing = {"seed": 7, "steps": 10, "cfg": 3.0, "width": size[0], "height": size[1]}
    expected = np.asarray(pipeline("a red apple", images=[prompted], **drawing)[0]).astype(int)
    plain = np.asarray(pipeline("a red apple", **drawing)[0]).astype(int)

    g = text_to_image("a red apple", save=False, **drawing)
    named = {"weight": "weight", "blocks": "block_weights", "start": "start_percent", "end": "end_percent"}
    widgets = {named[k]: str(v) if k == "blocks" else v for k, v in given.items()}
    if mask is not None:
        widgets["mask"] = torch.from_numpy(np.asarray(mask) / 255)[None].float()
    own = open_adapter(host, folder / "embedded.pt", path)
    node = add_apply(host, g, ["1", 0], own, image, **widgets)
    found = host.values(g.set("5", model=node.out(0)), Node("6"))[0]
    found = (found[0] * 255).round().numpy().astype(int)
    print(f"{case}: {np.abs(found - expected).max()}/255")
    assert np.abs(found - expected).max() <= 2
    assert np.abs(expected - plain).mean() > 3


def test_a_picture_by_the_embedded_adapter_redraws_itself(host, tmp_path):
    """Nothing was named on the command line, so nothing has to be found."""
    heart = tmp_path / "heart.png"
    shown = Image.new("RGB", (128, 128), "white")
    shown.paste((40, 90, 220), (30, 30, 98, 98))
    shown.save(heart)
    shown.save(host.input_dir / "heart.png")
    given = ["--prompt", "star", "--image-prompt", str(heart), "--steps", "8", "--device", "cpu"]
    assert main([*given, "--out", str(tmp_path / "star.png")]) == 0
    with Image.open(tmp_path / "star.png") as star:
        outputs = host.run(json.loads(star.text["prompt"])).check().outputs
        (image,) = [image for output in outputs.values() for image in output.get("images", [])]
        again = Image.open(host.base / image["type"] / image["subfolder"] / image["filename"])
        found, expected = (np.asarray(one.convert("RGB"), int) for one in (again, star))
    assert np.abs(found - expected).max() <= 2
    inked = expected[expected.min(axis=-1) < 200]
    assert (inked[:, 2] > inked[:, 0]).mean() > 0.8  # blue, as the picture is
