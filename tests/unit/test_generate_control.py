"""ControlNets on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY, randomize

from hydit_core.errors import ConfigError
from hydit_core.facts import ModelInfo
from hydit_core.generate.__main__ import main
from hydit_core.images import Geometry, canny, load_picture
from hydit_core.layer_weights import LayerWeights, split_weight
from hydit_core.model.controlnet import ControlNet
from hydit_core.pictures.png import read_parameters
from hydit_core.weights.save import save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*far (below|above)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("control")
    net = randomize(ControlNet(TINY), 1)
    save_checkpoint(folder / "net.safetensors", dit=net.state_dict(), info=ModelInfo.published("v1.2"))
    other = ControlNet(TINY.__class__(**{**TINY.to_dict(), "hidden_size": 32}))
    save_checkpoint(folder / "other.safetensors", dit=other.state_dict(), info=ModelInfo.published("v1.2"))
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((160, 120), Image.Resampling.NEAREST).save(folder / "hint.png")
    (folder / "weights.json").write_text("[0.25]", encoding="utf-8")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def draw(folder: Path, tiny_model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def draw(*options: str) -> tuple[int, str, Path]:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        places = [option.replace("@", f"{folder}/") for option in options]
        base = ["--model", str(tiny_model_file), "--prompt", "cat", "--steps", "2", "--device", "cpu"]
        code = main([*base, "--out", str(out), *places])
        return code, capsys.readouterr().err, out

    return draw


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_weights_reach_the_picture(draw) -> None:
    hint = ["--control-image", "@hint.png"]
    net = ["--controlnet", "@net.safetensors"]
    plain, full, half, listed = (
        draw(*options)[2]
        for options in (
            [],
            [*net, *hint],
            ["--controlnet", "@net.safetensors:0.25", *hint],
            [*net, *hint, "--control-weights", "@weights.json"],
        )
    )
    assert (pixels(plain) != pixels(full)).any()
    assert (pixels(half) != pixels(full)).any()
    assert (pixels(half) == pixels(listed)).all()
    none = draw("--controlnet", "@net.safetensors:0", *hint)[2]
    assert (pixels(none) == pixels(plain)).all()


def test_the_picture_remembers(draw, folder: Path) -> None:
    options = ["--controlnet", "@net.safetensors:0.5", "--control-image", "@hint.png"]
    more = ["--control-preprocess", "canny", "--control-weights", "decay(0.9)", "--control-end", "0.8"]
    code, _, path = draw(*options, *more)
    assert code == 0
    controls = read_parameters(path)["controls"]
    picture = controls[0].pop("picture")
    assert controls == [
        {
            "controlnet": "net.safetensors",
            "scale": 0.5,
            "image": "hint.png",
            "preprocess": "canny",
            "weights": "decay(0.9)",
            "start": 0.0,
            "end": 0.8,
        }
    ]
    # Edges are another hint than the picture itself.
    other = draw(*options, *more[2:])[2]
    assert (pixels(path) != pixels(other)).any()
    # Both as they were used, in files that do not take each other's names.
    hint = load_picture(folder / "hint.png")
    hint = Geometry.cover(hint.size, Image.open(path).size).apply(hint)
    assert picture.startswith("hint-control-")
    assert (pixels(path.parent / picture) == np.asarray(canny(hint))).all()
    plain = read_parameters(other)["controls"][0]["picture"]
    assert (pixels(path.parent / plain) == np.asarray(hint)).all()


def test_lines_on_nothing_are_lines_on_black(draw, folder: Path) -> None:
    gray = Image.new("L", (64, 64))
    gray.paste(255, (0, 24, 64, 32))
    Image.merge("LA", (Image.new("L", gray.size, 255), gray)).save(folder / "lines.png")
    _, _, path = draw("--controlnet", "@net.safetensors", "--control-image", "@lines.png")
    used = pixels(path.with_name(read_parameters(path)["controls"][0]["picture"]))
    assert (used[24:32] == 255).all() and used.sum() == used[24:32].sum()
    # What edges are taken of is a picture, and shows on white
    options = ["--control-preprocess", "canny"]
    _, _, path = draw("--controlnet", "@net.safetensors", "--control-image", "@lines.png", *options)
    edges = pixels(path.with_name(read_parameters(path)["controls"][0]["picture"]))
    assert not edges.any()


def test_a_control_picture_with_a_very_long_name(draw, folder: Path) -> None:
    name = "图" * 83 + ".png"
    (folder / name).write_bytes((folder / "hint.png").read_bytes())
    code, err, path = draw("--controlnet", "@net.safetensors", "--control-image", f"@{name}")
    assert code == 0, err
    assert path.with_name(read_parameters(path)["controls"][0]["picture"]).is_file()


def test_a_run_writes_its_control_picture_once(draw) -> None:
    options = ["--controlnet", "@net.safetensors", "--control-image", "@hint.png", "--batch", "2"]
    _, said, path = draw(*options)
    names = {read_parameters(path.with_stem(f"{path.stem}-{i}"))["controls"][0]["picture"] for i in (1, 2)}
    (name,) = names
    assert said.count(f"control picture: {path.with_name(name)}") == 1
    before = path.with_name(name).stat().st_mtime_ns
    assert "control picture" not in draw(*options)[1]
    assert path.with_name(name).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("scale", "weights", "strength", "layers"),
    [
        ("0.5", "decay(0.9)", 0.5, "decay(0.9)"),
        # Beyond what ComfyUI's node takes
        ("-0.5", "uniform(0.5)", 1.0, "-0.25"),
        ("20", "[0.25]", 1.0, "5"),
    ],
)
def test_the_graph_that_draws_it_again(draw, folder: Path, scale, weights, strength, layers) -> None:
    options = ["--controlnet", f"@net.safetensors:{scale}", "--control-image", "@hint.png"]
    more = ["--control-weights", weights, "--control-start", "0.1", "--control-end", "0.8"]
    code, _, path = draw(*options, *more)
    assert code == 0
    with Image.open(path) as drawn:
        prompt = json.loads(drawn.text["prompt"])
    nodes = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert nodes["HyDiTControlNetLoader"] == {
        "control_net_name": "net.safetensors",
        "weight_dtype": "fp32",
        "load_key": "auto",
    }
    apply = nodes["HyDiTControlNetApply"]
    written = {name: value for name, value in apply.items() if not isinstance(value, list)}
    assert LayerWeights.parse(written.pop("layer_weights")) == LayerWeights.parse(layers)
    assert written == {"strength": strength, "start_percent": 0.1, "end_percent": 0.8}
    assert prompt[apply["image"][0]]["inputs"]["image"] == read_parameters(path)["controls"][0]["picture"]


def test_which_weights_of_a_file(draw, folder: Path) -> None:
    """One for all ControlNets, or one for each; the picture and its graph say so, and --plan reads them."""
    nets = {
        name: randomize(ControlNet(TINY), seed).state_dict() for name, seed in (("ema", 1), ("module", 2))
    }
    torch.save(nets, folder / "two.pt")
    hint, both = ["--control-image", "@hint.png"], ["--controlnet", "@two.pt", "--controlnet", "@two.pt:0.5"]
    drawn = {}
    for key in ("ema", "module"):
        code, err, path = draw("--controlnet", "@two.pt", *hint, "--control-load-key", key)
        assert code == 0, err
        assert read_parameters(path)["controls"][0]["load_key"] == key
        with Image.open(path) as picture:
            prompt = json.loads(picture.text["prompt"])
        (loader,) = (n["inputs"] for n in prompt.values() if n["class_type"] == "HyDiTControlNetLoader")
        assert loader["load_key"] == key
        drawn[key] = pixels(path)
    assert (drawn["ema"] == pixels(draw("--controlnet", "@net.safetensors", *hint)[2])).all()
    assert (drawn["ema"] != drawn["module"]).any()
    keys = ["--control-load-key", "ema", "--control-load-key", "module"]
    _, _, path = draw(*both, *hint, *keys)
    assert [control["load_key"] for control in read_parameters(path)["controls"]] == ["ema", "module"]
    assert draw(*both, *hint, *keys, "--plan")[0] == 0
    for options, message in (
        ([*both, *hint, "--control-load-key", "distill"], "distill"),
        ([*both[:2], *hint, *keys], "--control-load-key is given 2 times for 1 --controlnet: give 1"),
        (keys[:2], "--control-load-key needs --controlnet"),
    ):
        code, err, _ = draw(*options)
        assert code == 2 and message in err and err.count("error:") == 1


def test_two_controlnets(draw) -> None:
    both = ["--controlnet", "@net.safetensors:0.5", "--controlnet", "@net.safetensors:0.5"]
    hint = ["--control-image", "@hint.png"]
    twice, once = draw(*both, *hint)[2], draw("--controlnet", "@net.safetensors", *hint)[2]
    assert np.abs(pixels(twice) - pixels(once)).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--control-image", "@hint.png"], "--control-image needs --controlnet"),
        (["--controlnet", "@net.safetensors"], "--control-image is given 0 times for 1 --controlnet: give 1"),
        (["--controlnet", "@none.safetensors", "--control-image", "@hint.png"], "none.safetensors"),
        (
            ["--controlnet", "@other.safetensors", "--control-image", "@hint.png"],
            "hidden_size 32 instead of 64",
        ),
        (["--controlnet", "@net.safetensors", "--control-image", "@broken.png"], "broken.png"),
        (
            [
                "--controlnet",
                "@net.safetensors",
                "--control-image",
                "@hint.png",
                "--control-weights",
                "1,2,3",
            ],
            "3 layer weights for a ControlNet with 1 layers",
        ),
        (
            [
                "--controlnet",
                "@net.safetensors",
                "--control-image",
                "@hint.png",
                "--control-weights",
                "steep",
            ],
            "decay(0.825)",
        ),
        (
            ["--controlnet", "@net.safetensors", "--control-image", "@hint.png", "--control-start", "2"],
            "0 <= start <= end <= 1",
        ),
    ],
)
def test_mistakes_are_told_in_a_line(draw, options, message) -> None:
    code, error, path = draw(*options)
    assert code == 2
    assert error.startswith("error: ") and message in error and "Traceback" not in error
    assert not path.exists()


def test_the_base_model_is_no_controlnet(draw, tiny_model_file: Path) -> None:
    code, error, _ = draw("--controlnet", str(tiny_model_file), "--control-image", "@hint.png")
    assert code == 2
    assert "expected" in error and "ControlNet" in error


def test_a_colon_may_belong_to_the_path() -> None:
    assert split_weight("C:\\models\\net.safetensors") == (Path("C:\\models\\net.safetensors"), 1.0)
    assert split_weight("C:\\net.safetensors:0.5") == (Path("C:\\net.safetensors"), 0.5)
    assert split_weight("net.safetensors") == (Path("net.safetensors"), 1.0)


def test_a_weight_that_is_no_number(tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    file.touch()
    with pytest.raises(ConfigError, match="'strong' after the colon is not a number"):
        split_weight(f"{file}:strong")
    (tmp_path / "net.safetensors:strong").touch()
    assert split_weight(f"{file}:strong") == (tmp_path / "net.safetensors:strong", 1.0)


def test_weights_from_json_are_numbers_or_text(draw, folder: Path) -> None:
    (folder / "bad.json").write_text(json.dumps({"weights": 1}), encoding="utf-8")
    options = ["--controlnet", "@net.safetensors", "--control-image", "@hint.png"]
    code, error, _ = draw(*options, "--control-weights", "@bad.json")
    assert code == 2 and "expected a list of numbers" in error
