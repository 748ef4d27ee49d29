"""Residuals of a CONTROL_NET in our MODEL: where they are added, and what does not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs import Graph
from model_runs import add_ksampler, error, load_state, network_calls, prompt
from sampling_models import CONFIG, our_model, weights
from torch import Tensor

from hydit_core.model.dit import DiT


def control_net(host: Any, output: dict[str, list[Tensor]]) -> Any:
    """A CONTROL_NET that always gives the same."""
    base = host.comfy_module("comfy.controlnet").ControlBase

    class Fixed(base):
        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            control = {name: [value.clone() for value in values] for name, values in output.items()}
            return self.control_merge(control, None, None)

        def copy(self):
            other = Fixed()
            self.copy_to(other)
            return other

        def get_models(self):
            return []

    return Fixed()


def controlled(host: Any, model: Any, output: dict[str, list[Tensor]], strength: float) -> Graph:
    g = Graph()
    applied = g.add(
        "ControlNetApplyAdvanced", positive=host.give(g, prompt(1)), negative=host.give(g, prompt(2)),
        control_net=host.give(g, control_net(host, output)), image=host.give(g, torch.zeros(1, 64, 96, 3)),
        strength=strength, start_percent=0.0, end_percent=1.0,
    )  # fmt: skip
    model = host.give(g, model)
    both = {"positive": applied, "negative": host.give(g, prompt(2))}
    g.add("HyDiTTestCapture", value=add_ksampler(host, g, model, **both, cfg=1.0, steps=1).out(0))
    return g


def test_control_reaches_the_skips(host):
    """The same as hydit_core's own network with those residuals, in a model of three skips."""
    config = replace(CONFIG, depth=8)
    state = weights(config)
    g = torch.Generator().manual_seed(2)
    residuals = [torch.randn(1, 24, 64, generator=g) for _ in range(3)]
    with network_calls(host) as calls:
        host.run(controlled(host, load_state(host, state), {"output": residuals}, 0.7)).check()
    (call,) = calls
    assert len(call["control"]["output"]) == 3, "the list that ComfyUI keeps was emptied"
    dit = DiT(config)
    dit.load_state_dict(state)
    names = ("context", "text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5")
    with torch.no_grad():
        context = dit.encode_context(*(call[name] for name in names))
        expected = dit(call["x"], call["t"], context, control=[0.7 * residual for residual in residuals])
        without = dit(call["x"], call["t"], context)
    assert error(call["out"], expected[:, :4]) < 1e-5 and error(call["out"], without[:, :4]) > 0.05


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"output": [torch.zeros(1, 24, 64)] * 3}, "gives 3 residuals, this model of depth 4 takes 1"),
        ({"middle": [torch.zeros(1, 24, 64)]}, "gives residuals for middle blocks"),
    ],
)
def test_another_models_control(host, tmp_path, output, message):
    result = host.run(controlled(host, our_model(host, tmp_path), output, 1.0))
    assert not result.ok and result.error.node_type == "KSampler"
    assert message in result.error.exception_message and "another model" in result.error.exception_message
