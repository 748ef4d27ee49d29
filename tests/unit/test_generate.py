"""`python -m hydit_core.generate` on a tiny random model."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hydit_core import WeightsError, load
from hydit_core.diffusion.forecast import FORECASTS
from hydit_core.facts import NEGATIVE_PROMPT
from hydit_core.generate.__main__ import main
from hydit_core.pictures.png import read_parameters

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def generate(tiny_model_file, capsys, tmp_path, monkeypatch):
    """Run the command line in an empty folder; gives exit code, printed paths, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, model=tiny_model_file):
        code = main(["--model", str(model), "--device", "cpu", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, [Path(line) for line in out.splitlines()], err

    return run


def test_one_png_a_prompt_and_seed_in_the_default_folder(generate):
    code, paths, err = generate(
        "--prompt", "红苹果", "a red apple!", "--prompt", "a/b: ..", "--batch", 2, "--seed", 7
    )
    assert code == 0 and "error" not in err
    assert [str(path) for path in paths] == [
        f"outputs/{name}.png"
        for name in (
            "001-红苹果-7", "001-红苹果-8", "002-a-red-apple-7", "002-a-red-apple-8", "003-a-b-7", "003-a-b-8"
        )
    ]  # fmt: skip
    for path in paths:
        with Image.open(path) as image:
            assert (image.format, image.size, image.mode) == ("PNG", (64, 64), "RGB")


def test_a_second_run_writes_over_nothing(generate):
    first = generate("--prompt", "cat")[1][0]
    before = first.read_bytes()
    second = generate("--prompt", "cat", "--steps", 2)[1][0]
    assert second.name == "001-cat-0-2.png"
    assert first.read_bytes() == before


def test_prompts_file_and_prompts_together(generate, tmp_path):
    (tmp_path / "list.txt").write_text("\ufeffred apple\n\n  绿色的汽车  \n", encoding="utf-8")
    _, paths, _ = generate("--prompt", "cat", "--prompts", "list.txt", "--steps", 1)
    assert [read_parameters(path)["prompt"] for path in paths] == ["cat", "red apple", "绿色的汽车"]


def test_out_may_name_the_file(generate, tmp_path):
    assert generate("--prompt", "cat", "--steps", 1, "--out", "new/one.png")[1] == [Path("new/one.png")]
    _, paths, _ = generate("--prompt", "cat", "dog", "--steps", 1, "--out", "new/one.png")
    assert paths == [Path("new/one-1.png"), Path("new/one-2.png")]
    assert all(path.is_file() for path in paths)


def test_a_file_that_is_named_is_replaced_when_asked(generate, tmp_path):
    (tmp_path / "x-2.png").write_bytes(b"mine")
    (tmp_path / "y.txt").write_bytes(b"mine")
    more = ["--prompt", "tree", "--steps", 1]
    for options, name in (
        (["--out", "x.png", "--batch", 2], "x-2.png"),
        (["--out", "x-2.png"], "x-2.png"),
        (["--out", "y.png", "--captions"], "y.txt"),
    ):
        code, paths, err = generate(*more, *options, model="absent.safetensors")  # before anything is loaded
        assert (code, paths) == (2, []) and f"error: {name} exists; choose another name" in err
        assert (tmp_path / name).read_bytes() == b"mine"
    _, paths, _ = generate(*more, "--out", "x.png", "--batch", 2, "--overwrite")
    assert paths == [Path("x-1.png"), Path("x-2.png")]
    assert (tmp_path / "x-2.png").read_bytes() != b"mine"
    assert generate(*more, "--out", "y.png", "--captions", "--overwrite")[0] == 0
    assert (tmp_path / "y.txt").read_text() == "tree\n"
    assert generate(*more, "--out", "y.png")[0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-1.png", "x-2.png", "y.png", "y.txt"]


def test_an_input_is_never_replaced(generate, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "start.png")
    (tmp_path / "list.txt").write_text("cat")
    for options, name in (
        (["--prompt", "cat", "--init-image", "start.png", "--out", "./start.png"], "start.png"),
        (["--prompts", "list.txt", "--captions", "--out", "list.png"], "list.txt"),
    ):
        before = (tmp_path / name).read_bytes()
        code, _, err = generate(*options, "--overwrite", model="absent.safetensors")
        assert code == 2 and f"{name} is " in err and (tmp_path / name).read_bytes() == before


def test_captions_are_not_written_over(generate, tmp_path):
    """A picture whose caption someone has edited and whose name is free again."""
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "001-cat-0.txt").write_text("mine")
    _, paths, _ = generate("--prompt", "cat", "--steps", 1, "--captions")
    assert paths == [Path("outputs/001-cat-0-2.png")]
    assert paths[0].with_suffix(".txt").read_text() == "cat\n"
    assert (tmp_path / "outputs" / "001-cat-0.txt").read_text() == "mine"


def test_names_that_are_too_long_are_told_before_anything_is_loaded(generate, tmp_path):
    code, _, err = generate("--prompt", "cat", "--out", "n" * 252 + ".png", model="absent.safetensors")
    assert code == 2 and "File name too long" in err
    code, paths, _ = generate("--prompt", "cat", "--steps", 1, "--out", "n" * 251 + ".png")
    assert code == 0 and paths[0].is_file()
    _, paths, _ = generate("--prompt", "图" * 200, "--steps", 1)
    assert paths[0].is_file()


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_loaded(generate, tmp_path):
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    for out in ("n" * 256, "new/" + "n" * 256, "nowhere"):
        code, _, err = generate("--prompt", "cat", "--out", out, model="absent.safetensors")
        assert code == 2 and err.startswith(f"error: --out {out}: cannot write there: ")


def test_a_refusal_leaves_no_empty_folder(generate, tmp_path):
    for options in (("--out", "new/deep"), ("--out", "new/a.png")):
        code, _, err = generate("--prompt", "cat", *options, model="absent.safetensors")
        assert code == 2 and "absent.safetensors" in err
        assert not (tmp_path / "new").exists()
    code, (path,), _ = generate("--prompt", "cat", "--steps", 1, "--out", "new/deep")
    assert code == 0 and path.parent == Path("new/deep") and path.is_file()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--lora", "a.safetensors"), "error: a.safetensors"),
        (("--lora", "none.bin"), "none.bin"),
        (("--controlnet", "a.safetensors", "--control-image", "a.png"), "error: a.safetensors"),
        (("--controlnet", "none.bin", "--control-image", "a.png"), "none.bin"),
        (("--controlnet", "other.safetensors", "--control-image", "a.png"), "error: other.safetensors"),
    ],
)
def test_small_files_are_looked_into_before_the_model_is_loaded(generate, tmp_path, options, error):
    (tmp_path / "a.safetensors").write_bytes(b"no weights")
    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors")
    code, _, err = generate("--prompt", "cat", *options, model="absent.safetensors")
    assert code == 2 and error in err and "absent" not in err and len(err.splitlines()) == 1


