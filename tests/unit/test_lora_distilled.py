"""A LoRA for few steps: what its file recommends reaches every door, and explicit choices win."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hydit_core import ConfigError, load
from hydit_core.errors import LoraError
from hydit_core.facts import METADATA_KEY, ModelInfo, SamplingDefaults
from hydit_core.generate.__main__ import main
from hydit_core.lora.__main__ import main as lora_cli
from hydit_core.lora.adapter import Adapter
from hydit_core.lora.blocks import BlockWeights
from hydit_core.lora.distilled import distilled_info, with_lora
from hydit_core.lora.kinds import LoRA
from hydit_core.lora.merge import merge_files
from hydit_core.lora.reading import read
from hydit_core.lora.weighted import weighted
from hydit_core.lora.writing import write
from hydit_core.pictures.png import read_parameters
from hydit_core.presets import check_sampler
from hydit_core.weights.bundle import bundle

TURBO = SamplingDefaults("lcm", "trailing", 2, 1.0, 0.0, 512, 512, "never used")


def lora_file(path: Path, model: Path, info: ModelInfo | None, seed: int = 0) -> Path:
    """A LoRA on one layer of ``model``, whose file says ``info``."""
    name = "blocks.0.attn1.Wqkv"
    with safe_open(model, "pt") as file:
        key = next(key for key in file.keys() if key.endswith(f"{name}.weight"))  # noqa: SIM118
        rows, columns = file.get_slice(key).get_shape()
    generator = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(*shape, generator=generator) for shape in ((2, columns), (rows, 2)))
    adapter = Adapter({f"dit.{name}": [LoRA({"down": down, "up": 0.1 * up}, 1.0)]})
    write(adapter, path, format="comfy", metadata={} if info is None else {METADATA_KEY: info.to_json()})
    return path


def turbo_info(**changes: Any) -> ModelInfo:
    return dataclasses.replace(
        ModelInfo.published("v1.2"), defaults=dataclasses.replace(TURBO, **changes), folded_cfg=4.5
    )


@pytest.fixture
def turbo(tmp_path: Path, tiny_model_file: Path) -> Path:
    return lora_file(tmp_path / "turbo.safetensors", tiny_model_file, turbo_info())


def generate(capsys: Any, model: Path, out: Path, *arguments: str | Path) -> tuple[int, list[Any], str]:
    command = ["--model", model, "--device", "cpu", "--prompt", "cat", "--size", "64x64", "--out", out]
    code = main([str(part) for part in (*command, *arguments)])
    printed, errors = capsys.readouterr()
    return code, [read_parameters(Path(line)) for line in printed.splitlines()], errors


def test_generate_needs_no_settings(
    turbo: Path, tiny_model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, (said,), errors = generate(capsys, tiny_model_file, tmp_path, "--lora", turbo)
    assert code == 0
    assert "distilled: 2 steps of lcm, trailing spacing, cfg 1, unless chosen otherwise" in errors
    assert [said[name] for name in ("sampler", "spacing", "steps", "cfg")] == ["lcm", "trailing", 2, 1]
    assert said["negative"] == ""
    given = ["--steps", "3", "--sampler", "euler", "--spacing", "leading", "--cfg", "2"]
    code, (said,), errors = generate(capsys, tiny_model_file, tmp_path, "--lora", turbo, *given)
    assert code == 0
    assert [said[name] for name in ("sampler", "spacing", "steps", "cfg")] == ["euler", "leading", 3, 2]
    assert "distilled with a guidance of 4.5, which is in every step: cfg 2 comes on top of it" in errors


def test_the_picture_is_that_of_the_written_settings(
    turbo: Path, tiny_model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = ["--steps", "2", "--sampler", "lcm", "--spacing", "trailing", "--cfg", "1"]
    plain = lora_file(tmp_path / "plain.safetensors", tiny_model_file, None)
    pictures = []
    for number, arguments in enumerate([("--lora", turbo), ("--lora", plain, *written)]):
        folder = tmp_path / str(number)
        assert generate(capsys, tiny_model_file, folder, *arguments)[0] == 0
        (png,) = folder.glob("*.png")
        pictures.append(png)
    one, two = (read_parameters(png) for png in pictures)
    assert {**one, "loras": 0} == {**two, "loras": 0}
    from PIL import Image

    assert Image.open(pictures[0]).tobytes() == Image.open(pictures[1]).tobytes()


def test_ddpm_is_refused_in_one_line(
    turbo: Path, tiny_model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for asked in (["--sampler", "ddpm"], ["--preset", "v1.2"]):
        code, made, errors = generate(capsys, tiny_model_file, tmp_path, "--lora", turbo, *asked)
        assert (code, made) == (2, [])
        (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
        assert "distilled to few steps" in line and line.endswith("use lcm")
    assert (
        generate(
            capsys, tiny_model_file, tmp_path, "--lora", f"{turbo}:0", "--sampler", "ddpm", "--steps", "2"
        )[0]
        == 0
    )


def test_the_library_refuses_it_as_well(turbo: Path, tiny_model_file: Path) -> None:
    pipe = load(tiny_model_file, device="cpu")
    before = pipe.settings()
    pipe.load_lora(turbo)
    settings = pipe.settings()
    assert (settings.sampler, settings.steps, settings.cfg) == ("lcm", 2, 1)
    # The size and the negative prompt are the model's.
    assert (settings.width, settings.negative) == (before.width, before.negative)
    with pytest.raises(ConfigError, match="sampler ddpm"):
        next(pipe.pictures(["cat"], dataclasses.replace(settings, sampler="ddpm", width=64, height=64)))


@pytest.mark.parametrize("strength", [0.0, -1.0])
def test_what_is_taken_away_recommends_nothing(turbo: Path, tiny_model_file: Path, strength: float) -> None:
    pipe = load(tiny_model_file, device="cpu")
    before = pipe.info
    pipe.load_lora(turbo, strength)
    assert pipe.info == before


def test_other_loras_leave_the_settings(tiny_model_file: Path, tmp_path: Path) -> None:
    """Their files describe the base that they were trained for, too."""
    for number, info in enumerate((None, dataclasses.replace(turbo_info(), folded_cfg=0.0))):
        pipe = load(tiny_model_file, device="cpu")
        before = pipe.info
        pipe.load_lora(lora_file(tmp_path / f"{number}.safetensors", tiny_model_file, info))
        assert pipe.info == before


def test_two_that_differ_are_told(
    turbo: Path, tiny_model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = lora_file(tmp_path / "other.safetensors", tiny_model_file, turbo_info(sampler="euler", steps=3))
    code, (said,), errors = generate(capsys, tiny_model_file, tmp_path, "--lora", turbo, "--lora", other)
    assert code == 0 and (said["sampler"], said["steps"]) == ("euler", 3)
    assert "warning: the model was distilled before (2 steps of lcm, trailing spacing, cfg 1)" in errors


def test_a_lora_that_does_not_fit_changes_nothing(tiny_model_file: Path, tmp_path: Path) -> None:
    good = lora_file(tmp_path / "good.safetensors", tiny_model_file, turbo_info())
    with safe_open(good, "pt") as file:
        metadata = file.metadata()
    tensors = {
        name: value[..., :3].contiguous() if value.ndim > 1 else value
        for name, value in load_file(good).items()
    }
    save_file(tensors, tmp_path / "bad.safetensors", metadata)
    pipe = load(tiny_model_file, device="cpu")
    before = pipe.info
    with pytest.raises(LoraError):
        pipe.load_lora(tmp_path / "bad.safetensors")
    assert pipe.info == before


def test_impossible_recommendations_are_refused(tiny_model_file: Path, tmp_path: Path) -> None:
    said = json.loads(turbo_info().to_json())
    said["defaults"]["sampler"] = "magic"
    adapter = Adapter({}, name="turbo", metadata={METADATA_KEY: json.dumps(said)})
    with pytest.raises(LoraError, match=r"turbo: .*defaults: sampler|turbo: .*sampler is 'magic'"):
        with_lora(ModelInfo.published("v1.2"), adapter)


@pytest.mark.parametrize("layout", ["comfy", "diffusers"])
def test_merged_into_a_model_it_is_the_models_own(
    turbo: Path, tiny_model_file: Path, tmp_path: Path, layout: str
) -> None:
    out = tmp_path / ("merged" if layout == "diffusers" else "merged.safetensors")
    merged = merge_files(tiny_model_file, [(turbo, 1.0)], out, layout=layout)
    assert "distilled: 2 steps of lcm, trailing spacing, cfg 1, unless chosen otherwise" in merged.notes
    info = bundle(out, only=("dit",), kinds=("dit",)).info
    assert info == with_lora(bundle(tiny_model_file).info, read(turbo)) and info.folded_cfg == 4.5


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ([("turbo", 1.0), ("plain", 0.5)], 2),
        ([("plain", 1.0), ("turbo", 0.7)], 2),
        ([("turbo", 1.0), ("other", 1.0)], 6),
        ([("turbo", -1.0), ("plain", 1.0)], None),
        ([("turbo", -1.0)], None),
        ([("turbo", 0.8)], 2),
        ([("plain", 1.0)], None),
    ],
)
def test_what_it_is_combined_with_keeps_its_settings(
    tiny_model_file: Path, tmp_path: Path, given: list[tuple[str, float]], steps: int | None
) -> None:
    infos = {"turbo": turbo_info(), "other": turbo_info(steps=6), "plain": None}
    files = [
        (lora_file(tmp_path / f"{name}.safetensors", tiny_model_file, infos[name], seed), strength)
        for seed, (name, strength) in enumerate(given)
    ]
    out = tmp_path / "both.safetensors"
    parts = [f"{path}:{strength}" for path, strength in files]
    assert lora_cli(["combine", *parts, "-o", str(out), "--blocks", "4"]) == 0
    told = [distilled_info(read(out))]
    if len(given) == 1:  # as the node does it
        told.append(distilled_info(weighted(read(files[0][0]), given[0][1], BlockWeights(), 4)))
    assert [one and one.defaults.steps for one in told] == [steps] * len(told)


def test_full_weights_refuse_ddpm_too() -> None:
    check_sampler(ModelInfo.published("v1.2"), "ddpm")
    check_sampler(turbo_info(), "ddim")
    with pytest.raises(ConfigError, match="use lcm"):
        check_sampler(turbo_info(), "ddpm")
