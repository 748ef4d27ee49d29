"""HyDiTForecast in ComfyUI: which calls are real, with every kind of MODEL and sampler, and what it says."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from graphs import Graph, Node
from PIL import Image
from sampling_graphs import SEED, error, latent, message, prompts, run
from sampling_models import native_model, our_model
from torch import Tensor

from hydit_core.generate.__main__ import main

STEPS = 50
LOOSE: dict[str, Any] = {"tolerance": 1.0}
"""Random weights draw nothing that could be foretold: with less, every call would be real."""


@pytest.fixture(scope="module")
def models(host, tmp_path_factory):
    """Both kinds of MODEL on the same random weights."""
    return {"ours": our_model(host, tmp_path_factory.mktemp("dit")), "native": native_model(host)}


def counted(model: Any) -> tuple[Any, list[int]]:
    """A clone of a MODEL that notes the rows of each call of its network."""
    rows: list[int] = []
    model = model.clone()

    def call(apply_model: Any, args: dict[str, Any]) -> Tensor:
        rows.append(len(args["input"]))
        return apply_model(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(call)
    return model, rows


def graph(
    host: Any, model: Any, *presets: str, kind: str = "HyDiTKSampler", **given: Any
) -> tuple[Graph, Node]:
    """A sampling node behind a HyDiTForecast for each of ``presets``."""
    g = Graph()
    inputs = prompts(host, g, model, latent())
    tolerance, cache = given.pop("tolerance", 0.0), given.pop("easycache", False)
    for preset in presets:
        inputs["model"] = g.add("HyDiTForecast", model=inputs["model"], preset=preset, tolerance=tolerance)
    if cache:
        inputs["model"] = g.add("EasyCache", _defaults=True, model=inputs["model"])
    own = {"sampler": "dpmpp_2m"}
    if kind == "KSampler":
        own = {"sampler_name": "euler", "scheduler": "simple"}
    return g, g.add(
        kind, _defaults=True, **inputs, **{"seed": SEED, "steps": STEPS, "cfg": 6.0, **own, **given}
    )


def told(host: Any, made: tuple[Graph, Node]) -> str:
    """What the node was told after a run."""
    run(host, made)
    texts = [data["output"] for event, data in host.events if event == "executed" and data.get("output")]
    (said,) = (output["hydit_forecast"][0] for output in texts if "hydit_forecast" in output)
    return str(said)


def test_the_node_says_how_many_calls_were_real(host, models):
    model, rows = counted(models["ours"])
    assert told(host, graph(host, model, "fast")) == f"{len(rows)} of {STEPS} calls of the model were real"
    rows.clear()
    both = told(host, graph(host, model, "safe", easycache=True)).split("\n")
    assert re.fullmatch(r"(\d+) of 50 calls of the model were real", both[0])
    assert both[1] == "EasyCache is on this model too and left out some of those: use one of the two"


@pytest.mark.parametrize("kind", ["HyDiTKSampler", "KSampler"])
@pytest.mark.parametrize("which", ["ours", "native"])
def test_fewer_calls_and_nearly_the_same_latents(host, models, which, kind):
    model, rows = counted(models[which])
    full = run(host, graph(host, model, kind=kind))
    assert len(rows) == STEPS
    rows.clear()
    near = run(host, graph(host, model, "custom", kind=kind, **LOOSE))
    taken = len(rows)
    assert 16 <= taken < STEPS - 5
    assert 0 < error(near, full) < 3
    rows.clear()
    again = run(host, graph(host, model, "custom", kind=kind, **LOOSE))
    assert torch.equal(near, again) and len(rows) == taken


def test_off_is_equal_to_the_bit(host, models):
    model, rows = counted(models["ours"])
    full = run(host, graph(host, model))
    for preset, tolerance in (("off", 0.5), ("custom", 0.0)):
        rows.clear()
        assert torch.equal(run(host, graph(host, model, preset, tolerance=tolerance)), full)
        assert len(rows) == STEPS


def test_the_samplers_of_the_host_with_more_than_one_call_a_step(host, models):
    model, rows = counted(models["ours"])
    for name in ("heun", "dpmpp_sde", "dpm_2_ancestral", "uni_pc"):
        rows.clear()
        given = {"kind": "KSampler", "sampler_name": name, "steps": 30, **LOOSE}
        full = run(host, graph(host, model, **given))
        whole = len(rows)
        rows.clear()
        near = run(host, graph(host, model, "custom", **given))
        assert len(rows) < whole, name
        assert torch.isfinite(near).all() and error(near, full) > 0, name


def test_a_run_that_was_interrupted_leaves_nothing_behind(host, models):
    model, rows = counted(models["ours"])
    whole = run(host, graph(host, model, "fast"))
    stop = model.clone()

    def fail(apply_model: Any, args: dict[str, Any]) -> Tensor:
        if len(rows) > 12:
            raise RuntimeError("stopped here")
        rows.append(1)
        return apply_model(args["input"], args["timestep"], **args["c"])

    stop.set_model_unet_function_wrapper(fail)
    rows.clear()
    assert "stopped here" in message(host, graph(host, stop, "fast"))
    assert torch.equal(run(host, graph(host, model, "fast")), whole)


def test_the_last_of_two_counts(host, models):
    model, rows = counted(models["ours"])
    run(host, graph(host, model, "fast", "off"))
    assert len(rows) == STEPS


def test_guidance_for_a_part_of_the_run(host, models):
    """Rows of each call: both prompts, then one; forecasts go with it."""
    model, rows = counted(models["ours"])
    part = run(host, graph(host, model, steps=10, cfg_end=0.5))
    assert rows == [2] * 5 + [1] * 5
    assert error(part, run(host, graph(host, model, steps=10))) > 1e-3
    rows.clear()
    run(host, graph(host, model, "custom", cfg_end=0.5, **LOOSE))
    assert set(rows) == {1, 2} and len(rows) < STEPS
    assert "cfg end" in message(host, graph(host, model, steps=10, cfg_end=float("nan")))


def test_the_picture_is_the_command_lines(host, tmp_path):
    """With the embedded model, its LoRA, and guidance that ends early."""
    from hydit_core.embedded import embedded_loras

    lora = embedded_loras()[0]
    out = tmp_path / "a.png"
    options = ["--prompt", "a red apple", "--seed", "1", "--steps", "40", "--device", "cpu"]
    options += ["--forecast", "fast", "--cfg-end", "0.6", "--lora", f"{lora}:0.5", "--out", str(out)]
    assert main(options) == 0
    with Image.open(out) as image:
        prompt = json.loads(image.info["prompt"])
        expected = np.asarray(image.convert("RGB"), int)
    assert {"HyDiTForecast", "HyDiTLoraLoader"} <= {node["class_type"] for node in prompt.values()}
    result = host.run(prompt).check()
    (saved,) = (image for output in result.outputs.values() for image in output.get("images", []))
    path = host.base / saved["type"] / saved["subfolder"] / saved["filename"]
    assert np.abs(np.asarray(Image.open(path).convert("RGB"), int) - expected).max() <= 2
