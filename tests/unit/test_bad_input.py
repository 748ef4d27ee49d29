"""What a user gets wrong at the command line: a message, no picture, no traceback; the next run succeeds."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from train_setup import write_run

from hydit_core.generate.__main__ import main
from hydit_core.train.__main__ import main as train_main
from hydit_core.weights.bundle import bundle


@pytest.fixture
def attempt(tiny_model_file, capfd, tmp_path, monkeypatch):
    """Run the command line, then a good one; gives the first one's exit code and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, model=tiny_model_file):
        with_model = ["--model", str(model), "--device", "cpu", "--prompt", "cat", *map(str, arguments)]
        try:
            code = main(with_model)
        except SystemExit as exit_:  # argparse's own refusals
            code = exit_.code
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        if code:
            assert out == "" and not list(tmp_path.rglob("*outputs/*"))
        assert (
            main(["--model", str(tiny_model_file), "--prompt", "cat", "--steps", "1", "--out", "good"]) == 0
        )
        capfd.readouterr()
        return code, err

    return run


def test_truncated_safetensors(attempt, tiny_model_file, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(tiny_model_file.read_bytes()[:-1000])
    code, err = attempt(model=cut)
    assert code == 2 and err.startswith("error: ") and str(cut) in err
    assert "truncated" in err or "cut off" in err


def test_sdxl_checkpoint(attempt, tmp_path):
    path = tmp_path / "sdxl.safetensors"
    shapes = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "conditioner.embedders.1.model.ln_final.weight": (1280,),
        "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3),
    }
    save_file({name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}, path)
    code, err = attempt(model=path)
    assert code == 2 and err.startswith("error: ") and "sdxl.safetensors" in err
    assert "SDXL" in err and "HunyuanDiT" in err


def test_lora(attempt, tmp_path):
    path = tmp_path / "lora.safetensors"
    names = ("lora_A", "lora_B")
    save_file({f"base_model.model.blocks.0.attn1.Wqkv.{n}.weight": torch.zeros(4, 4) for n in names}, path)
    code, err = attempt(model=path)
    assert code == 2 and err.startswith("error: ") and "lora.safetensors" in err and "LoRA" in err


class Payload:
    """Unpickling it would write a file."""

    def __reduce__(self):
        return (open, ("pwned.txt", "w"))


@pytest.mark.parametrize("saved_by", ["pickle", "torch"])
def test_pickle_with_code(attempt, tmp_path, saved_by):
    path = tmp_path / "model.pt"
    if saved_by == "pickle":
        path.write_bytes(pickle.dumps({"a": Payload()}))
    else:
        torch.save({"a": torch.zeros(1), "b": Payload()}, path)
    code, err = attempt(model=path)
    assert code == 2 and err.startswith("error: ") and "model.pt" in err
    assert not (tmp_path / "pwned.txt").exists()
    if saved_by == "torch":
        assert "open" in err  # the name of what was refused


def test_missing_file(attempt):
    assert attempt(model="absent.safetensors") == (2, "error: absent.safetensors does not exist\n")


def test_a_dit_alone_needs_its_companions(attempt, tiny_model_file, tmp_path):
    save_file(dict(bundle(tiny_model_file).dit), tmp_path / "dit.safetensors")
    code, err = attempt(model=tmp_path / "dit.safetensors")
    assert code == 2 and err.startswith("error: ") and "--text-encoders" in err
    code, err = attempt("--text-encoders", tiny_model_file, model=tmp_path / "dit.safetensors")
    assert code == 2 and err.startswith("error: ") and "--vae" in err
    named = ("--text-encoders", tiny_model_file, "--vae", tiny_model_file, "--size", "64x64", "--steps", 2)
    assert attempt(*named, model=tmp_path / "dit.safetensors")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "100x64"), "error: size 100x64: width and height must be multiples of 8; try 96x64\n"),
        (("--steps", "0"), "error: 0 steps with 'linspace' spacing: use 1 to 999\n"),
        (("--cfg", "0"), "error: cfg 0: use 1 (no guidance) or more\n"),
        (("--batch", "0"), "error: --batch 0: use 1 or more\n"),
        (("--cfg", "nan"), "error: cfg nan: use 1 (no guidance) or more\n"),
        (("--cfg", "inf"), "error: cfg inf: use 1 (no guidance) or more\n"),
        (("--seed", "-1"), f"error: seed -1: use a number from 0 to {2**64 - 1}\n"),
        (
            ("--seed", 2**64 - 1, "--batch", 2),
            f"error: seed {2**64 - 1}: use a number from 0 to {2**64 - 2}\n",
        ),
        (("--prompt", "caf\udce9"), "error: 'caf\\udce9' is not valid text: check the terminal's encoding"),
        (("--negative", "caf\udce9"), "error: 'caf\\udce9' is not valid text: check the terminal's encoding"),
        (("--strength", "0.5"), "error: --strength needs --init-image or --upscale\n"),
        (("--device", "warp"), "error: device 'warp' cannot be used here"),
        (("--init-image", "absent.png"), "error: cannot read picture absent.png: no such file\n"),
        (("--prompts", "absent.txt"), "error: cannot read absent.txt: No such file or directory\n"),
        (("--out", "picture.jpg"), "error: --out picture.jpg: pictures are written as PNG"),
    ],
)
def test_values_that_cannot_be(attempt, arguments, message):
    code, err = attempt(*arguments)
    assert code == 2 and err.startswith(message) and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "big"), "argument --size: 'big' is not a size; write width x height"),
        (("--sampler", "euler_a"), "argument --sampler: invalid choice: 'euler_a' (choose from"),
        (("--spacing", "karras"), "argument --spacing: invalid choice: 'karras'"),
        (("--preset", "v3"), "argument --preset: invalid choice: 'v3'"),
        (("--dtype", "int4"), "argument --dtype: invalid choice: 'int4'"),
        (("--stesp", "4"), "unrecognized arguments: --stesp 4"),
    ],
)
def test_words_that_the_command_line_does_not_know(attempt, arguments, message):
    code, err = attempt(*arguments)
    assert code == 2 and message in err


