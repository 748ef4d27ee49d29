"""``train import``: settings of other trainers as a configuration that holds no wrong value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomllib
from PIL import Image
from train_setup import command_line

from hydit_core.errors import ConfigError
from hydit_core.train.config import load_config
from hydit_core.train.importing.command import convert, main

KOHYA = """
[model_arguments]
pretrained_model_name_or_path = "models/HunyuanDiT-v1.2"
v2 = false
[additional_network_arguments]
network_module = "lycoris.kohya"
network_dim = 16
network_alpha = 8
network_args = ["algo=lokr", "factor=8", "decompose_both=True", "conv_dim=4", "preset=full", "oddity=3"]
text_encoder_lr = 5e-5
[optimizer_arguments]
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.05", "betas=0.9,0.95"]
learning_rate = 2e-4
lr_scheduler = "cosine_with_restarts"
lr_warmup_steps = 0.1
min_snr_gamma = 5.0
[dataset_arguments]
dataset_config = "dataset.toml"
cache_latents = true
[training_arguments]
output_dir = "out"
output_name = "cat"
max_train_epochs = 10
save_every_n_epochs = 2
gradient_checkpointing = true
mixed_precision = "fp16"
save_precision = "fp16"
seed = 42
clip_skip = 2
xformers = true
wandb_api_key = "hush"
"""
DATASET = """
[general]
shuffle_caption = true
caption_extension = ".txt"
flip_aug = true
[[datasets]]
resolution = 768
batch_size = 2
enable_bucket = true
min_bucket_reso = 256
max_bucket_reso = 1024
bucket_reso_steps = 64
[[datasets.subsets]]
image_dir = "cats"
num_repeats = 5
class_tokens = "ohwx cat"
[[datasets.subsets]]
image_dir = "others"
is_reg = true
"""
ONETRAINER: dict[str, Any] = {
    "__version": 6,
    "training_method": "LORA",
    "model_type": "STABLE_DIFFUSION_XL_10_BASE",
    "workspace_dir": "workspace/cat",
    "base_model_name": "models/hydit.safetensors",
    "concepts": [
        {"path": "cats", "enabled": True, "balancing": 3.0, "image": {"enable_random_flip": True}},
        {"path": "off", "enabled": False},
        {"path": "held", "type": "VALIDATION", "text": {"prompt_source": "filename"}},
    ],
    "learning_rate": 0.0003,
    "learning_rate_scheduler": "COSINE",
    "learning_rate_warmup_steps": 200.0,
    "epochs": 20,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": "ON",
    "train_dtype": "BFLOAT_16",
    "output_dtype": "FLOAT_32",
    "ema": "OFF",
    "resolution": "512",
    "optimizer": {"optimizer": "PRODIGY", "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-08},
    "peft_type": "LOHA",
    "lora_rank": 8,
    "lora_alpha": 4.0,
    "text_encoder": {"train": True, "learning_rate": 1e-5},
    "loss_weight_fn": "MIN_SNR_GAMMA",
    "loss_weight_strength": 5.0,
    "masked_training": True,
    "secrets": {"huggingface_token": "hush"},
    "save_every": 2,
    "save_every_unit": "EPOCH",
    "seed": 7,
    "unheard_of": 3,
}
TOOLKIT = """
job: extension
config:
  name: cat
  process:
    - type: sd_trainer
      training_folder: output
      device: cuda:0
      trigger_word: ohwx
      network: {type: lokr, linear: 32, linear_alpha: 16, lokr_factor: 8, lokr_full_rank: true, conv: 16}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4, push_to_hub: false}
      datasets:
        - folder_path: cats
          caption_ext: txt
          caption_dropout_rate: 0.05
          shuffle_tokens: true
          cache_latents_to_disk: true
          resolution: [512, 768, 1024]
      train:
        batch_size: 1
        steps: 2000
        gradient_accumulation_steps: 2
        gradient_checkpointing: true
        noise_scheduler: flowmatch
        optimizer: adamw8bit
        lr: 1e-4
        dtype: bf16
        ema_config: {use_ema: true, ema_decay: 0.99}
      model: {name_or_path: models/hydit, quantize: true}
      sample: {sample_every: 250, width: 1024, height: 1024, prompts: ["[trigger] on a chair"], seed: 42,
               guidance_scale: 6, sample_steps: 25}
