"""Files of other models are refused by name, with what to do, at every door that takes a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign_files import FAMILIES, FORMATS, LLAVA
from key_lists import sparse_safetensors
from PIL import Image

from hydit_core.generate.__main__ import main as generate
from hydit_core.lora.__main__ import main as lora
from hydit_core.train.__main__ import main as train
from hydit_core.weights.__main__ import main as weights
from hydit_core.weights.detect import detect
from hydit_core.weights.files import open_tensors


@pytest.mark.parametrize("what", FAMILIES)
def test_every_family_is_named(what: str) -> None:
    name, shapes = FAMILIES[what]
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes().items()}
    if not tensors:
        pytest.skip("this diffusers does not have it yet")
    found = detect(tensors)
    assert (found.kind, found.name) == ("other", name)


CONTROLNETS = [what for what, (name, _) in FAMILIES.items() if "Control" in name]


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("strangers")
    return {
        what: sparse_safetensors(folder / f"{index}.safetensors", found)
        for index, (what, (_, shapes)) in enumerate(FAMILIES.items())
        if (found := shapes())
    }


def refused(command: Callable[[list[str]], int], arguments: list[object], capsys) -> str:
    """The one line of an error that a command ends with."""
    assert command([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    error = printed.err
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


RUN = """
[model]
init_from = "{model}"
[data]
sources = [{{ path = "{pictures}" }}]
resolution = 64
[objective]
kind = "full"
[run]
output_dir = "run"
steps = 1
batch_size = 1
"""
DOORS = (
    "model",
    "controlnet",
    "lora",
    "text-encoders",
    "vae",
    "merge",
    "base",
    "extract",
    "convert",
    "train",
)


@pytest.mark.parametrize("door", DOORS)
def test_every_door_says_what_was_given(
    door: str, strangers: dict[str, Path], tiny_model_file: Path, tmp_path: Path, capsys
) -> None:
    out, photos = tmp_path / "out.safetensors", tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (64, 64), "red").save(photos / "a.png")
    (photos / "a.txt").write_text("a")
    common = ["--prompt", "a", "--out", tmp_path / "pictures"]
    for what, path in strangers.items():
        config = tmp_path / "run.toml"
        config.write_text(RUN.format(model=path.as_posix(), pictures=photos.as_posix()))
        command, arguments = {
            "model": (generate, [*common, "--model", path]),
            "controlnet": (
                generate,
                [*common, "--model", tiny_model_file, "--controlnet", path, "--control-image", "none.png"],
            ),
            "lora": (generate, [*common, "--model", tiny_model_file, "--lora", path]),
            "text-encoders": (generate, [*common, "--model", tiny_model_file, "--text-encoders", path]),
            "vae": (generate, [*common, "--model", tiny_model_file, "--vae", path]),
            "merge": (lora, ["merge", path, path, "-o", out]),
            "base": (lora, ["merge", tiny_model_file, path, "-o", out]),
            "extract": (lora, ["extract", path, tiny_model_file, "--rank", 2, "-o", out]),
            "convert": (weights, ["convert", path, "-o", out, "--layout", "tencent"]),
            "train": (train, [config, "--dry-run"]),
        }[door]
        error = refused(command, arguments, capsys)
        assert path.name in error, what
        # HunyuanImage 3.0 has its VAE in the same file.
        assert FAMILIES[what][0] in error or (door == "vae" and "expected a convolution's" in error), what
    assert not out.exists() and not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("what", CONTROLNETS)
def test_another_models_controlnet_says_what_to_use(what: str, strangers: dict[str, Path], capsys) -> None:
    arguments = ["--prompt", "a", "--controlnet", strangers[what], "--control-image", "none.png"]
    error = refused(generate, arguments, capsys)
    assert "a ControlNet goes with the model that it was made for" in error
    assert "published: Tencent-Hunyuan/HYDiT-ControlNet-v1.2" in error


def test_inspect_says_what_to_do_with_it(strangers: dict[str, Path], capsys) -> None:
    assert weights(["inspect", str(strangers["LLaVA"])]) == 0
    printed = capsys.readouterr().out
    assert LLAVA in printed and "give its text as the prompt" in printed


def test_the_name_of_a_file_of_another_model_does_not_matter(tmp_path: Path) -> None:
    """Tencent's HunyuanVideo comes under the name of DeepSpeed's files, as HunyuanDiTs do."""
    path = tmp_path / "mp_rank_00_model_states.pt"
    name, shapes = FAMILIES["HunyuanVideo of Tencent"]
    torch.save({"module": {key: torch.zeros(shape) for key, shape in shapes().items()}}, path)
    assert detect(open_tensors(path)).name == name


@pytest.mark.parametrize("what", FORMATS)
@pytest.mark.parametrize("place", ["file", "folder", "transformer", "under another name"])
def test_other_formats_say_what_to_take_instead(what: str, place: str, tmp_path: Path, capsys) -> None:
    name, content = FORMATS[what]
    folder = tmp_path / "transformer" if place == "transformer" else tmp_path
    folder.mkdir(exist_ok=True)
    path = folder / ("model.safetensors" if place == "under another name" else name)
    path.write_bytes(content + b"\0" * 600)
    given = {"folder": tmp_path, "transformer": tmp_path}.get(place, path)
    for option in ("--model", "--vae", "--text-encoders", "--lora"):
        if place == "transformer" and option != "--model":
            continue
        error = refused(generate, ["--prompt", "a", option, given, "--out", tmp_path / "out"], capsys)
        assert str(path) in error and what in error and "take " in error, option
    assert not (tmp_path / "out").exists()


def test_the_folder_of_another_pipeline_is_named(tmp_path: Path, capsys) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    error = refused(generate, ["--prompt", "a", "--model", tmp_path], capsys)
    assert "it is the folder of a StableDiffusionXLPipeline" in error
