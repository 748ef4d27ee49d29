"""Graphs around a sampling node, with a MODEL and latents of the test."""

from __future__ import annotations

from typing import Any

import torch
from graphs import Graph, Node
from sampling_models import conditioning, features
from torch import Tensor

SEED = 5
POSITIVE, NEGATIVE = features(1), features(2, words=3)


def latent(batch: int = 1, size: tuple[int, int] = (128, 128), **extra: Any) -> dict[str, Any]:
    return {"samples": torch.zeros(batch, 4, size[1] // 8, size[0] // 8), **extra}


def picture(batch: int = 1) -> dict[str, Any]:
    """Random latents as a VAE encoder gives them, unscaled."""
    return {"samples": torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(9)) / 0.13025}


def prompts(host: Any, graph: Graph, model: Any, image: dict[str, Any]) -> dict[str, Any]:
    """The inputs that every sampling node has."""
    return {
        "model": host.give(graph, model),
        "positive": host.give(graph, conditioning(POSITIVE)),
        "negative": host.give(graph, conditioning(NEGATIVE)),
        "latent_image": host.give(graph, image),
    }


def ksampler(host: Any, model: Any, image: dict[str, Any], **settings: Any) -> tuple[Graph, Node]:
    g = Graph()
    given = {"seed": SEED, "steps": 10, "cfg": 6.0, "sampler": "ddim", **settings}
    return g, g.add("HyDiTKSampler", _defaults=True, **prompts(host, g, model, image), **given)


def custom(
    host: Any, model: Any, image: dict[str, Any], sampler: Any, sigmas: Any, **settings: Any
) -> tuple[Graph, Node]:
    """Sampling by the stock SamplerCustom; `sampler` and `sigmas` are class types with inputs."""
    g = Graph()
    given = prompts(host, g, model, image)
    kind, inputs = sampler
    parts = {"sampler": g.add(kind, _defaults=True, **inputs)}
    kind, inputs = sigmas
    parts["sigmas"] = g.add(kind, _defaults=True, model=given["model"], **inputs)
    fixed = {"add_noise": True, "noise_seed": SEED, "cfg": 6.0, **settings}
    return g, g.add("SamplerCustom", **given, **parts, **fixed)


def run(host: Any, made: tuple[Graph, Node]) -> Tensor:
    return host.values(made[0], made[1])[0]["samples"]


def error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.std()).item()


def message(host: Any, made: tuple[Graph, Node]) -> str:
    """The error that the node shows."""
    g, node = made
    g.add("HyDiTTestCapture", value=node)
    result = host.run(g)
    assert not result.ok and result.error is not None
    assert result.error.node_id == node.id
    assert "\n" not in result.error.exception_message
    return result.error.exception_message