"""


def pictures(folder: Path, count: int) -> None:
    folder.mkdir()
    for index in range(count):
        Image.new("RGB", (8, 8)).save(folder / f"{index}.png")


def converted(path: Path) -> tuple[dict[str, Any], str]:
    """The tables and the notes; the trainer takes what is written."""
    found = convert(path)
    written = path.parent / "converted.toml"
    written.write_text(found.toml, encoding="utf-8")
    load_config(written)
    return tomllib.loads(found.toml), "\n".join(found.notes)


def test_kohyas_scripts(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(KOHYA)
    (tmp_path / "dataset.toml").write_text(DATASET)
    pictures(tmp_path / "cats", 4)
    tables, notes = converted(tmp_path / "config.toml")
    assert tables["model"] == {"init_from": "models/HunyuanDiT-v1.2"}
    assert tables["run"] == {
        "output_dir": "out/cat",
        "batch_size": 2,
        "steps": 100,  # 10 epochs of 4 pictures x 5 / 2
        "precision": "bf16",
        "gradient_checkpointing": True,
        "seed": 42,
    }
    assert tables["checkpoint"] == {"export_dtype": "fp16", "every": 20}
    assert tables["data"]["sources"] == [
        {"path": "cats", "repeats": 5, "caption": "ohwx cat"},
        {"path": "others", "prior": True},
    ]
    assert (tables["data"]["resolution"], tables["data"]["flip"]) == (768, 0.5)
    assert tables["data"]["buckets"] == {"enabled": True, "min_side": 256, "max_side": 1024, "step": 64}
    assert tables["lora"] == {
        "kind": "lokr",
        "rank": 16,
        "alpha": 8,
        "factor": 8,
        "decompose_both": True,
        "train_bert": True,
    }
    assert tables["optimizer"] == {
        "name": "adamw_8bit",
        "lr": 2e-4,
        "weight_decay": 0.05,
        "betas": [0.9, 0.95],
        "groups": [{"match": "bert.*", "lr_scale": 0.25}],
    }
    assert tables["schedule"] == {"kind": "cosine", "warmup_steps": 10}
    assert tables["objective"] == {"kind": "lora", "weighting": "min_snr_v", "snr_gamma": 5}
    for line in (
        "clip_skip = 2:",
        "shuffle_caption = True:",
        "conv_dim = 4:",
        "preset = full:",
        "oddity = 3: unk",
    ):
        assert line in notes
    assert "xformers" not in notes and "hush" not in convert(tmp_path / "config.toml").toml
    assert "# optimizer_type = AdamW8bit" in convert(tmp_path / "config.toml").toml


def test_kohyas_gui_and_a_dataset_file_alone(tmp_path: Path) -> None:
    pictures(tmp_path / "cats", 1)
    for name, count in (("10_ohwx cat", 3), ("log", 0)):
        pictures(tmp_path / "cats" / name, count)
    gui = {
        "LoRA_type": "LyCORIS/LoKr",
        "pretrained_model_name_or_path": "hydit",
        "train_data_dir": "cats",
        "output_dir": "out",
        "network_dim": 10000,
        "network_alpha": "1",
        "factor": 4,
        "optimizer": "Prodigy",
        "learning_rate": "1.0",
        "lr_warmup": 10,
        "epoch": 4,
        "train_batch_size": "1",
        "max_resolution": "512,512",
        "seed": "",
    }
    (tmp_path / "gui.json").write_text(json.dumps(gui))
    tables, _ = converted(tmp_path / "gui.json")
    assert tables["lora"] == {"kind": "lokr", "full_matrix": True, "factor": 4}
    assert tables["data"]["sources"] == [{"path": "cats/10_ohwx cat", "repeats": 10, "caption": "ohwx cat"}]
    assert (tables["run"]["steps"], tables["schedule"]["warmup_steps"]) == (120, 12)
    assert tables["optimizer"] == {"name": "prodigy", "lr": 1}
    (tmp_path / "dataset.toml").write_text(DATASET)
    tables, _ = converted(tmp_path / "dataset.toml")
    assert tables["model"]["init_from"] == "MODEL" and len(tables["data"]["sources"]) == 2


def test_onetrainer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(ONETRAINER))
    pictures(tmp_path / "cats", 8)
    pictures(tmp_path / "held", 2)
    tables, notes = converted(tmp_path / "config.json")
    assert tables["lora"] == {"kind": "loha", "rank": 8, "alpha": 4, "train_bert": True}
    assert tables["data"]["sources"] == [
        {"path": "cats", "repeats": 3},
        {"path": "held", "validation": True},
    ]
    assert tables["optimizer"] == {
        **{"name": "prodigy", "weight_decay": 0.01, "eps": 1e-8, "betas": [0.9, 0.99], "lr": 3e-4}
    }
    assert (tables["run"]["precision"], tables["run"]["gradient_checkpointing"]) == ("bf16", True)
    assert tables["ema"] == {"enabled": False} and tables["checkpoint"]["export_dtype"] == "fp32"
    assert tables["run"]["steps"] == 120  # the held pictures do not count: 20 x 24 / 4
    for line in (
        "masked_training = True:",
        "unheard_of = 3: unknown",
        "prodigy finds one for all",
        "not from its",
    ):
        assert line in notes, notes
    assert "hush" not in convert(tmp_path / "config.json").toml


def test_ai_toolkit(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(TOOLKIT)
    tables, notes = converted(tmp_path / "job.yaml")
    assert tables["lora"] == {
        **{"trigger": "ohwx", "kind": "lokr", "full_matrix": True, "factor": 8, "base_precision": "int8"}
    }
    assert tables["run"]["output_dir"] == "output/cat" and tables["run"]["grad_accumulation"] == 2
    assert tables["optimizer"] == {"name": "adamw_8bit", "lr": 1e-4}
    assert tables["ema"] == {"enabled": True, "decay": 0.99}
    assert tables["samples"]["prompts"] == ["ohwx on a chair"] and tables["samples"]["cfg"] == 6
    assert tables["data"]["sources"] == [{"path": "cats", "trigger": "ohwx"}]
    assert (
        "noise_scheduler = flowmatch" in notes and "shuffle_tokens" in notes and "network.conv = 16" in notes
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("network_dim", -3),
        ("network_dim", "many"),
        ("network_dim", 1.5),
        ("learning_rate", 1e9),
        ("learning_rate", True),
        ("seed", -1),
        ("resolution", "17"),
        ("min_bucket_reso", 100),
        ("optimizer_type", "Sophia"),
        ("lr_scheduler", ["x"]),
        ("network_args", 3),
        ("network_args", ["no"]),
        ("max_train_steps", 10**30),
        ("output_dir", "a\nb"),
        ("caption_dropout_rate", 7),
        ("network_alpha", {"a": 1}),
    ],
)
def test_values_are_not_believed(tmp_path: Path, name: str, value: Any) -> None:
    """What is wrong is left out and told, whichever option it is; the rest stays."""
    settings = {"pretrained_model_name_or_path": "x", "network_dim": 4, "train_batch_size": 3, name: value}
    (tmp_path / "a.json").write_text(json.dumps(settings))
    tables, notes = converted(tmp_path / "a.json")
    assert tables["run"]["batch_size"] == 3 and tables["model"]["init_from"] == "x"
    assert name.partition("_")[0] in notes or name in notes, notes


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "a.json"),
        ("a.json", "[1]", "a.json"),
        ("a.json", '{"a": 1}', "no settings of kohya's sd-scripts, .* begins with a"),
        ("a.toml", "[run]\nsteps = 1", "no settings of kohya's"),
        ("a.toml", "= 3", "a.toml"),
        ("a.ini", "x", r"expected settings as \.toml, \.json or \.yaml"),
        ("a.yaml", "a: [", "a.yaml is no YAML"),
        ("a.yaml", "- 1", "expected a table"),
        ("a.yaml", "a: &x [1]\nb: *x", "anchors and aliases are not read"),
        ("a.yaml", "a: !!python/object/apply:os.system ['x']", "is no YAML"),
        ("a.yaml", "job: x\nconfig: {process: 3}", "expected a list with the settings"),
        ("a.json", '{"training_method": "EMBEDDING", "base_model_name": "x"}', "LORA and FINE_TUNE"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path / name)
    with pytest.raises(ConfigError):
        convert(tmp_path / "missing.toml")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_text(TOOLKIT)
    out = tmp_path / "own.toml"
    command = ["import", tmp_path / "job.yaml", "--out", out]
    done = command_line(*command)
    assert done.returncode == 0 and f"written to {out}" in done.stdout and "note: " in done.stdout, (
        done.stderr
    )
    before = out.read_text("utf-8")
    out.write_text("[run]")
    again = command_line(*command)
    assert again.returncode == 2 and again.stderr.startswith("error: ") and out.read_text("utf-8") == "[run]"
    assert main([str(tmp_path / "job.yaml")]) == 0 and capsys.readouterr().out == before
