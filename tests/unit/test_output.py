"""Commands that write: an existing file is replaced only when asked, an input never, whatever its name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY, randomize

from hydit_core.errors import WeightsError
from hydit_core.facts import ModelInfo
from hydit_core.lora import reading, writing
from hydit_core.lora.__main__ import main as lora_main
from hydit_core.model.dit import DiT
from hydit_core.weights.__main__ import main as weights_main
from hydit_core.weights.convert import convert
from hydit_core.weights.output import check_output
from hydit_core.weights.save import save_checkpoint


def lora_file(path: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    key = "diffusion_model.blocks.0.attn1.Wqkv"
    down = torch.randn(2, TINY.hidden_size, generator=generator) / 8
    up = torch.randn(3 * TINY.hidden_size, 2, generator=generator) / 8
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of every shape: files, a PEFT folder, a pipeline's folder, a folder of shards."""
    folder = tmp_path_factory.mktemp("made")
    state = randomize(DiT(TINY), 1).state_dict()
    save_checkpoint(folder / "base.safetensors", dit=state, info=ModelInfo.published("v1.2"))
    tuned = {key: value + 0.01 if value.dim() == 2 else value for key, value in state.items()}
    save_checkpoint(folder / "tuned.safetensors", dit=tuned, info=ModelInfo.published("v1.2"))
    for number, name in enumerate("ab"):
        lora_file(folder / f"{name}.safetensors", number)
    writing.write(reading.read(folder / "a.safetensors"), folder / "peft", format="peft")
    convert(folder / "base.safetensors", folder / "pipe", layout="diffusers")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "in")
    return tmp_path / "in"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(command: str, *arguments: object) -> int:
    main = weights_main if command == "weights" else lora_main
    given = [] if command == "weights" else [command]
    return main([*given, *map(str, arguments)])


COMMANDS = {
    "merge": ("merge", "base.safetensors", "a.safetensors", "b.safetensors"),
    "merge pipe": ("merge", "pipe", "peft", "--layout", "tencent"),
    "combine": ("combine", "a.safetensors", "b.safetensors:0.5"),
    "combine peft": ("combine", "peft", "b.safetensors"),
    "extract": ("extract", "tuned.safetensors", "base.safetensors", "--rank", "2"),
    "extract pipe": ("extract", "tuned.safetensors", "pipe", "--rank", "2"),
    "convert": ("convert", "a.safetensors"),
    "convert peft": ("convert", "peft", "--format", "kohya"),
    "weights convert": ("weights", "convert", "base.safetensors", "--layout", "comfy"),
    "weights convert pipe": ("weights", "convert", "pipe", "--layout", "tencent"),
}


