"""A training run in a folder: eight small pictures, a tiny fresh model, and its configuration file."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_commands
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tiny import bert_vocab, spiece_model

from hydit_core.train.config import load_config
from hydit_core.train.launch import train
from hydit_core.weights.vae_layout import diffusers_to_ldm

ROOT = Path(__file__).resolve().parents[2]
PICTURES = {
    "a red apple": "red",
    "a green car": "green",
    "two small birds": "orange",
    "blue heart": "blue",
    "红苹果": "darkred",
    "小鸟": "gray",
    "cat": "yellow",
    "dog tree": "brown",
}

CONFIG = """
[model]
vae = "vae.safetensors"
[model.from_scratch]
hidden_size = 64
depth = 4
num_heads = 4
mlp_hidden = 128
text_dim = 32
text_len = 12
t5_dim = 32
t5_len = 16
t5_hidden = 64
pooled_dim = 32
[model.text_encoders]
vocab = "vocab.txt"
spiece = "spiece.model"
bert = { hidden_size = 32, num_hidden_layers = 1, num_attention_heads = 2, intermediate_size = 64 }
t5 = { d_model = 32, d_kv = 16, d_ff = 64, num_layers = 1, num_heads = 2 }
[model.info.defaults]
width = 64
height = 64

[data]
sources = [{ path = "pictures" }]
resolution = 64
validation = 2

[objective]
train_text_encoders = true
timesteps = "stratified"
dropout_joint = 0.2
noise_offset = 0.1

[optimizer]
lr = 1e-3
weight_decay = 0.01

[schedule]
kind = "cosine"
warmup_steps = 13

[ema]
decay = 0.95

[run]
output_dir = "run"
steps = 20
batch_size = 2
grad_accumulation = 2
threads = 1
device = "cpu"

[checkpoint]
every = 1000

[metrics]
every = 1
tensorboard = false
"""

SHORT_RUN = """
[run]
output_dir = "run"
steps = 3
batch_size = 2
threads = 1
device = "cpu"
[ema]
enabled = false
[metrics]
every = 1
tensorboard = false
"""
"""The tables of a run of three steps that have nothing to do with what is trained."""


def write_run(folder: Path) -> Path:
    """Fill ``folder`` and return the configuration. Six pictures train (1.5 steps an epoch), two do not."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    for index, (caption, color) in enumerate(PICTURES.items()):
        image = Image.new("RGB", (72, 64), "white")
        ImageDraw.Draw(image).ellipse((8, 8, 40 + 3 * index, 56), fill=color)
        image.save(pictures / f"{index}.png")
        (pictures / f"{index}.txt").write_text(caption, encoding="utf-8")
    (folder / "vocab.txt").write_bytes(bert_vocab())
    (folder / "spiece.model").write_bytes(spiece_model())
    save_file(diffusers_to_ldm(tiny_vae().state_dict()), folder / "vae.safetensors")
    path = folder / "train.toml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def run_training(config: Path, *overrides: str, **options: Any) -> bool:
    """A run in this process; True if it reached its last step."""
    return train(load_config(config, list(overrides)), **options)


MEASURED = ("seconds", "data_wait", "data_share", "save_stall", "rss_mib", "device_peak_mib")
"""What no two runs have in common."""


def records(folder: Path, *, without: tuple[str, ...] = MEASURED) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in without} for line in lines]


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=4,
    )


def needs_muon(value: str) -> Any:
    """A parameter that is skipped where torch has no Muon."""
    marks = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")
    return pytest.param(value, marks=marks)


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def command_line(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``python -m hydit_core.train`` in a process of its own."""
    return warm_commands.start("-m", "hydit_core.train", *arguments, cwd=cwd).wait()
