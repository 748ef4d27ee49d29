"""Writes the files beside it with the code of another commit; README.md tells how to call it."""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

DATA = """
[data]
sources = [{ path = "pictures" }]
resolution = 32
flip = 0.5
validation = 2
%s[data.cache]
dir = "cache"
latents = true
"""
RUN = """
[run]
output_dir = "runs/%s"
steps = 6
batch_size = 2
grad_accumulation = 2
seed = 4
threads = 1
device = "cpu"
[schedule]
kind = "cosine"
warmup_steps = 2
[ema]
decay = 0.9
[validation]
every = 3
[checkpoint]
every = 2
keep_last = 1
export_dtype = "fp32"
export_all_in_one = false
[metrics]
every = 1
tensorboard = false
"""
CONFIGS = {
    "full": """
[objective]
train_text_encoders = true
timesteps = "stratified"
dropout_joint = 0.2
noise_offset = 0.1
[optimizer]
lr = 1e-3
weight_decay = 0.01
""",
    "lora": """text = true
[objective]
kind = "lora"
dropout_joint = 0.1
[lora]
rank = 2
alpha = 4
targets = "attention+mlp"
trigger = "apple"
[optimizer]
lr = 1e-2
""",
    "controlnet": """text = true
[data.control]
kind = "canny"
[objective]
kind = "controlnet"
snr_gamma = 5.0
dropout_bert = 0.2
dropout_t5 = 0.2
[optimizer]
lr = 1e-2
""",
}
# All nodes that were in any.
WORKFLOWS = ("split_files", "lora_merge", "controlnet_layer_weights", "custom_sampling", "lora_strengths")
PICTURES = {
    "a red apple": "red",
    "a green car": "green",
    "two small birds": "orange",
    "blue heart": "blue",
    "红苹果": "darkred",
    "小鸟": "gray",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("code", type=Path, help="a checkout of the commit whose code is to write")
    parser.add_argument("out", type=Path, help="a new folder; its name stands in some of the files")
    args = parser.parse_args()
    code = args.code.resolve()
    sys.path[:0] = [str(code), str(code / "tests")]
    args.out.mkdir(parents=True)
    os.chdir(args.out)
    write_base(Path("base.safetensors"))
    write_pictures(Path("pictures"))
    for name, own in CONFIGS.items():
        posterior = "" if name == "full" else 'posterior = "mode"\n'  # not given: "sample" then
        text = f'[model]\ninit_from = "base.safetensors"\n{DATA % posterior}{own}{RUN % name}'
        Path(f"{name}.toml").write_text(text.replace("\n\n", "\n"), encoding="utf-8")
    commands = Commands(code)
    for name in CONFIGS:
        train(commands, name)
    write_weights(commands)
    draw(commands)
    for name in WORKFLOWS:
        for source, target in (("workflows", "workflows"), ("tests/workflows_api", "workflows/api")):
            Path(target).mkdir(parents=True, exist_ok=True)
            shutil.copy(code / source / f"hydit_{name}.json", target)


class Commands:
    """The commands of that code, in a process each."""

    def __init__(self, code: Path) -> None:
        self.environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}

    def __call__(self, module: str, *arguments: str, code: int = 0) -> None:
        command = [sys.executable, "-m", f"hydit_core.{module}", *arguments]
        done = subprocess.run(command, env=self.environment, check=False)
        if done.returncode != code:
            raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}")


