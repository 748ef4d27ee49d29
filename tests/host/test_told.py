"""What nodes tell the page: again, where their result comes from the cache."""

from __future__ import annotations

import dataclasses

from graphs import Graph
from loader_files import EMBEDDED

NAME = f"[embedded] {EMBEDDED.stem}"


def tellers() -> Graph:
    g = Graph()
    loaded = g.add("HyDiTCheckpointLoader", _defaults=True, ckpt_name=NAME)
    g.add("HyDiTTextEncode", _defaults=True, clip=loaded.out(1), text="a red apple")
    lora = g.add("HyDiTLoraLoader", _defaults=True, model=loaded.out(0))
    control = g.add("HyDiTControlNetLoader", _defaults=True)
    for source in ("2", lora.id, control.id):
        g.add("HyDiTTestCapture", value=[source, 0])
    return g


def test_a_cached_node_tells_again(host):
    """Newer hosts send it once more; the page reads the history, which always has it, on older ones."""
    g = tellers()
    first = host.run(g).check()
    names = {"1": "hydit_version", "2": "hydit_report", "3": "hydit_lora", "4": "hydit_version"}
    told = {node: first.outputs[node][name] for node, name in names.items()}
    assert all(text and text[0] for text in told.values())
    again = host.run(g, keep_cache=True).check()
    assert set(names) <= set(again.cached)
    assert {node: again.outputs[node][name] for node, name in names.items()} == told
    sent = {data["node"] for event, data in host.events if event == "executed" and data["output"]}
    known = {field.name for field in dataclasses.fields(host.comfy_module("comfy_api.latest").io.Schema)}
    assert set(names) <= sent or "has_intermediate_output" not in known
