"""Crossings with ComfyUI-Advanced-ControlNet, where it can be had."""

from __future__ import annotations

import sys
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
    native_control,
    open_control,
    save_control,
    steered,
)
from graphs import Graph
from model_runs import error, ksampler, network_calls
from packs import load_pack
from sampling_models import our_model
from torch import Tensor

ADVANCED = "ACN_AdvancedControlNetApply_v2"
NAME = "ComfyUI-Advanced-ControlNet"


@pytest.fixture(scope="module", autouse=True)
def pack(host):
    return load_pack(host, NAME, ADVANCED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("control")


@pytest.fixture(scope="module")
def model(host, folder):
    return our_model(host, folder, STEERED)


@pytest.fixture(scope="module")
def control(host, folder):
    return open_control(host, save_control(folder / "control.safetensors"))


def advanced(host: Any, g: Graph, control: Any, after: Any = None, **given: Any) -> Any:
    """Its apply node, whose VAE has another name."""
    applied = add_apply(host, g, control, STOCK, after, **given)
    node = g.prompt[applied.id]
    node["class_type"] = ADVANCED
    node["inputs"]["vae_optional"] = node["inputs"].pop("vae")
    return applied


def latents(host: Any, g: Graph, model: Any, applied: Any, **settings: Any) -> Tensor:
    return host.values(g, add_steered(host, g, model, applied, **settings))[0]["samples"]


def test_its_apply_node_takes_our_controlnet_as_its_own(host, model, control):
    """As one that it can schedule, not as something unknown that it leaves alone; same bits."""
    for given in ({}, {"strength": 0.4, "start_percent": 0.2, "end_percent": 0.7}):
        g = Graph()
        applied = advanced(host, g, control, **given)
        (conditioning,) = host.values(g, Out(applied, 0))
        assert type(conditioning[0][1]["control"]).__name__ == "ControlNetAdvanced"
        found = latents(host, g, model, applied)
        assert torch.equal(found, steered(host, model, control, STOCK, **given))
        assert error(found, ksampler(host, model)) > 0.01


def test_its_soft_weights_are_our_decay(host, model, control):
    g = Graph()
    weights = g.add("ACN_ScaledSoftControlNetWeights", base_multiplier=0.7)
    applied = advanced(host, g, control, weights_override=weights)
    found = latents(host, g, model, applied)
    assert error(found, steered(host, model, control, layer_weights="decay(0.7)")) < 1e-5
    assert error(found, steered(host, model, control)) > 0.01


def test_its_keyframes_schedule_our_controlnet(host, model, control):
    g = Graph()
    on = g.add("TimestepKeyframe", _defaults=True, start_percent=0.0, strength=1.0)
    off = g.add("TimestepKeyframe", _defaults=True, start_percent=0.5, strength=0.0, prev_timestep_kf=on)
    found = latents(host, g, model, advanced(host, g, control, timestep_kf=off), steps=4)
    expected = steered(host, model, control, end_percent=0.5, sampling={"steps": 4})
    assert torch.equal(found, expected)


@pytest.mark.parametrize("ours_first", [True, False])
def test_chains(host, model, control, ours_first):
    g = Graph()
    if ours_first:
        applied = advanced(host, g, control, add_apply(host, g, control, layer_weights="1, 0, 2"))
    else:
        applied = add_apply(host, g, control, after=advanced(host, g, control), layer_weights="1, 0, 2")
    with network_calls(host) as calls:
        latents(host, g, model, applied)
    alone = Graph()
    with network_calls(host) as single:
        latents(host, alone, model, add_apply(host, alone, control))
    both, one = (call[0]["control"]["output"] for call in (calls, single))
    for found, layer, weight in zip(both, one, (2, 1, 3), strict=True):
        assert torch.allclose(found, layer * weight, rtol=1e-6)


def test_our_apply_node_weights_its_controlnets(host, model):
    """A CONTROL_NET of its loader is ComfyUI's network in a class of its own."""
    native = native_control(host)
    name = next(name for name in sys.modules if name.endswith("adv_control.control"))
    given = sys.modules[name].convert_to_advanced(native.copy())
    assert type(given).__name__ == "ControlNetAdvanced"
    options = {"layer_weights": "0.5, 0, 2", "end_percent": 0.6}
    found = steered(host, model, given, APPLY, **options)
    assert torch.equal(found, steered(host, model, native, **options))


def test_it_takes_what_our_apply_node_attached(host, model, control):
    """As AnimateDiff has it done with all controls of a prompt: weights and mask stay."""
    name = next(name for name in sys.modules if name.endswith("adv_control.control"))
    given = {"layer_weights": "0.5, 0, 2", "mask": torch.arange(96).lt(40).float().expand(1, 64, 96)}
    g = Graph()
    applied = add_apply(host, g, control, **given)
    for conditioning in host.values(g, Out(applied, 0)):
        attached = conditioning[0][1]["control"]
        converted = sys.modules[name].convert_to_advanced(attached)
        assert type(converted).__name__ == "ControlNetAdvanced"
    both = [[conditioning[0][0], {**conditioning[0][1], "control": converted}]]
    found = ksampler(host, model, positive=both)
    plain = [[conditioning[0][0], {**conditioning[0][1], "control": attached}]]
    assert torch.equal(found, ksampler(host, model, positive=plain))