def test_seeds_use_all_64_bits(generate):
    """ComfyUI's seeds do, and one seed is one picture in both."""
    _, paths, _ = generate("--prompt", "cat", "--seed", 2**64 - 2, "--batch", 2, "--steps", 1)
    assert [read_parameters(path)["seed"] for path in paths] == [2**64 - 2, 2**64 - 1]


def test_stdout_without_chinese_still_gets_the_paths(tiny_model_file, tmp_path, monkeypatch):
    """As on Windows, where redirected output is in a code page."""
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    options = ("--model", str(tiny_model_file), "--device", "cpu", "--steps", "1", "--out", str(tmp_path))
    assert main([*options, "--prompt", "红", "cat"]) == 0
    stdout.flush()
    lines = stdout.buffer.getvalue().decode().splitlines()
    assert lines[0].endswith("001-\\u7ea2-0.png")
    assert lines[1].endswith("002-cat-0.png") and (tmp_path / "001-红-0.png").is_file()


def test_the_picture_tells_how_it_was_made_and_can_be_made_again(generate, tiny_model_file):
    options = ("--steps", 4, "--cfg", 3, "--guidance-rescale", 0.5, "--sampler", "ddim", "--size", "64x96")
    _, (path,), _ = generate("--prompt", "红 apple", "--negative", "fish", "--seed", 11, *options)
    facts = read_parameters(path)
    assert facts == {
        "format": 1,
        "prompt": "红 apple",
        "negative": "fish",
        "seed": 11,
        "steps": 4,
        "cfg": 3.0,
        "guidance_rescale": 0.5,
        "sampler": "ddim",
        "spacing": "leading",
        "width": 64,
        "height": 96,
        "model": tiny_model_file.name,
        "version": "v1.2",
        "dtype": "float32",
        "title": "HunyuanDiT-64x4 v1.2",
    }
    with Image.open(path) as image:
        written = np.asarray(image)
        text = image.text["parameters"]
    assert text.splitlines()[:2] == ["红 apple", "Negative prompt: fish"]
    assert "Steps: 4, Size: 64x96, Sampler: ddim, Schedule type: leading, CFG scale: 3.0," in text
    names = ("width", "height", "steps", "cfg", "guidance_rescale", "sampler", "spacing", "seed")
    again = load(tiny_model_file, device="cpu")(
        facts["prompt"], facts["negative"], **{name: facts[name] for name in names}
    )
    assert (written == np.asarray(again[0])).all()


