"""The harness itself, with stock nodes: what other tests conclude from it must be true."""

from __future__ import annotations

import torch
from graphs import Graph


def _picture() -> tuple[Graph, object]:
    g = Graph()
    image = g.add("EmptyImage", _defaults=True, width=16, height=8, color=0xFF0000)
    return g, g.add("ImageInvert", image=image)


def test_values_are_the_objects(host):
    g, inverted = _picture()
    (value,) = host.values(g, inverted)
    assert value.shape == (1, 8, 16, 3)
    assert torch.equal(value[0, 0, 0], torch.tensor([0.0, 1.0, 1.0]))
    assert len(g.prompt) == 2


def test_given_objects_arrive(host):
    g = Graph()
    image = torch.full((1, 4, 4, 3), 0.25)
    (value,) = host.values(g, g.add("ImageInvert", image=host.give(g, image)))
    assert torch.equal(value, torch.full((1, 4, 4, 3), 0.75))


def test_ui_outputs_and_caching(host):
    g, inverted = _picture()
    g.add("PreviewImage", images=inverted)
    first = host.run(g).check()
    assert first.outputs["3"]["images"][0]["type"] == "temp"
    assert set(first.executed) == {"1", "2", "3"} and not first.cached
    again = host.run(g, keep_cache=True).check()
    assert set(again.cached) == {"1", "2", "3"}
    assert not host.run(g).check().cached


def test_errors_name_the_node(host):
    g = Graph()
    model = host.give(g, None)
    g.add("HyDiTTestCapture", value=g.add("ImageInvert", image=model))
    result = host.run(g)
    assert not result.ok and result.error.node_id == "2" and result.error.node_type == "ImageInvert"
    assert "TypeError" in result.error.exception_type and result.error.exception_message
    assert "ImageInvert" in str(result.error)


def test_refused_prompts_have_node_errors(host):
    g = Graph()
    g.add("PreviewImage", images=g.add("EmptyImage", width=16))
    result = host.run(g)
    assert not result.ok and result.error.node_errors["1"]["errors"]
    assert "EmptyImage" in str(result.error)
    g, _ = _picture()
    assert host.values(g, ("1", 0))[0].shape == (1, 8, 16, 3)


def test_progress_previews_and_interrupt(host):
    import comfy.utils
    from PIL import Image

    class Steps:
        RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "test", True

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"n": ("INT", {"default": 3})}}

        def run(self, n):
            bar = comfy.utils.ProgressBar(n)
            for i in range(n):
                bar.update_absolute(i + 1, n, ("JPEG", Image.new("RGB", (8, 8)), 512))
            return ()

    host.nodes.NODE_CLASS_MAPPINGS["HyDiTTestSteps"] = Steps
    try:
        g = Graph()
        g.add("HyDiTTestSteps", n=3)
        result = host.run(g).check()
        # the newest host leaves out steps that follow each other too fast
        assert result.progress[-1] == ("1", 3, 3)
        assert result.previews and result.previews[0][0] == "1" and result.previews[0][1].size == (8, 8)
        result = host.run(g, on_progress=lambda *_: host.interrupt())
        if len(result.progress) < 3:
            assert result.interrupted and not result.ok
    finally:
        del host.nodes.NODE_CLASS_MAPPINGS["HyDiTTestSteps"]
    assert host.run(_picture_with_output()).ok


def _picture_with_output() -> Graph:
    g, inverted = _picture()
    g.add("PreviewImage", images=inverted)
    return g


def test_the_ready_graph_draws(host):
    from graphs import text_to_image

    result = host.run(text_to_image(steps=2)).check()
    assert result.outputs["7"]["images"]
    assert [step[1:] for step in result.progress][-1] == (2, 2)
    assert result.previews and result.previews[0][0] == "5"
    assert host.module("hydit_core").__name__.startswith(host.pack.__name__)
