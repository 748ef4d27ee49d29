"""The shipped workflows, and the graphs in `generate`'s pictures, run in ComfyUI."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_prompt_models import save_adapter, save_encoder
from loader_files import stored
from PIL import Image, ImageDraw
from thumbnails import compose, is_published, shown
from workflow_files import MODEL_FOLDERS, WORKFLOWS, api, check_pictures, read, shrink, unmuted, write_models

from hydit_core.embedded import embedded_controlnets, embedded_loras, embedded_model
from hydit_core.generate.__main__ import main
from hydit_core.weights.bundle import bundle

OLDER = sorted(
    (Path(__file__).parents[1] / "data" / "written_2026-11-22" / "workflows" / "api").glob("*.json")
)


@pytest.fixture(scope="module", autouse=True)
def models(host: Any) -> Any:
    write_models(host.models_dir)
    host.refresh()
    yield host.models_dir
    for kind in MODEL_FOLDERS:
        shutil.rmtree(host.models_dir / kind)
    host.refresh()


def pictures(host: Any, result: Any) -> list[Image.Image]:
    """What SaveImage and PreviewImage wrote, by node number."""
    return [picture for _, found in by_number(host, result) for picture in found]


def by_number(host: Any, result: Any) -> list[tuple[str, list[Image.Image]]]:
    return sorted(shown(host, result).items(), key=lambda item: int(item[0]))


@pytest.mark.parametrize("name", [path.stem for path in WORKFLOWS])
def test_every_workflow_draws_what_it_says(host, name):
    """Also on its thumbnail, unless that took published weights or a whole training."""
    prompt = shrink(api(name))
    result = host.run(prompt).check()
    check_pictures(name, pictures(host, result))
    if not is_published(api(name)) and name != "hydit_train_lora":
        again = compose(name, prompt, dict(by_number(host, result)))
        with Image.open(WORKFLOWS[0].parent / f"{name}.jpg") as thumbnail:
            assert apart(again, thumbnail).mean() < 3, "draw it anew: tests/draw_thumbnails.py"


def test_what_is_muted_runs_too(host):
    prompt = shrink(unmuted("hydit_controlnet_v1.2"))
    loaders = [node["inputs"] for node in prompt.values() if node["class_type"] == "HyDiTControlNetLoader"]
    kinds = [loader["control_net_name"].split("_")[2] for loader in loaders]
    assert sorted(kinds) == ["canny", "depth", "pose"]
    _, canny, depth, pose = pictures(host, host.run(prompt).check())
    for picture in (canny, depth, pose):
        assert np.asarray(picture).std() > 10
    # One file under two names, and one picture.
    assert apart(depth, pose).max() == 0 < apart(canny, depth).max()


@pytest.mark.parametrize("path", OLDER, ids=lambda path: path.stem)
def test_workflows_that_were_shipped_before_still_draw(host, path):
    drawn = pictures(host, host.run(shrink(read(path))).check())
    assert drawn and all(np.asarray(picture).std() > 10 for picture in drawn)


def test_custom_sampling_is_the_command_lines_picture(host, tmp_path):
    drawn = pictures(host, host.run(api("hydit_custom_sampling")).check())[0]
    assert (
        main(["--prompt", "a robot", "--seed", "1", "--device", "cpu", "--out", str(tmp_path / "a.png")]) == 0
    )
    assert apart(drawn, Image.open(tmp_path / "a.png")).max() <= 2


def apart(a: Image.Image, b: Image.Image) -> np.ndarray:
    assert a.size == b.size
    return np.abs(np.asarray(a, int) - np.asarray(b, int))


def redrawn(host: Any, path: Path) -> np.ndarray:
    """How far (of 255) each value of the picture is from what its own `prompt` chunk draws."""
    with Image.open(path) as drawn:
        prompt = json.loads(drawn.text["prompt"])
        (again,) = pictures(host, host.run(prompt).check())
        assert np.asarray(drawn).std() > 5
        return apart(drawn, again)


CASES = {
    "embedded": ["--prompt", "绿色的汽车 {a|b} // c", "--seed", "5"],
    "ddpm, rescaled, off-square": [
        *("--prompt", "a blue fish", "--sampler", "ddpm", "--steps", "12", "--guidance-rescale", "0.7"),
        *("--cfg", "5", "--size", "160x96", "--negative", "a red heart"),
    ],
    "no multiple of 16": ["--prompt", "a cat", "--size", "136x120", "--steps", "6"],
    "LoRAs": [
        *("--prompt", "a cat", "--steps", "6", "--lora", f"{embedded_loras()[0]}:0.5"),
        *("--lora", str(embedded_loras()[0]), "--lora-block-weights", "1"),
        *("--lora-block-weights", "0, 1, 0, 1, 0, 1"),
    ],
    "no guidance": ["--prompt", "a cat", "--cfg", "1", "--sampler", "euler", "--steps", "6"],
    "one file": ["--prompt", "a cat", "--model", "{models}/checkpoints/hunyuan_dit_1.2.safetensors"],
    "split": [
        *("--model", "{models}/diffusion_models/hunyuan_dit_1.2_transformer.safetensors"),
        *("--text-encoders", "{models}/checkpoints/hunyuan_dit_1.2.safetensors", "--prompt", "a cat"),
        *("--vae", "{models}/vae/sdxl_vae.safetensors", "--size", "64x64", "--steps", "4"),
    ],
    "text encoders that pad to other lengths": [
        *("--model", "{models}/diffusion_models/hunyuan_dit_1.2_transformer.safetensors"),
        *("--text-encoders", "{models}/text_encoders/HunyuanDiT-v1.2", "--prompt", "a cat", "--steps", "6"),
        *("--vae", "{models}/checkpoints/hunyuan_dit_1.2.safetensors"),
    ],
    "VAE of a whole model": [
        *("--model", "{models}/diffusion_models/hunyuan_dit_1.2_transformer.safetensors"),
        *("--text-encoders", "{models}/checkpoints/hunyuan_dit_1.2.safetensors", "--prompt", "a cat"),
        *("--vae", "{models}/checkpoints/hunyuan_dit_1.2.safetensors", "--steps", "6"),
    ],
    "the embedded model's text encoders and VAE": [
        *("--model", "{models}/diffusion_models/hunyuan_dit_1.2_transformer.safetensors"),
        *("--text-encoders", "{embedded}", "--vae", "{embedded}", "--prompt", "a cat", "--steps", "6"),
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_generates_pictures_redraw_themselves(host, models, tmp_path, case):
    places = {"models": models, "embedded": embedded_model()}
    options = [
        option.format(**places) if option.startswith(("{models}", "{embedded}")) else option
        for option in CASES[case]
    ]
    assert main([*options, "--device", "cpu", "--out", str(tmp_path / "a.png")]) == 0
    assert redrawn(host, tmp_path / "a.png").max() <= 2


def test_the_set_of_weights_that_was_chosen_redraws_itself(host, models, tmp_path):
    path = models / "diffusion_models" / "mp_rank_00_model_states.pt"
    sets = {"module": stored(), "ema": {key: 0.9 * value for key, value in stored().items()}}
    torch.save(sets, path)
    host.refresh()
    files = ["--model", path, "--text-encoders", embedded_model(), "--vae", embedded_model()]
    options = ["--prompt", "a cat", "--size", "128x128", "--steps", "6", "--sampler", "dpmpp_2m"]
    for key in ("module", "ema"):
        out = tmp_path / f"{key}.png"
        chosen = [*files, *options, "--load-key", key, "--device", "cpu", "--out", out]
        assert main([str(option) for option in chosen]) == 0
        assert redrawn(host, out).max() <= 2
    a, b = (Image.open(tmp_path / f"{key}.png") for key in ("module", "ema"))
    assert apart(a, b).max() > 2
    path.unlink()


def test_the_third_of_a_batch_redraws_itself(host, tmp_path):
    options = ["--prompt", "a cat", "--batch", "3", "--seed", "40", "--steps", "6", "--sampler", "ddpm"]
    assert main([*options, "--device", "cpu", "--out", str(tmp_path / "a.png")]) == 0
    assert redrawn(host, tmp_path / "a-3.png").max() <= 2


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("size", [(128, 128), (200, 131), (77, 240)])
def test_pictures_from_pictures_redraw_themselves(host, tmp_path, size, mode):
    """The crop is the pipeline's to the pixel, and transparency lies on white, not on what is under it.

    ComfyUI rounds what is laid on white down to 8 bits, which sampling carries on.
    """
    start = Image.radial_gradient("L").resize(size).convert("RGB")
    start.paste((250, 40, 40), (size[0] // 3, size[1] // 4, size[0] // 2, size[1] // 2))
    if mode == "RGBA":
        start.putalpha(Image.linear_gradient("L").resize(size))
    path = tmp_path / f"start-{mode}-{size[0]}.png"
    start.save(path)
    shutil.copy(path, host.input_dir)
    options = ["--init-image", str(path), "--strength", "0.5", "--prompt", "a red heart", "--size", "128x96"]
    assert main([*options, "--device", "cpu", "--out", str(tmp_path / "a.png")]) == 0
    difference = redrawn(host, tmp_path / "a.png")
    assert difference.max() <= 2 if mode == "RGB" else difference.mean() <= 1


#: What steers, and the other options.
CONTROLLED = {
    "canny picture": (["--control-image", "{circle}"], []),
    "cropped, part of the time, by layer": (
        [
            *("--control-image", "{wide}", "--control-weights", "0.3,1.2"),
            *("--control-start", "0.1", "--control-end", "0.7"),
        ],
        ["--size", "160x96"],
    ),
    "two, one of them negative": (
        ["--control-image", "{circle}", "--control-image", "{wide}", "--controlnet", "{net}:-0.4"],
        ["--size", "136x120", "--sampler", "ddpm"],
    ),
    "from a picture": (["--control-image", "{circle}"], ["--init-image", "{wide}", "--size", "128x96"]),
}


@pytest.mark.parametrize("case", CONTROLLED)
def test_controlled_pictures_redraw_themselves(host, tmp_path, case):
    (net,) = embedded_controlnets()
    places = {"net": net, "circle": tmp_path / "circle.png", "wide": tmp_path / "wide.png"}
    for name, size in (("circle", (128, 128)), ("wide", (201, 77))):
        picture = Image.new("RGB", size)
        ImageDraw.Draw(picture).ellipse((20, 20, size[0] - 30, size[1] - 10), outline="white")
        picture.save(places[name])
    steering, others = ([option.format(**places) for option in options] for options in CONTROLLED[case])
    # One seed in five (0) carries differences of 1e-6 to 12 levels in a corner of the second case.
    base = ["--prompt", "a red apple", "--steps", "8", "--seed", "1", "--device", "cpu", *others]
    steered = [*base, "--controlnet", f"{net}:1.5", *steering]
    assert main([*steered, "--out", str(tmp_path / "steered.png")]) == 0
    for path in tmp_path.iterdir():
        shutil.copy(path, host.input_dir)
    host.refresh()
    assert redrawn(host, tmp_path / "steered.png").max() <= 2
    assert main([*base, "--out", str(tmp_path / "plain.png")]) == 0
    assert apart(Image.open(tmp_path / "steered.png"), Image.open(tmp_path / "plain.png")).max() > 20


#: Weights, ranges and masks of two pictures, and the other options.
PICTURED = {
    "one": (["--image-prompt", "{wide}:0.6"], []),
    "two, transparent, masked, part of the time, by block": (
        [
            *("--image-prompt", "{glass}:-0.4", "--image-prompt", "{wide}"),
            *("--image-prompt-mask", "{half}", "--image-prompt-range", "0.1:0.7"),
            *("--image-prompt-blocks", "decay(0.9)", "--image-prompt-blocks", "uniform(0.5)"),
        ],
        ["--size", "160x96", "--sampler", "ddpm"],
    ),
    "in tiles": (["--image-prompt", "{wide}"], ["--upscale", "1.5", "--tile", "128x128", "--cfg", "1"]),
}


@pytest.mark.parametrize("case", PICTURED)
def test_pictures_with_image_prompts_redraw_themselves(host, tmp_path, case):
    folder = host.models_dir / "ipadapter"
    config = bundle(embedded_model(), only=("dit",)).kind.config
    save_adapter(folder / "small_ipa.pt", config)
    save_encoder(folder / "clip_img_encoder.pt")
    wide = Image.radial_gradient("L").resize((201, 77)).convert("RGB")
    wide.paste((250, 40, 40), (30, 20, 90, 60))
    wide.save(tmp_path / "wide.png")
    wide.putalpha(Image.linear_gradient("L").resize(wide.size))
    wide.save(tmp_path / "glass.png")
    half = Image.new("L", (160, 96))
    half.paste(255, (40, 0, 120, 96))
    half.save(tmp_path / "half.png")
    pictured, others = ([option.format(**_named(tmp_path)) for option in each] for each in PICTURED[case])
    base = ["--prompt", "a red apple", "--steps", "8", "--seed", "1", "--device", "cpu", *others]
    adapter = ["--ip-adapter", str(folder / "small_ipa.pt")]
    assert main([*base, *pictured, *adapter, "--out", str(tmp_path / "seen.png")]) == 0
    for path in tmp_path.iterdir():
        shutil.copy(path, host.input_dir)
    host.refresh()
    # ComfyUI enlarges a picture that was not rounded to 8 bits
    assert redrawn(host, tmp_path / "seen.png").max() <= (4 if case == "in tiles" else 2)
    assert main([*base, "--out", str(tmp_path / "plain.png")]) == 0
    assert apart(Image.open(tmp_path / "seen.png"), Image.open(tmp_path / "plain.png")).max() > 20


def _named(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in folder.glob("*.png")}
