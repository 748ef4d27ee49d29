"""What the ControlNet nodes say of wrong files, models, weights and pictures: one line, on the node."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from control_models import (
    APPLY,
    STEERED,
    STOCK,
    Out,
    add_apply,
    add_steered,
    control_weights,
    native_control,
    open_control,
    save_control,
    steered,
)
from graphs import Graph
from key_lists import sparse_safetensors
from loader_files import EMBEDDED, LORA, SDXL, tensors
from safetensors.torch import save_file
from sampling_models import CONFIG, native_model, our_model, weights

LOADER = "HyDiTControlNetLoader"
SD15 = {"input_hint_block.0.weight": (16, 3, 3, 3), "zero_convs.0.0.weight": (320, 320, 1, 1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("control")


@pytest.fixture(scope="module")
def model(host, folder):
    return our_model(host, folder, STEERED)


@pytest.fixture(scope="module")
def control(host, folder):
    return open_control(host, save_control(folder / "control.safetensors"))


@pytest.fixture(scope="module")
def other(host, folder):
    """ControlNets that do not fit the model, by what is wrong."""
    configs = {
        "depth": CONFIG,
        "width": replace(STEERED, hidden_size=128, mlp_hidden=512),
        "text": replace(STEERED, text_dim=48),
    }
    return {
        name: open_control(host, save_control(folder / f"{name}.safetensors", config))
        for name, config in configs.items()
    }


def failure(host: Any, graph: Graph, node_type: str) -> str:
    """The one line that the node shows."""
    result = host.run(graph)
    assert not result.ok and result.error.node_type == node_type, result.error
    message = result.error.exception_message
    assert "\n" not in message and message
    return message


def failed_apply(host: Any, control: Any, **given: Any) -> str:
    g = Graph()
    applied = add_apply(host, g, control, **given)
    g.add("HyDiTTestCapture", value=applied.out(0))
    return failure(host, g, APPLY)


def failed_sampling(host: Any, model: Any, control: Any, node: str = APPLY) -> str:
    g = Graph()
    sampled = add_steered(host, g, model, add_apply(host, g, control, node))
    g.add("HyDiTTestCapture", value=sampled)
    return failure(host, g, "KSampler")


# -- files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(host):
    """What people put into models/controlnet, and how the loader answers."""
    folder = host.models_dir / "controlnet"
    before = set(host.models_dir.rglob("*"))
    save_control(folder / "cut.safetensors")
    content = (folder / "cut.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(content[: len(content) // 2])
    short = control_weights()
    del short["blocks.1.attn1.Wqkv.weight"], short["after_proj_list.1.bias"]
    save_file(short, folder / "short.safetensors")
    save_file(weights(), folder / "dit.safetensors")
    save_file(tensors("vae"), folder / "vae.safetensors")
    (folder / "model.safetensors").write_bytes(EMBEDDED.read_bytes())
    sparse_safetensors(folder / "lora.safetensors", LORA)
    sparse_safetensors(folder / "sdxl.safetensors", SDXL)
    sparse_safetensors(
        folder / "sd15.safetensors",
        {"input_hint_block.0.weight": (16, 3, 3, 3), "zero_convs.0.0.weight": (320, 320, 1, 1)},
    )
    (host.models_dir / "diffusers" / "empty").mkdir(parents=True)
    host.refresh()
    yield folder
    for path in sorted(set(host.models_dir.rglob("*")) - before, reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    host.refresh()


WRONG = {
    "dit.safetensors": r"64x4 v1\.2 checkpoint; expected a HunyuanDiT ControlNet; .*HyDiTDiTLoader",
    "model.safetensors": r"all-in-one checkpoint; expected a HunyuanDiT ControlNet; .*HyDiTDiTLoader",
    "vae.safetensors": "is a VAE .*; expected a HunyuanDiT ControlNet; load it with VAELoader",
    "lora.safetensors": "LoRA .*; expected a HunyuanDiT ControlNet; .*LoRA loader",
    "sdxl.safetensors": "is an SDXL checkpoint; expected a HunyuanDiT ControlNet; ComfyUI has loaders",
    "sd15.safetensors": "expected a HunyuanDiT ControlNet",
    "cut.safetensors": "is truncated: .* download or save it again",
    "short.safetensors": "2 missing: .*blocks.1.attn1.Wqkv.weight|looks like a HunyuanDiT, but",
    "empty/": "holds no weights",
}


def test_wrong_files(host, files):
    wrong = {}
    for name, expected in WRONG.items():
        g = Graph()
        g.add("HyDiTTestCapture", value=g.add(LOADER, control_net_name=name, weight_dtype="default"))
        message = failure(host, g, LOADER)
        if not re.search(expected, message) or name.rstrip("/") not in message:
            wrong[name] = message
    assert not wrong


def test_a_name_that_is_gone_is_refused_before_anything_runs(host, files):
    for name in ("gone.safetensors", "gone/", "[embedded] another", "../diffusers/", ""):
        g = Graph()
        g.add("HyDiTTestCapture", value=g.add(LOADER, control_net_name=name, weight_dtype="default"))
        result = host.run(g)
        assert not result.ok and not result.executed
        details = result.error.node_errors["1"]["errors"][0]["details"]
        assert name in details and "\n" not in details
        assert "dit.safetensors" in details or name.startswith("[")


# -- models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("depth", "1 layers of width 64, this MODEL takes 3 of width 64"),
        ("width", "3 layers of width 128, this MODEL takes 3 of width 64"),
        ("text", r"other text features: bert features \(.*32\); expected \(batch, 12, 48\)"),
    ],
)
def test_a_controlnet_of_another_size(host, model, other, what, expected):
    message = failed_sampling(host, model, other[what])
    assert re.search(expected, message) and "use" in message


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("depth", "gives 1 residuals, this model of depth 8 takes 3 of width 64"),
        ("width", "gives residuals of width 128, this model of depth 8 takes 3 of width 64"),
    ],
)
def test_a_controlnet_of_another_size_through_the_stock_node(host, model, other, what, expected):
    assert expected in failed_sampling(host, model, other[what], STOCK)


def test_a_controlnet_of_another_size_with_the_native_model(host, other):
    base = native_model(host, STEERED)
    for what, message in (("depth", "has 1 layers"), ("width", "of width 128")):
        assert message in failed_sampling(host, base, other[what])


def test_after_a_mistake_the_next_picture_is_the_same(host, model, control, other):
    before = steered(host, model, control)
    failed_sampling(host, model, other["depth"])
    failed_sampling(host, model, other["text"], STOCK)
    assert torch.equal(steered(host, model, control), before)


def test_another_models_control_net(host):
    controlnet = host.comfy_module("comfy.controlnet")
    sd = controlnet.ControlNet(torch.nn.Linear(1, 1))
    for net, name in ((sd, "Linear"), (controlnet.T2IAdapter(None, 4, 8, "nearest"), "T2IAdapter")):
        message = failed_apply(host, net)
        assert f"the CONTROL_NET is {name}, not a ControlNet of HunyuanDiT; load one with {LOADER}" in message


def test_another_models_model(host, control):
    """Before anything is computed: as ComfyUI calls it when sampling begins."""
    g = Graph()
    (conditioning,) = host.values(g, Out(add_apply(host, g, control), 0))
    weighted = conditioning[0][1]["control"]
    error = host.module("hydit_core.errors").HyditError
    with pytest.raises(error, match="the ControlNet is HunyuanDiT's, the MODEL is SimpleNamespace: load"):
        weighted.pre_run(SimpleNamespace(model_sampling=None), lambda percent: percent)


def test_another_models_prompts(host, control):
    network = control.control_model
    error = host.module("hydit_core.errors").HyditError
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(error, match=r"no features of HunyuanDiT's text encoders.*HyDiTTextEncode"):
        network(x=x, hint=x, timesteps=torch.zeros(1), context=torch.zeros(1, 77, 768), y=None)


# -- widgets and links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1, 2", "2 layer weights for a ControlNet with 3 layers: give 3 numbers"),
        ("1 2 3 4", "4 layer weights for a ControlNet with 3 layers"),
        ("nan", "'nan' is not a finite number"),
        ("1, inf, 1", "'inf' is not a finite number"),
        ("decay(nan)", "not a finite number"),
        ("decay(1e300)", "layer weights decay(1e+300): too large for 3 layers"),
        ("", "layer weights are empty"),
        ("steep", "'steep' is not a number; expected numbers such as"),
        ("__import__('os')", "is not a number"),
    ],
)
def test_wrong_weights(host, control, text, expected):
    assert expected in failed_apply(host, control, layer_weights=text)
    assert expected in failed_apply(host, native_control(host), layer_weights=text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1, nan, 1", "not a finite number"), ("", "layer weights are empty"), ("steep", "is not a number")],
)
def test_wrong_weights_in_their_own_node(host, text, expected):
    g = Graph()
    g.add("HyDiTTestCapture", value=g.add("HyDiTLayerWeights", weights=text, layers=3))
    assert expected in failure(host, g, "HyDiTLayerWeights")


def test_without_a_vae(host, control):
    """ComfyUI's checkpoint loader gives None for a file without one; unconnected, ComfyUI itself says it."""
    assert "vae is empty: connect the model's VAE" in failed_apply(host, control, vae=None)
    g = Graph()
    applied = add_apply(host, g, control)
    del g.prompt[applied.id]["inputs"]["vae"]
    g.add("HyDiTTestCapture", value=applied)
    result = host.run(g)
    assert not result.ok and "vae" in str(result.error) and not result.executed


def test_start_after_end(host, control):
    message = failed_apply(host, control, start_percent=0.6, end_percent=0.5)
    assert "start_percent 0.6 is after end_percent 0.5" in message


def test_values_out_of_range_are_refused_before_anything_runs(host, control):
    for given in ({"strength": -0.5}, {"strength": 11.0}, {"end_percent": 1.5}):
        g = Graph()
        g.add("HyDiTTestCapture", value=add_apply(host, g, control, **given))
        result = host.run(g)
        assert not result.ok and not result.executed and next(iter(given)) in str(result.error)
