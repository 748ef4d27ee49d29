"""ComfyUI's own Train LoRA with our MODEL: that it trains, and what its LoRA is for our nodes."""

from __future__ import annotations

from typing import Any

import torch
from graphs import Graph
from training_graphs import BASE


def trained(host: Any, graph: Graph, base: Any, **inputs: Any) -> tuple[Any, int]:
    """Its node on four pictures of one flat color in latents, and which output is the LoRA."""
    latents = host.give(graph, {"samples": torch.full((4, 4, 16, 16), 0.5)})
    text = graph.add("HyDiTTextEncode", clip=base.out(1), text="hexagon", _defaults=True)
    node = graph.add(
        "TrainLoraNode", model=base, latents=latents, positive=text, batch_size=4, steps=6, rank=4, seed=1,
        learning_rate=5e-3, training_dtype="fp32", lora_dtype="fp32", gradient_checkpointing=False,
        existing_lora="[None]", _defaults=True, **inputs,
    )  # fmt: skip
    outputs = host.nodes.NODE_CLASS_MAPPINGS["TrainLoraNode"].RETURN_TYPES
    return node, [getattr(kind, "value", kind) for kind in outputs].index("LORA_MODEL")


def test_it_trains_our_model_and_our_nodes_take_the_lora(host):
    graph = Graph()
    base = graph.add("HyDiTCheckpointLoader", ckpt_name=BASE, _defaults=True)
    node, which = trained(host, graph, base)
    lora, losses = host.values(graph, (node.id, which), (node.id, which + 1))
    assert any(value.abs().sum() > 0 for key, value in lora.items() if "up" in key or "lora_B" in key)
    values = [float(loss) for loss in losses["loss"]]
    assert len(values) == 6 and all(value == value for value in values)
    adapter = host.module("nodes.host.lora_file").adapter_of(lora)
    print(adapter.describe(), values)
    assert adapter.modules