def arguments(name: str, place: Path) -> tuple[list[object], list[Path]]:
    """A command without its output, and the files that it reads."""
    given: list[object] = []
    inputs: list[Path] = []
    for word in COMMANDS[name]:
        path = place / word.removesuffix(":0.5")
        if not path.exists():
            given.append(word)
            continue
        given.append(str(path) + (":0.5" if word.endswith(":0.5") else ""))
        inputs += [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return given, inputs


@pytest.mark.parametrize("name", COMMANDS)
def test_an_input_is_never_written_over(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its own name, through another spelling, and through links of both kinds; with --overwrite too."""
    given, inputs = arguments(name, place)
    for number, path in enumerate(inputs):
        hard, soft = (place.parent / f"{kind}{number}.safetensors" for kind in ("hard", "soft"))
        os.link(path, hard)
        soft.symlink_to(path)
        before = contents(place.parent)
        for out in (path, place / ".." / place.name / path.relative_to(place), hard, soft):
            assert run(*given, "-o", out, "--overwrite") == 2
            said = capsys.readouterr().err
            assert said.startswith("error: ") and said.count("\n") == 1
            assert "the input itself" in said or "a part of the input" in said
        assert contents(place.parent) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_what_exists_is_replaced_only_when_asked(
    name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, _ = arguments(name, place)
    out = place.parent / "out.safetensors"
    out.write_bytes(b"older")
    before = contents(place)
    assert run(*given, "-o", out) == 2
    assert f"error: {out} exists; choose another name, or replace it with --overwrite\n" in (
        capsys.readouterr().err
    )
    assert out.read_bytes() == b"older"
    assert run(*given, "-o", out, "--overwrite") == 0
    assert load_file(out) and contents(place) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_stands_last(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Understood for one release more, with a warning; but what exists is not taken for one."""
    given, _ = arguments(name, place)
    end = next((i for i, word in enumerate(given) if str(word).startswith("--")), len(given))
    out = place.parent / "new.safetensors"
    assert run(*given[:end], out, *given[end:]) == 0
    assert "warning: naming the output without -o will not be understood" in capsys.readouterr().err
    written = out.read_bytes()
    for option in ([], ["--overwrite"]):
        assert run(*given[:end], out, *given[end:], *option) == 2
        assert "name the output with -o" in capsys.readouterr().err
    assert out.read_bytes() == written


def test_a_forgotten_output(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(place)
    a, b = place / "a.safetensors", place / "b.safetensors"
    for given in (
        ["combine", a, b],
        ["combine", a, b, "--overwrite"],
        ["combine", a, b, a],
        ["merge", place / "base.safetensors", a, b],
        ["extract", "--rank", "2", place / "tuned.safetensors", place / "base.safetensors", a],
        ["combine", a, place / "peft"],
    ):
        assert run(*given) == 2
        assert "without -o the last argument is the output" in capsys.readouterr().err
    for given in (["combine", a], ["convert", a], ["weights", "convert", a, "--layout", "comfy"]):
        assert run(*given) == 2
        assert capsys.readouterr().err == "error: no output: name it with -o OUT\n"
    assert run("convert", a, b, "-o", place / "c.safetensors") == 2
    assert "two outputs" in capsys.readouterr().err
    assert contents(place) == before


def test_folders(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No folder is replaced: not one with an input in it, not an input, not another that is not empty."""
    a, base, pipe = place / "a.safetensors", place / "base.safetensors", place / "pipe"
    (place / "empty").mkdir()
    (place / "note").write_text("")
    linked = place / "linked"
    linked.symlink_to(pipe)
    before = contents(place)
    for given, said in (
        (["convert", a, "--format", "peft", "-o", place], "a folder that holds the input"),
        (["convert", place / "peft", "--format", "peft", "-o", place / "peft"], "the input itself"),
        (["merge", pipe, a, "-o", pipe], "the input itself"),
        (["merge", linked, a, "-o", pipe], "the input itself"),
        (["merge", pipe, a, "-o", pipe / "transformer"], "a part of the input"),
        (["merge", pipe, a, "-o", place / "peft"], "exists and is not empty"),
        (["weights", "convert", base, "--layout", "diffusers", "-o", place / "note"], "is a file"),
    ):
        assert run(*given, "--overwrite") == 2
        assert said in capsys.readouterr().err
    assert contents(place) == before
    assert run("convert", a, "--format", "peft", "-o", place / "empty") == 0


def test_shards_and_odd_places(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in (1, 2):
        (shards / f"model-0000{number}-of-00002.safetensors").write_bytes(b"x")
    (shards / "loop").symlink_to(shards)
    with pytest.raises(WeightsError, match="a part of the input"):
        check_output(shards / "model-00002-of-00002.safetensors", [shards], overwrite=True)
    (tmp_path / "nowhere.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(WeightsError, match="exists"):
        check_output(tmp_path / "nowhere.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(WeightsError, match="is not a regular file"):
        check_output(tmp_path / "pipe.safetensors", overwrite=True)
    check_output(tmp_path / "new.safetensors", [shards, tmp_path / "gone", "bad\0name"])


def test_in_python_too(place: Path) -> None:
    """What was read knows its files, so no door leads onto them."""
    a = place / "a.safetensors"
    adapter = reading.read(a)
    with pytest.raises(WeightsError, match="the input itself"):
        writing.write(adapter, a, overwrite=True)
    with pytest.raises(WeightsError, match="exists"):
        writing.write(adapter, place / "b.safetensors")
    writing.write(adapter, place / "b.safetensors", overwrite=True)
    assert torch.equal(*(load_file(p)["diffusion_model.blocks.0.attn1.Wqkv.lora_up.weight"] for p in
                         (a, place / "b.safetensors")))  # fmt: skip


def test_a_plot_replaces_nothing_unasked(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, picture = place / "a.safetensors", place / "norms.png"
    assert run("inspect", a, "--plot", picture) == 0
    picture.write_bytes(b"older")
    assert run("inspect", a, "--plot", picture) == 2
    assert "exists" in capsys.readouterr().err and picture.read_bytes() == b"older"
    assert run("inspect", a, "--plot", picture, "--overwrite") == 0
    for name in ("norms", "norms.txt", "norms.nothing"):
        assert run("inspect", a, "--plot", place / name) == 2
        assert "give it the suffix of a picture" in capsys.readouterr().err and not (place / name).exists()
    assert run("inspect", a, "--plot", place / "gone" / "deeper" / ("n" * 300 + ".png")) == 2
    assert "cannot write" in capsys.readouterr().err
    disguised = shutil.copy(a, place / "a.png")
    assert run("inspect", disguised, "--plot", disguised, "--overwrite") == 2
    assert "the input itself" in capsys.readouterr().err