def test_defaults_presets_and_negative_by_name(generate):
    _, (plain,), _ = generate("--prompt", "cat")
    facts = read_parameters(plain)
    assert (facts["steps"], facts["sampler"], facts["cfg"], facts["negative"]) == (3, "dpmpp_2m", 2.0, "")
    _, (named,), _ = generate("--prompt", "cat", "--negative", "tencent")
    assert read_parameters(named)["negative"] == NEGATIVE_PROMPT
    _, (preset,), err = generate("--prompt", "cat", "--preset", "v1.1", "--size", "64x64", "--steps", 2)
    facts = read_parameters(preset)
    assert (facts["steps"], facts["sampler"], facts["cfg"]) == (2, "ddpm", 6.0)
    assert facts["negative"] == NEGATIVE_PROMPT
    assert "warning: preset v1.1 is meant for another release than this model (v1.2)" in err


def test_image_to_image_takes_the_pictures_proportions(generate, tmp_path):
    Image.effect_noise((400, 100), 50).save(tmp_path / "start.png")
    _, (path,), _ = generate("--prompt", "cat", "--init-image", "start.png", "--strength", 0.7, "--steps", 3)
    facts = read_parameters(path)
    # The model's area (64 x 64) in the shape 4:1.
    assert (facts["width"], facts["height"]) == (128, 32)
    assert (facts["init_image"], facts["strength"]) == ("start.png", 0.7)
    _, (fixed,), _ = generate("--prompt", "cat", "--init-image", "start.png", "--size", "64x64", "--steps", 3)
    assert read_parameters(fixed)["width"] == 64


def test_torchrun_ranks_share_the_prompts(generate, monkeypatch):
    prompts = ["cat", "dog", "tree"]
    whole = {path.name: path.read_bytes() for path in generate("--prompt", *prompts, "--out", "all")[1]}
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        shares.append([path.name for path in generate("--prompt", *prompts, "--out", "shared")[1]])
    assert shares == [["001-cat-0.png", "003-tree-0.png"], ["002-dog-0.png"]]
    assert {path.name: path.read_bytes() for path in Path("shared").iterdir()} == whole
    # What is wrong is said once, with the number that the user knows.
    monkeypatch.setenv("RANK", "1")
    long = "a red apple " * 9
    assert "warning" not in generate("--prompt", "cat", long, "--steps", 1)[2]
    monkeypatch.setenv("RANK", "0")
    assert "warning: prompt 2, BERT: 29 of" in generate("--prompt", "cat", long, "--steps", 1)[2]
    # More ranks than prompts: the idle one does not even open the model.
    monkeypatch.setenv("RANK", "1")
    assert generate("--prompt", "cat", model="absent.safetensors") == (0, [], "")


def test_a_copy_of_the_default_model_draws_the_same_without_the_assets(
    generate, tiny_model_file, monkeypatch
):
    """No code may know that a model is the embedded one."""
    assets = Path("assets").absolute()
    assets.mkdir()
    shutil.copy(tiny_model_file, assets / "some_model.safetensors")
    monkeypatch.setattr("hydit_core.embedded.ASSETS", assets)
    embedded = load(device="cpu")("cat", seed=3)[0]
    copy = Path("elsewhere.safetensors")
    shutil.copy(assets / "some_model.safetensors", copy)
    shutil.rmtree(assets)
    _, (path,), _ = generate("--prompt", "cat", "--seed", 3, model=copy)
    with Image.open(path) as image:
        assert (np.asarray(image) == np.asarray(embedded)).all()
    with pytest.raises(WeightsError, match="holds 0 models instead of one"):
        load(device="cpu")