def test_nothing_to_draw(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("error: nothing to draw: give --prompt TEXT")


def test_unreadable_init_picture(attempt, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    code, err = attempt("--init-image", "text.png")
    assert (code, err) == (2, "error: cannot read picture text.png: not a picture in a known format\n")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-500])
    code, err = attempt("--init-image", "cut.png")
    assert code == 2 and err.startswith("error: cannot read picture cut.png: ")


@pytest.mark.parametrize("out", ["file/folder", "file/picture.png", "file"])
def test_out_path_not_writable(attempt, tmp_path, monkeypatch, out):
    """Found before the model is loaded. (A file in the way: permissions do not stop root.)"""
    (tmp_path / "file").write_text("")
    code, err = attempt("--out", out, model="absent.safetensors")
    assert code == 2 and err.startswith(f"error: --out {out}: cannot write there: ")


def test_prompt_too_long_is_reported_not_refused(attempt):
    code, err = attempt("--prompt", "a red apple " * 9, "--steps", "1")
    assert code == 0
    assert "warning: prompt 2, BERT: 29 of at most 12 tokens, cut off: 'red apple a red apple" in err


def test_words_that_the_model_does_not_know_are_reported(attempt):
    code, err = attempt("--prompt", "a red zebra", "--steps", "1")
    assert code == 0
    assert "warning: prompt 2, BERT: 5 of at most 12 tokens, not in its vocabulary: zebra" in err


@pytest.fixture
def train(capfd, tmp_path):
    """Run the trainer's command line on a small run in tmp_path; gives the exit code and stderr."""
    config = write_run(tmp_path)

    def run(*arguments):
        code = train_main([str(config), *map(str, arguments)])
        _, err = capfd.readouterr()
        assert "Traceback" not in err
        return code, err

    return run


ONE_STEP = ("--set", "run.steps=1", "--set", "run.grad_accumulation=1", "--set", "schedule.warmup_steps=0")


def test_training_without_a_caption(train, tmp_path):
    (tmp_path / "pictures" / "3.txt").unlink()
    code, err = train(*ONE_STEP)
    assert code == 2 and err.startswith("error: ")
    assert str(tmp_path / "pictures" / "3.png") in err and "caption" in err
    assert "allow_missing_captions" in err
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert train(*ONE_STEP, "--set", "data.allow_missing_captions=true")[0] == 0
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_training_on_an_unreadable_picture(train, tmp_path):
    (tmp_path / "pictures" / "3.png").write_bytes(b"no picture")
    code, err = train(*ONE_STEP)
    assert code == 2 and err.startswith("error: ")
    assert str(tmp_path / "pictures" / "3.png") in err and "on_unreadable" in err
    assert train(*ONE_STEP, "--set", "data.on_unreadable=skip")[0] == 0


def test_training_with_an_unknown_key(train, tmp_path):
    code, err = train("--set", "run.step=5")
    assert code == 2 and err.startswith("error: ") and str(tmp_path / "train.toml") in err
    assert "run.step: unknown key; did you mean steps?" in err
    assert not (tmp_path / "run").exists()


def test_training_into_a_place_that_cannot_be_written(train, tmp_path):
    (tmp_path / "file").write_text("")
    code, err = train(*ONE_STEP, "--set", f"run.output_dir={tmp_path / 'file' / 'run'}")
    assert code == 2 and err.startswith("error: run.output_dir: cannot write to ")


@pytest.mark.parametrize(
    "option", ["--model", "--vae", "--text-encoders", "--lora", "--init-image", "--prompts"]
)
def test_names_that_no_system_takes(option, attempt):
    """Too long ones, whatever asks the operating system first."""
    code, err = attempt(option, "a" * 5000)
    assert code == 2 and err.startswith("error: ") and "too long" in err


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_who_reads_the_output_may_stop():
    code = (
        "import sys\nfrom hydit_core.errors import cli_main\n"
        "def run():\n    for number in range(10**6):\n        print(number)\n"
        "sys.exit(cli_main(run))"
    )
    command = f"'{sys.executable}' -c '{code}' | head -n 2"
    run = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert run.stdout == "0\n1\n" and run.stderr == ""
