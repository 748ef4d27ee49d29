"""Running a MODEL with ComfyUI's KSampler, and watching what reaches the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from graphs import Graph, Link, Node
from sampling_models import conditioning, features
from torch import Tensor


def prompt(seed: int = 1, words: int = 5) -> list[Any]:
    """A CONDITIONING for the tiny models: fresh tensors, because ComfyUI's own model writes into them."""
    return conditioning(features(seed, words=words))


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference in units of the expected values' standard deviation."""
    assert found.shape == expected.shape and expected.std() > 0.05
    return float((found - expected).abs().max() / expected.std())


def add_ksampler(host: Any, g: Graph, model: Link | Node, **settings: Any) -> Node:
    """ComfyUI's KSampler on a link or node; `positive`, `negative` may be links or objects."""
    given = {
        "positive": prompt(1), "negative": prompt(2, 9), "latent_image": torch.zeros(1, 4, 8, 12), "seed": 4,
        "steps": 3, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0, **settings,
    }  # fmt: skip
    if isinstance(given["latent_image"], Tensor):
        given["latent_image"] = {"samples": given["latent_image"]}
    for name in ("positive", "negative", "latent_image"):
        if not isinstance(given[name], Node):
            given[name] = host.give(g, given[name])
    return g.add("KSampler", model=model, **given)


def ksampler(host: Any, model: Any, **settings: Any) -> Tensor:
    """The latents that ComfyUI's KSampler makes with a MODEL."""
    g = Graph()
    node = add_ksampler(host, g, host.give(g, model), **settings)
    return host.values(g, node)[0]["samples"]


def load_state(host: Any, state: dict[str, Tensor], **options: Any) -> Any:
    """Our MODEL on a state dict."""
    source = host.module("hydit_core.weights.source").MemorySource(state)
    parts = host.module("hydit_core.weights.bundle").Bundle(source)
    return host.module("nodes.host.model").load_model(parts, **options)


@contextmanager
def network_calls(host: Any) -> Iterator[list[dict[str, Any]]]:
    """Collects each forward of our network: its keyword arguments, and what it returned as "out"."""
    calls: list[dict[str, Any]] = []
    network = host.module("nodes.host.dit").HostDiT
    forward = network.forward

    def noted(self: Any, x: Tensor, t: Tensor, **given: Any) -> Tensor:
        out = forward(self, x, t, **given)
        calls.append({"x": x.clone(), "t": t, **given, "out": out.clone()})
        return out

    network.forward = noted
    try:
        yield calls
    finally:
        network.forward = forward