def write_base(path: Path) -> None:
    """A random model in one file, as small as its parts allow."""
    import sentencepiece
    import torch
    from diffusers import AutoencoderKL
    from tiny import DEFAULTS, TEXT, bert_vocab, randomize
    from transformers import BertConfig, BertModel, MT5Config, MT5EncoderModel

    from hydit_core import DiT, DiTConfig, ModelInfo, save_checkpoint
    from hydit_core.weights.vae_layout import diffusers_to_ldm

    spiece = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 4),
        model_writer=spiece,
        vocab_size=90,
        hard_vocab_limit=False,
        normalization_rule_name="identity",  # the others' tables take 240 kB
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    config = DiTConfig(
        hidden_size=16,
        depth=4,
        num_heads=2,
        mlp_hidden=32,
        text_dim=16,
        text_len=12,
        t5_dim=16,
        t5_len=16,
        t5_hidden=64,
        pooled_dim=16,
        pooler_heads=8,
    )
    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=bert_vocab().count(b"\n"),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=spiece.getvalue()).get_piece_size()
    t5 = MT5Config(vocab_size=pieces, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),  # a norm has 32 groups
        layers_per_block=1,
        latent_channels=4,
    )
    save_checkpoint(
        path,
        dit=randomize(DiT(config), 1).state_dict(),
        bert=BertModel(bert, add_pooling_layer=False).state_dict(),
        t5=MT5EncoderModel(t5).state_dict(),
        vae=diffusers_to_ldm(vae.half().state_dict()),
        spiece_model=spiece.getvalue(),
        bert_vocab=bert_vocab(),
        info=ModelInfo(version="v1.2", pooler_heads=8, defaults=DEFAULTS, bert={"num_attention_heads": 2}),
    )


def write_pictures(folder: Path) -> None:
    from PIL import Image, ImageDraw

    folder.mkdir()
    for index, (caption, color) in enumerate(PICTURES.items()):
        image = Image.new("RGB", (40, 32), "white")
        ImageDraw.Draw(image).ellipse((4, 4, 20 + 3 * index, 28), fill=color)
        image.save(folder / f"{index}.png")
        os.utime(folder / f"{index}.png", (1_700_000_000, 1_700_000_000))  # younger ones are hashed anew
        (folder / f"{index}.txt").write_text(caption, encoding="utf-8")


def train(commands: Commands, name: str) -> None:
    """A run that is interrupted after two and a half of six steps, and what the rest of it measured."""
    config, run = f"{name}.toml", Path("runs", name)
    commands("train", config, "--stop-after-micro", "5", code=3)
    shutil.copytree(run, "rest")
    commands("train", config, "--set", "run.output_dir=rest", "--resume", "auto")
    shutil.move("rest/metrics.jsonl", f"runs/{name}-finished.jsonl")
    shutil.rmtree("rest")


def write_weights(commands: Commands) -> None:
    """The base converted; the LoRA in the one format that training does not write, and merged."""
    Path("converted").mkdir()
    Path("lora").mkdir()
    commands("weights", "convert", "base.safetensors", "converted/tencent.safetensors", "--layout", "tencent")
    commands("weights", "convert", "base.safetensors", "converted/diffusers", "--layout", "diffusers")
    trained = "runs/lora/lora.safetensors"
    commands("lora", "convert", trained, "lora/kohya.safetensors", "--format", "kohya")
    merged = ("lora/merged.safetensors", "--layout", "tencent", "--block-weights", "decay(0.9)")
    commands("lora", "merge", "base.safetensors", f"{trained}:0.8", *merged)


def draw(commands: Commands) -> None:
    """Pictures: of the base alone, with all that can be added to it, and of the embedded model."""
    common = ("--seed", "7", "--steps", "2", "--device", "cpu")
    base = ("--model", "base.safetensors", "--size", "64x64", *common)
    commands("generate", "--prompt", "红苹果", *base, "--out", "drawn/base.png")
    adapted = (
        *("--init-image", "pictures/3.png", "--strength", "0.7", "--negative", "a green car"),
        *("--lora", "runs/lora/lora.safetensors:0.8", "--lora-block-weights", "decay(0.9)"),
        *("--controlnet", "runs/controlnet/model.safetensors:0.5", "--control-image", "pictures/2.png"),
        *("--control-preprocess", "canny", "--control-end", "0.9"),
    )
    commands("generate", "--prompt", "a red apple", *base, *adapted, "--out", "drawn/adapted.png")
    commands("generate", "--prompt", "a red apple", *common, "--out", "drawn/embedded.png")


if __name__ == "__main__":
    main()
