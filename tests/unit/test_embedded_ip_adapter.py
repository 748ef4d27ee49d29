"""The IP-Adapter that ships: the text says what is drawn, the picture in which color."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hydit_core
from hydit_core.embedded import embedded_ip_adapters
from hydit_core.generate.__main__ import main
from hydit_core.image_prompts.encoder import encoder_beside
from hydit_core.pictures.png import read_parameters
from hydit_core.pipeline import Pipeline
from hydit_core.weights.detect import detect
from hydit_core.weights.files import open_tensors

(ADAPTER,) = embedded_ip_adapters()


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return hydit_core.load(device="cpu")


def color(picture: Image.Image) -> np.ndarray:
    """Mean of what is not white, (3,)."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    return pixels[(255 - pixels).max(2) > 40].mean(0)


def test_one_file_holds_adapter_and_encoder() -> None:
    kind = detect(open_tensors(ADAPTER))
    assert kind.kind == "ip_adapter" and "with its image encoder" in kind.name
    assert encoder_beside(ADAPTER) == ADAPTER
    assert ADAPTER.stat().st_size <= 2_000_000


def test_the_picture_gives_the_color_and_the_text_the_thing(pipe: Pipeline) -> None:
    adapter = hydit_core.load_ip_adapter(ADAPTER, dtype=pipe.dit.dtype)
    encoder = hydit_core.load_image_encoder(ADAPTER)
    settings = {"steps": 10, "seed": 1}
    found = {}
    for name in ("red", "blue", "green"):
        (shown,) = pipe(f"{name} circle", **settings)
        given = [hydit_core.ImagePrompt(adapter, encoder, shown)]
        found[name] = color(pipe("star", images=given, **settings)[0])
    for i, name in enumerate(("red", "green", "blue")):
        assert found[name].argmax() == i, found
    off = [hydit_core.ImagePrompt(adapter, encoder, shown, 0.0)]
    plain, without = (np.asarray(pipe("star", images=given, **settings)[0]) for given in (off, ()))
    assert (plain == without).all()


def test_it_is_found_without_being_named(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    out = tmp_path / "out.png"
    options = ["--prompt", "star", "--steps", "2", "--device", "cpu", "--out", str(out)]
    assert main([*options, "--image-prompt", str(tmp_path / "red.png")]) == 0
    (prompt,) = read_parameters(out)["image_prompts"]
    assert prompt["ip_adapter"] == ADAPTER.name
