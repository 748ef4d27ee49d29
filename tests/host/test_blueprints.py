"""The blueprints as ComfyUI lists them; each runs, with what it asks for."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from blueprint_files import BLUEPRINTS, definition, flat
from PIL import Image, ImageDraw


@pytest.fixture(scope="module")
def listed(server: Any) -> dict[str, Any]:
    """What ComfyUI hands out, by the name that users see."""
    if server.version.startswith("0.3."):
        pytest.skip("this ComfyUI has no blueprints of packs")
    ours = {
        number: entry["name"]
        for number, entry in server.get("/global_subgraphs").items()
        if entry["info"]["node_pack"] == "custom_nodes.hydit"
    }
    return {
        name: json.loads(server.get(f"/global_subgraphs/{number}")["data"]) for number, name in ours.items()
    }


@pytest.fixture(scope="module")
def photo(server: Any, tmp_path_factory: Any) -> str:
    """A red disk on white, higher than wide; its alpha is open on the right: that is LoadImage's mask."""
    path = tmp_path_factory.mktemp("photo") / "disk.png"
    picture = Image.new("RGBA", (200, 240), "white")
    ImageDraw.Draw(picture).ellipse((50, 70, 150, 170), fill=(220, 30, 30, 255))
    picture.putalpha(Image.new("L", picture.size, 255))
    picture.paste((255, 255, 255, 0), (100, 0, 200, 240))
    ImageDraw.Draw(picture).pieslice((50, 70, 150, 170), -90, 90, fill=(220, 30, 30, 0))
    picture.save(path)
    return server.upload(path)


def drawn(server: Any, blueprint: dict[str, Any], photo: str, **given: Any) -> np.ndarray:
    """The picture of a blueprint that gets the photo wherever it asks for one."""
    asked = {slot["type"]: slot["name"] for slot in definition(blueprint)["inputs"]}
    links = {asked[type]: ["100", slot] for slot, type in enumerate(("IMAGE", "MASK")) if type in asked}
    prompt, picture = flat(blueprint, server.object_info(), **links, **given)
    if links:
        prompt["100"] = {"class_type": "LoadImage", "inputs": {"image": photo}}
    prompt["101"] = {"class_type": "PreviewImage", "inputs": {"images": picture}}
    (image,) = server.images(server.run(prompt).check())
    return np.asarray(image, float)


def color(picture: np.ndarray) -> int:
    """Which of red, green and blue is most in what is not white."""
    inked = picture[picture.min(axis=-1) < 200]
    return int(inked.mean(axis=0).argmax())


def test_each_is_listed(listed):
    assert sorted(listed) == [path.stem for path in BLUEPRINTS]
    for path in BLUEPRINTS:
        assert listed[path.stem] == json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize("name", [path.stem for path in BLUEPRINTS])
def test_each_draws_what_it_is_asked_for(server, listed, photo, name):
    task = name.split(" (")[0]
    prompt = "a blue butterfly" if task == "Inpaint" else "a green apple"
    picture = drawn(server, listed[name], photo, prompt=prompt, seed=3, width=128, height=128)
    assert picture.shape == (128, 128, 3) and picture.std() > 10
    if task == "Inpaint":
        # The photo's middle, 200 x 200 of it, with a seam in the middle.
        assert color(picture[:, :60]) == 0 and color(picture[:, 68:]) == 2
        assert np.abs(picture[:, :60][64, 40] - [220, 30, 30]).max() < 12
    elif task != "LoRA":  # whose style is blue
        assert color(picture) == 1
    if task.startswith("ControlNet"):
        y, x = np.ogrid[:128, :128]
        disk = (x - 64) ** 2 + (y - 64) ** 2 < 32**2
        inked = picture.min(axis=-1) < 200
        assert (disk & inked).sum() / (disk | inked).sum() > 0.6


def test_what_is_asked_for_changes_the_picture(server, listed, photo):
    """One link from a blueprint's input may end at two nodes inside: both get it."""
    (name,) = (name for name in listed if name.startswith("Inpaint"))
    assert drawn(server, listed[name], photo, width=160, height=96, steps=2).shape == (96, 160, 3)
    (name,) = (name for name in listed if name.startswith("LoRA"))
    weak, strong = (drawn(server, listed[name], photo, strength=s, seed=3) for s in (0.0, 1.0))
    assert color(strong) == 2 and np.abs(weak - strong).mean() > 3
