"""HyDiTTiles in ComfyUI, and the graphs of pictures that were inpainted or enlarged on the command line."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
from graphs import Graph
from PIL import Image, ImageDraw
from sampling_graphs import SEED, error, latent, prompts, run
from sampling_models import native_model, our_model

from hydit_core.embedded import embedded_controlnets
from hydit_core.generate.__main__ import main


@pytest.fixture(scope="module")
def models(host, tmp_path_factory):
    return {"ours": our_model(host, tmp_path_factory.mktemp("dit")), "native": native_model(host)}


def sampled(host: Any, model: Any, **tiles: int) -> Any:
    g = Graph()
    inputs = prompts(host, g, model, latent())
    if tiles:
        inputs["model"] = g.add("HyDiTTiles", _defaults=True, model=inputs["model"], **tiles)
    own = {"seed": SEED, "steps": 4, "cfg": 4.0, "sampler": "ddim"}
    return g, g.add("HyDiTKSampler", _defaults=True, **inputs, **own)


@pytest.mark.parametrize("which", ["ours", "native"])
def test_a_tile_as_large_as_the_picture_changes_nothing(host, models, which):
    whole = run(host, sampled(host, models[which]))
    one = run(host, sampled(host, models[which], tile_width=512, tile_height=512, overlap=64))
    assert error(one, whole) == 0
    several = run(host, sampled(host, models[which], tile_width=32, tile_height=32, overlap=16))
    assert error(several, whole) > 1e-3


def test_an_overlap_that_cannot_be(host, models):
    with_tiles = host.module("nodes.host.tiles").with_tiles
    for tile, overlap, message in (
        ((64, 64), 64, "can share 0 to 48"),
        ((50, 64), 16, "multiples of 16"),
        ((64, 64), -16, "can share 0 to 48"),
    ):
        with pytest.raises(Exception, match=message):
            with_tiles(models["ours"], tile, overlap)


START = {
    "inpainted": [
        *("--prompt", "a blue heart", "--init-image", "{start}", "--inpaint", "{mask}", "--feather", "3")
    ],
    "enlarged": ["--prompt", "a red apple", "--upscale", "1.5", "--strength", "0.3"],
    "enlarged along the picture": [
        *("--prompt", "a red apple", "--init-image", "{start}", "--upscale", "1.5", "--strength", "0.3"),
        *("--controlnet", "{net}:0.5", "--control-preprocess", "tile"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", START)
def test_pictures_redraw_themselves(host, tmp_path, case):
    start = Image.new("RGB", (133, 130), "white")
    ImageDraw.Draw(start).ellipse((20, 25, 110, 105), fill=(200, 40, 40))
    start.save(tmp_path / "start.png")
    mask = Image.new("L", start.size)
    mask.paste(255, (66, 0, 133, 130))
    mask.save(tmp_path / "mask.png")
    (net,) = embedded_controlnets()
    places = {"start": tmp_path / "start.png", "mask": tmp_path / "mask.png", "net": net}
    options = [option.format(**places) for option in START[case]]
    path = tmp_path / "drawn.png"
    assert main([*options, "--steps", "8", "--device", "cpu", "--out", str(path)]) == 0
    for one in tmp_path.iterdir():
        shutil.copy(one, host.input_dir)
    host.refresh()
    with Image.open(path) as drawn:
        result = host.run(json.loads(drawn.text["prompt"])).check()
        (image,) = [image for output in result.outputs.values() for image in output.get("images", [])]
        again = Image.open(host.base / image["type"] / image["subfolder"] / image["filename"])
        assert again.size == drawn.size
        difference = np.abs(np.asarray(drawn, int) - np.asarray(again.convert("RGB"), int))
    # Between two passes ComfyUI rounds pictures down to 8 bits, which sampling carries on.
    assert difference.mean() <= (0.5 if case == "inpainted" else 2)
