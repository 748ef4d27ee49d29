"""A LoRA for few steps: "model's own" follows it, on our MODEL and on ComfyUI's own, and ddpm is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from graphs import Graph
from lora_files import forms
from lora_nodes import load, written
from model_runs import add_ksampler
from sampling_graphs import custom, error, ksampler, latent, run
from sampling_models import INFO
from torch import Tensor

NAME = "turbo.safetensors"
#: What the file says; HyDiTKSampler at "model's own" has to do the same.
SETTINGS = {"sampler": "lcm", "spacing": "trailing", "steps": 3, "cfg": 1.0}
OWN = {"sampler": "preset's", "spacing": "preset's", "steps": 0, "cfg": 0.0}


@pytest.fixture(scope="module", autouse=True)
def turbo(host):
    defaults = dataclasses.replace(INFO.defaults, **SETTINGS)
    info = dataclasses.replace(INFO, defaults=defaults, folded_cfg=4.5)
    plain = forms()["comfy"]
    form = dataclasses.replace(plain, metadata={"hydit.config": info.to_json()})
    with written(host, {NAME: form, "plain.safetensors": plain}) as folder:
        yield folder / NAME


@pytest.fixture(scope="module")
def model(either_model):
    return either_model


def drawn(host: Any, model: Any, **settings: Any) -> Tensor:
    return run(host, ksampler(host, model, latent(), **settings))


def test_turbo_is_the_models_own(host, model):
    turbo, said = load(host, model, NAME)
    assert "distilled: 3 steps of lcm, trailing spacing, cfg 1" in said
    plain, silent = load(host, model, "plain.safetensors")
    assert "distilled" not in silent
    expected = drawn(host, plain, **SETTINGS)
    assert torch.equal(drawn(host, turbo, **OWN), expected)
    assert error(drawn(host, plain, **OWN), expected) > 0.1
    # An explicit choice wins, and the MODEL that was given keeps its own settings.
    chosen = {**SETTINGS, "sampler": "euler", "steps": 4}
    assert torch.equal(drawn(host, turbo, **{**OWN, **chosen}), drawn(host, plain, **chosen))
    assert torch.equal(drawn(host, model, **OWN), drawn(host, model, **OWN, preset="model's own"))
    info = host.module("nodes.host.model").model_info
    assert info(model).folded_cfg == 0 and info(turbo).folded_cfg == 4.5


def test_turbo_refuses_ddpm(host, model):
    turbo, _ = load(host, model, NAME)
    made = [
        ksampler(host, turbo, latent(), **{**OWN, "sampler": "ddpm"}),
        custom(
            host, turbo, latent(), ("HyDiTSampler", {"sampler": "ddpm"}), ("HyDiTScheduler", {"steps": 3})
        ),
    ]
    for graph, node in made:
        graph.add("HyDiTTestCapture", value=node.out(0))
        result = host.run(graph)
        assert not result.ok and "distilled to few steps" in str(result.error)
    none, _ = load(host, model, NAME, strength_model=0.0)
    assert torch.isfinite(drawn(host, none, sampler="ddpm", steps=2)).all()


def test_turbo_with_the_stock_sampler(host, model):
    """ComfyUI's KSampler knows lcm by the same name; its sgm_uniform is our trailing to one timestep."""
    turbo, _ = load(host, model, NAME)
    g = Graph()
    node = add_ksampler(
        host, g, host.give(g, turbo), steps=4, cfg=1.0, sampler_name="lcm", scheduler="sgm_uniform"
    )
    assert torch.isfinite(host.values(g, node)[0]["samples"]).all()
    # One step has no noise of its own: both samplers are the network's answer.
    sigmas = ("HyDiTScheduler", {"spacing": "trailing", "steps": 1})
    ours, stock = (
        run(host, custom(host, turbo, latent(), sampler, sigmas, cfg=1.0))
        for sampler in (("HyDiTSampler", {"sampler": "lcm"}), ("KSamplerSelect", {"sampler_name": "lcm"}))
    )
    assert error(ours, stock) < 1e-2


def test_turbo_of_another_kind_is_told(host, model):
    turbo, _ = load(host, model, NAME)
    _, said = load(host, turbo, NAME)
    assert "warning: the model was distilled before" in said


@pytest.mark.parametrize(("strength", "folded"), [(0.8, 4.5), (-0.8, 0.0)])
@pytest.mark.parametrize("names", [(NAME, "plain.safetensors"), ("plain.safetensors", NAME)])
def test_turbo_among_others(host, model, names, strength, folded):
    """A LORA_MODEL of several recommends what the distilled one in it does, unless that is taken off."""
    g, more = Graph(), {}
    given = host.give(g, model)
    for name in names:
        own = strength if name == NAME else 1.0
        node = g.add("HyDiTLoraMerge", _defaults=True, model=given, lora_name=name, strength=own, **more)
        more = {"lora": node.out(0)}
    (lora,), (merged,) = host.values(g, node.out(0)), host.values(g, node.out(1))
    info = host.module("nodes.host.model").model_info(merged)
    assert (info.folded_cfg, info.defaults.steps == SETTINGS["steps"]) == (folded, folded > 0)
    assert ("hydit.config" in lora.metadata) == (folded > 0)
