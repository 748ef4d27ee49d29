"""`--inpaint` and `--upscale` on the command line, and the graphs that do the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import TINY, randomize

from hydit_core.facts import ModelInfo
from hydit_core.generate.__main__ import main
from hydit_core.images import softened
from hydit_core.model.controlnet import ControlNet
from hydit_core.pictures.png import read_parameters
from hydit_core.weights.save import save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*far (below|above)")


@pytest.fixture
def draw(tiny_model_file, tmp_path, monkeypatch, capsys):
    """Run the command line in a folder with a start picture of 70 x 66, a mask and a ControlNet."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (7, 6, 3), dtype=np.uint8)
    start = Image.fromarray(noise).resize((70, 66))
    start.save("start.png")
    mask = Image.new("L", (70, 66))
    mask.paste(255, (43, 9, 70, 66))
    mask.save("mask.png")
    start.putalpha(mask.point(lambda value: 255 - value))
    start.save("erased.png")
    Image.new("L", (70, 66)).save("black.png")
    Image.new("L", (70, 66), 255).save("white.png")
    Image.new("L", (64, 20), 255).save("wide.png")
    net = randomize(ControlNet(TINY), 1)
    save_checkpoint("net.safetensors", dit=net.state_dict(), info=ModelInfo.published("v1.2"))

    def run(*options):
        base = ["--model", str(tiny_model_file), "--prompt", "cat", "--steps", "3", "--device", "cpu"]
        code = main([*base, "--out", "new.png", "--overwrite", *map(str, options)])
        return code, capsys.readouterr().err, Path("new.png")

    return run


def array(path):
    return np.asarray(Image.open(path)).astype(int)


def nodes(path):
    with Image.open(path) as image:
        prompt = json.loads(image.text["prompt"])
    return prompt, [node["class_type"] for node in prompt.values()]


INPAINT = ("--init-image", "start.png", "--inpaint", "mask.png")


def test_inpainting_keeps_size_and_pixels(draw):
    code, err, path = draw(*INPAINT)
    assert code == 0, err
    drawn, start = array(path), array("start.png")[1:65, 3:67]
    kept = array("mask.png")[1:65, 3:67] == 0
    assert drawn.shape == (64, 64, 3) and (drawn[kept] == start[kept]).all()
    assert (drawn[~kept] != start[~kept]).any(-1).mean() > 0.9
    facts = read_parameters(path)
    assert (facts["init_image"], facts["strength"]) == ("start.png", 1.0)
    written = facts["inpaint"].pop("picture")
    assert facts["inpaint"] == {"mask": "mask.png"}
    assert (array(written) == array("mask.png")[1:65, 3:67]).all() and f"mask: {written}" in err
    code, _, again = draw("--init-image", "erased.png", "--inpaint", "alpha")
    assert code == 0 and (array(again)[kept] == start[kept]).all()


def test_a_soft_edge_is_remembered(draw):
    code, err, path = draw(*INPAINT, "--feather", 4, "--strength", 0.7)
    assert code == 0, err
    assert read_parameters(path)["inpaint"]["feather"] == 4
    with Image.open(path) as image:
        assert "Denoising strength: 0.7, Mask blur: 4.0" in image.text["parameters"]
    assert (array(path)[:, :28] == array("start.png")[1:65, 3:31]).all()


def test_the_graph_of_an_inpainted_picture(draw):
    path = draw(*INPAINT)[2]
    prompt, types = nodes(path)
    assert "ImageScale" in types and "ImageCrop" in types
    mask = next(node for node in prompt.values() if node["class_type"] == "LoadImageMask")
    assert mask["inputs"] == {"image": read_parameters(path)["inpaint"]["picture"], "channel": "red"}
    saved = next(node for node in prompt.values() if node["class_type"] == "SaveImage")["inputs"]["images"]
    composed = prompt[saved[0]]
    assert composed["class_type"] == "ImageCompositeMasked"
    assert prompt[composed["inputs"]["destination"][0]]["class_type"] == "ImageCrop"  # not scaled


