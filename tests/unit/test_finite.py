"""Who is to blame for values that are not finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hydit_core.finite import is_finite, why_not_finite


class Network(nn.Module):
    """Adds a bias to its input, then what it keeps outside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.outside = 0.0

    def forward(self, x: Tensor, control: dict[str, list[Tensor]] | None = None) -> Tensor:
        return self.layer(x) + self.outside


def test_is_finite_looks_into_what_holds_tensors():
    good, bad = torch.ones(2), torch.tensor([1.0, float("inf")])
    assert all(is_finite(value) for value in (good, None, "text", [good, None], {"a": [good]}))
    assert not any(
        is_finite(value) for value in (bad, [good, bad], (bad,), {"a": [good, bad]}, {"a": {"b": bad}})
    )


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("layer", "step 3: the DiT's values are not finite in bfloat16, first in layer; try dtype"),
        ("outside", "step 3: the DiT's values are not finite in bfloat16, outside its layers; try dtype"),
        ("control", "step 3: the DiT's values are not finite in bfloat16, in its input control"),
        ("guidance", "step 3: guidance turned the DiT's values, which are finite, into values that are not"),
        ("sampler", "step 3 begins with latents that are not finite, which the sampler made"),
    ],
)
def test_the_first_that_is_not_finite_is_named(what, expected):
    network, x, control = Network(), torch.ones(1, 2), {"output": [torch.ones(1)]}
    if what == "layer":
        network.layer.bias.data.fill_(float("nan"))
    elif what == "outside":
        network.outside = float("inf")
    elif what == "control":
        control["output"].append(torch.tensor(float("nan")))
    elif what == "sampler":
        x = x * float("nan")
    guidance = float("nan") if what == "guidance" else 1.0

    def denoised() -> Tensor:
        return network(x, control=control) * guidance

    assert why_not_finite(3, x, network, denoised, "bfloat16").startswith(expected)
    assert not network._forward_hooks and not network.layer._forward_hooks


def test_latents_that_a_run_was_given_are_not_the_samplers():
    text = why_not_finite(1, torch.tensor(float("nan")), Network(), lambda: None, "float32")
    assert text.startswith("step 1 begins with latents that are not finite, which it was given; encode")