def test_parts_may_come_from_other_files(generate, tiny_model_file):
    _, (whole,), _ = generate("--prompt", "cat")
    _, (split,), _ = generate("--prompt", "cat", "--text-encoders", tiny_model_file, "--vae", tiny_model_file)
    assert Image.open(whole).tobytes() == Image.open(split).tobytes()


def test_as_a_module_in_a_fresh_process(tiny_model_file, tmp_path):
    """The door itself: nothing on stdout but paths, no network, no ComfyUI.

    By the whole way from a prompt to a PNG file nothing of what prepares data and trains is loaded.
    """
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_module('hydit_core.generate', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "unused = ('hydit_core.data', 'hydit_core.train', 'pydantic', 'ray.')\n"
        "found = [name for name in sys.modules if f'{name}.'.startswith(unused)]\n"
        "assert not found, found\n"
    )
    command = [sys.executable, "-c", code, "--model", tiny_model_file, "--device", "cpu"]
    done = subprocess.run(
        [*command, "--prompt", "红苹果", "--out", tmp_path / "a.png"],
        cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == [str(tmp_path / "a.png")]
    assert json.loads(Image.open(tmp_path / "a.png").text["hydit"])["prompt"] == "红苹果"


def test_captions_beside_the_pictures_are_what_training_reads(generate):
    from hydit_core.data.config import DataConfig
    from hydit_core.data.dataset import open_dataset

    code, paths, err = generate(
        "--prompt", "红苹果", "a red apple!", "--batch", 2, "--steps", 1, "--out", "dogs", "--captions"
    )
    assert code == 0 and len(paths) == 4, err
    config = DataConfig(sources=[{"path": Path("dogs")}], resolution=64)
    data = open_dataset(config, seed=0, batch_size=1)
    assert [record.captions[0] for record in data.manifest] == ["红苹果"] * 2 + ["a red apple!"] * 2


def test_forecasts_are_told_and_remembered(generate):
    code, paths, err = generate(
        "--prompt", "cat", "dog", "--batch", 2, "--steps", 30, "--forecast", "0.2", "--cfg-end", 0.5
    )
    assert code == 0
    told = re.search(r"forecast: (\d+) of 60 calls of the network were real", err)
    assert told and 20 < int(told[1]) < 50
    facts = read_parameters(paths[0])
    assert facts["forecast"] == 0.2 and facts["cfg_end"] == 0.5
    with Image.open(paths[0]) as image:
        assert f"CFG end: 0.5, Forecast: {facts['forecast']}" in image.info["parameters"]
        prompt = json.loads(image.info["prompt"])
    (number,) = (key for key, node in prompt.items() if node["class_type"] == "HyDiTForecast")
    assert prompt[number]["inputs"] | {"model": 0} == {
        "model": 0, "preset": "custom", "tolerance": facts["forecast"]
    }  # fmt: skip
    (sampler,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "HyDiTKSampler")
    assert sampler["model"] == [number, 0] and sampler["cfg_end"] == 0.5


def test_a_preset_is_remembered_as_its_number(generate):
    _, paths, _ = generate("--prompt", "cat", "--steps", 8, "--forecast", "safe")
    assert read_parameters(paths[0])["forecast"] == FORECASTS["safe"]


def test_a_picture_without_them_says_nothing_of_them(generate):
    _, paths, err = generate("--prompt", "cat", "--steps", 2, "--forecast", "off")
    facts = read_parameters(paths[0])
    assert "forecast" not in facts and "cfg_end" not in facts and "forecast" not in err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--forecast", "quick", "forecast 'quick': use off, safe, fast, or a tolerance from 0 (off) to 1"),
        ("--cfg-end", "0", "cfg end 0: use a number above 0 up to 1"),
        ("--cfg-end", "1.5", "cfg end 1.5"),
    ],
)
def test_wrong_ways_to_be_fast_are_refused_before_loading(generate, option, value, message):
    code, _, err = generate("--prompt", "cat", option, value, model="absent.safetensors")
    assert code == 2 and f"error: {message}" in err