def test_what_is_drawn_is_enlarged(draw):
    code, err, path = draw("--upscale", 1.5, "--size", "64x48", "--seed", 5, "--strength", 0.7)
    assert code == 0, err
    assert Image.open(path).size == (96, 72)
    facts = read_parameters(path)
    assert (facts["width"], facts["height"], facts["strength"]) == (96, 72, 0.7)
    assert facts["upscale"] == {"factor": 1.5, "tile": [64, 64], "width": 64, "height": 48}
    with Image.open(path) as image:
        assert "Size: 96x72" in image.text["parameters"] and "Hires upscale: 1.5" in image.text["parameters"]


def test_enlarging_a_picture_is_its_second_half(draw):
    draw("--size", "64x64", "--seed", 5)
    Path("new.png").rename("first.png")
    both = array(draw("--upscale", 2, "--size", "64x64", "--seed", 5, "--strength", 0.7)[2])
    code, err, path = draw("--init-image", "first.png", "--upscale", 2, "--seed", 5, "--strength", 0.7)
    assert code == 0, err
    assert (array(path) == both).all() and both.shape == (128, 128, 3)
    assert read_parameters(path)["upscale"] == {"factor": 2.0, "tile": [64, 64]}
    other = draw(
        "--init-image", "first.png", "--upscale", 2, "--seed", 5, "--strength", 0.7, "--tile", "96x96"
    )
    assert (array(other[2]) != both).any()


def test_the_graph_of_an_enlarged_picture(draw):
    net = ("--controlnet", "net.safetensors", "--control-preprocess", "tile")
    code, err, path = draw("--upscale", 2, "--strength", 0.7, "--forecast", 0.1, *net)
    assert code == 0, err
    prompt, types = nodes(path)
    assert types.count("HyDiTKSampler") == 2 and types.count("HyDiTTiles") == 1 and "LoadImage" not in types
    tiles = next(node["inputs"] for node in prompt.values() if node["class_type"] == "HyDiTTiles")
    assert {name: tiles[name] for name in ("tile_width", "tile_height", "overlap")} == {
        "tile_width": 64, "tile_height": 64, "overlap": 16,
    }  # fmt: skip
    first, second = (node["inputs"] for node in prompt.values() if node["class_type"] == "HyDiTKSampler")
    assert (first["denoise"], second["denoise"]) == (1.0, 0.7) and first["seed"] == second["seed"]
    assert prompt[second["model"][0]]["class_type"] == "HyDiTTiles"
    assert prompt[second["positive"][0]]["class_type"] == "HyDiTControlNetApply"
    assert prompt[first["positive"][0]]["class_type"] == "HyDiTTextEncode"
    apply = prompt[second["positive"][0]]["inputs"]
    scaled, image = [], apply["image"][0]
    while prompt[image]["class_type"] == "ImageScale":
        scaled.append({name: value for name, value in prompt[image]["inputs"].items() if name != "image"})
        image = prompt[image]["inputs"]["image"][0]
    size = {"width": 128, "height": 128}
    assert scaled == [
        {"upscale_method": "bilinear", **size, "crop": "disabled"},
        {"upscale_method": "area", "width": 20, "height": 20, "crop": "disabled"},
        {"upscale_method": "lanczos", **size, "crop": "center"},
    ]


