"""A real ComfyUI process: it starts, answers, runs prompts and reports their errors."""

from __future__ import annotations

from graphs import Graph
from PIL import Image


def _graph() -> Graph:
    g = Graph()
    image = g.add("EmptyImage", _defaults=True, width=16, height=8, color=0xFF0000)
    g.add("PreviewImage", images=g.add("ImageInvert", image=image))
    return g


def test_a_prompt_over_http(server):
    result = server.run(_graph()).check()
    assert result.executed == ["1", "2", "3"]
    (image,) = server.images(result)
    assert image.size == (16, 8) and image.getpixel((0, 0)) == (0, 255, 255)
    assert server.run(_graph()).check().cached


def test_a_refused_prompt_has_node_errors(server):
    g = Graph()
    g.add("PreviewImage", images=g.add("EmptyImage", width=16))
    refused = server.run(g)
    assert not refused.ok and refused.error.node_errors["1"]["errors"]
    assert "EmptyImage" in str(refused.error)


def test_a_failing_prompt_names_its_node(server, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    g = Graph()
    g.add("PreviewImage", images=g.add("LoadImage", image=server.upload(broken)))
    failed = server.run(g)
    assert not failed.ok and failed.error.node_id == "1" and failed.error.node_type == "LoadImage"
    assert "UnidentifiedImageError" in failed.error.exception_type
    server.run(_graph()).check()


def test_uploaded_pictures_are_found(server, tmp_path):
    path = tmp_path / "blue.png"
    Image.new("RGB", (8, 8), (0, 0, 255)).save(path)
    g = Graph()
    g.add("PreviewImage", images=g.add("LoadImage", image=server.upload(path)))
    (image,) = server.images(server.run(g).check())
    assert image.getpixel((0, 0)) == (0, 0, 255)