def test_what_a_tile_controlnet_follows_is_soft():
    """Means of areas of whole pixels, as ComfyUI's are, and straight lines between their centers."""
    noise = np.random.default_rng(0).integers(0, 256, (128, 192, 3), dtype=np.uint8)
    values = noise.astype(float)
    for axis, few in ((0, 20), (1, 30)):
        many = values.shape[axis]
        edges = [(i * many // few, -(-(i + 1) * many // few)) for i in range(few)]
        small = np.stack([values.take(range(*edge), axis).mean(axis) for edge in edges], axis)
        centers, at = (np.arange(few) + 0.5) * many / few, np.arange(many) + 0.5
        values = np.apply_along_axis(lambda row, at=at, c=centers: np.interp(at, c, row), axis, small)
    found = np.asarray(softened(Image.fromarray(noise))).astype(float)
    assert np.abs(found - values).max() <= 0.51


def test_a_tile_controlnet_follows_the_enlarged_picture(draw):
    net = ("--controlnet", "net.safetensors", "--control-preprocess", "tile")
    plain, steered = (array(draw("--upscale", 2, "--strength", 0.7, *more)[2]) for more in ((), net))
    assert (plain != steered).any()
    draw()
    Path("new.png").rename("first.png")
    again = array(draw("--init-image", "first.png", "--upscale", 2, "--strength", 0.7, *net)[2])
    assert (again == steered).all()


def test_each_pass_has_its_controlnets(draw):
    """One that follows a file steers the first picture, one for tiles the enlarged one."""
    both = ["--controlnet", "net.safetensors", "--controlnet", "net.safetensors"]
    kinds = ["--control-preprocess", "none", "--control-preprocess", "tile"]
    code, err, path = draw("--upscale", 2, *both, *kinds, "--control-image", "start.png")
    assert code == 0, err
    assert [control["preprocess"] for control in read_parameters(path)["controls"]] == ["none", "tile"]
    prompt, _ = nodes(path)
    first, second = (node["inputs"] for node in prompt.values() if node["class_type"] == "HyDiTKSampler")
    shown = [
        prompt[prompt[one["positive"][0]]["inputs"]["image"][0]]["class_type"] for one in (first, second)
    ]
    assert shown == ["LoadImage", "ImageScale"]


def test_an_inpaint_controlnet_sees_black_where_it_is_redrawn(draw):
    net = ("--controlnet", "net.safetensors", "--control-preprocess", "inpaint")
    code, err, path = draw(*INPAINT, *net)
    assert code == 0, err
    control = read_parameters(path)["controls"][0]
    used = array(control["picture"])
    kept = array("mask.png")[1:65, 3:67] == 0
    assert not used[~kept].any() and (used[kept] == array("start.png")[1:65, 3:67][kept]).all()
    assert control["image"] == "start.png"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--inpaint", "mask.png"), "--inpaint needs the picture that it is a part of: --init-image FILE"),
        (("--init-image", "start.png", "--inpaint", "black.png"), "black.png: nothing of it is white"),
        (("--init-image", "start.png", "--inpaint", "wide.png"), "wide.png is 64x20, its picture 70x66"),
        (("--init-image", "start.png", "--inpaint", "no.png"), "cannot read picture no.png: no such file"),
        (("--init-image", "start.png", "--inpaint", "net.safetensors"), "not a picture in a known format"),
        (("--init-image", "start.png", "--inpaint", "alpha"), "start.png has no transparent part to redraw"),
        ((*INPAINT, "--feather", "-1"), "feather -1: use 0"),
        ((*INPAINT, "--upscale", "2"), "--inpaint and --upscale are two runs"),
        (("--feather", "3"), "--feather needs --inpaint"),
        (("--strength", "0.5"), "--strength needs --init-image or --upscale"),
        (("--upscale", "5"), "--upscale 5: use 1 to 4"),
        (("--upscale", "nan"), "--upscale nan: use 1 to 4"),
        (("--tile", "64x64"), "--tile needs --upscale"),
        (("--upscale", "2", "--tile", "60x64"), "tiles of 60x64: width and height must be multiples of 16"),
        (("--upscale", "2", "--strength", "0.1"), "leaves no step"),
        (("--control-preprocess", "tile"), "--control-preprocess needs --controlnet"),
        (
            ("--controlnet", "net.safetensors", "--control-preprocess", "tile"),
            "--control-preprocess tile needs --upscale",
        ),
        (
            ("--controlnet", "net.safetensors", "--control-preprocess", "inpaint"),
            "--control-preprocess inpaint needs --inpaint",
        ),
        (
            ("--upscale", "2", "--controlnet", "net.safetensors", "--control-preprocess", "tile",
             "--control-image", "start.png"),
            "--control-image is given 1 times for 0 --controlnet",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_line(draw, options, message):
    code, err, path = draw(*options)
    assert code == 2 and not path.exists()
    assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1


def test_a_mask_of_everything_is_told(draw):
    code, err, _ = draw("--init-image", "start.png", "--inpaint", "white.png")
    assert code == 0 and "warning: the mask covers everything: nothing of the picture stays" in err
