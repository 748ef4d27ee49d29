"""The embedded model in every form in which people have a HunyuanDiT on disk, and files of other kinds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from key_lists import key_list, sparse_safetensors
from safetensors.torch import load_file, save_file

from hydit_core.embedded import embedded_model
from hydit_core.weights.bundle import bundle
from hydit_core.weights.layouts import from_tencent

EMBEDDED = embedded_model()
NAME = f"[embedded] {EMBEDDED.stem}"
PARTS = bundle(EMBEDDED)
# Real names and shapes of other people's files, enough of them to be told apart.
SDXL = {
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": (1, 77),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
}
LORA = {
    "base_model.model.blocks.0.attn1.Wqkv.lora_A.weight": (8, 1408),
    "base_model.model.blocks.0.attn1.Wqkv.lora_B.weight": (4224, 8),
}
T5_V11 = {
    "shared.weight": (32128, 64),
    "encoder.block.0.layer.0.SelfAttention.q.weight": (64, 64),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 1),
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (64, 64),
    "encoder.block.0.layer.1.DenseReluDense.wo.weight": (64, 64),
}


def stored() -> dict[str, torch.Tensor]:
    """The embedded DiT's tensors as they stand in the file, without our own readers."""
    prefix = "model.diffusion_model."
    return {k.removeprefix(prefix): v for k, v in load_file(EMBEDDED).items() if k.startswith(prefix)}


def version() -> str:
    """What the loaders call the embedded DiT: by its width and number of blocks."""
    dit = stored()
    blocks = {key.split(".")[1] for key in dit if key.startswith("blocks.")}
    return f"HunyuanDiT-{len(dit['x_embedder.proj.bias'])}x{len(blocks)} v1.2"


def tensors(part: str) -> dict[str, torch.Tensor]:
    """A part's tensors: dit, bert, mt5 or vae."""
    return {key: value.clone() for key, value in dict(getattr(PARTS, part)).items()}


def write_all(models: Path) -> None:
    """Fill a models folder: all-in-one, DiT files, a pipeline's folder, Tencent's, split encoders."""
    for name in ("checkpoints/mine.safetensors", "checkpoints/sub/mine.safetensors"):
        _copy(models / name)
    dit = models / "diffusion_models" / "dit.safetensors"
    dit.parent.mkdir(parents=True, exist_ok=True)
    save_file(stored(), dit, metadata=dict(PARTS.metadata))
    write_pipeline(models / "diffusers" / "pipe")
    write_tencent(models / "checkpoints" / "tencent" / "t2i")
    write_encoders(models / "text_encoders")


def write_pipeline(folder: Path) -> None:
    """As diffusers keeps it."""
    info = PARTS.info
    assert info is not None and PARTS.dit and PARTS.bert_vocab and PARTS.spiece_model
    weights = {key: value.contiguous() for key, value in dict(from_tencent(PARTS.dit, "diffusers")).items()}
    (folder / "transformer").mkdir(parents=True)
    save_file(
        weights,
        folder / "transformer" / "diffusion_pytorch_model.safetensors",
        metadata=dict(PARTS.metadata),
    )
    _write(folder / "text_encoder", "model", tensors("bert"), {"model_type": "bert", **info.bert})
    _write(folder / "text_encoder_2", "model", tensors("mt5"), {"model_type": "mt5", **info.t5})
    config = {"_class_name": "AutoencoderKL", **info.vae}
    _write(folder / "vae", "diffusion_pytorch_model", tensors("vae"), config)
    for name, content in (
        ("tokenizer/vocab.txt", PARTS.bert_vocab),
        ("tokenizer_2/spiece.model", PARTS.spiece_model),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def write_tencent(folder: Path) -> None:
    """The DiT as Tencent keeps it: a torch file. It cannot say what shapes do not tell: 8 pooler heads."""
    (folder / "model").mkdir(parents=True)
    torch.save(stored(), folder / "model" / "pytorch_model_ema.pt")


def write_encoders(folder: Path) -> None:
    """Two files with their tokenizers beside them, and two folders as transformers writes them."""
    info = PARTS.info
    assert info is not None and PARTS.bert_vocab and PARTS.spiece_model
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors("bert"), folder / "bert.safetensors", metadata=dict(PARTS.metadata))
    save_file(tensors("mt5"), folder / "mt5.safetensors", metadata=dict(PARTS.metadata))
    (folder / "bert.vocab.txt").write_bytes(PARTS.bert_vocab)
    (folder / "mt5.spiece.model").write_bytes(PARTS.spiece_model)
    _write(folder / "bert-folder", "model", tensors("bert"), {"model_type": "bert", **info.bert})
    _write(folder / "mt5-folder", "model", tensors("mt5"), {"model_type": "mt5", **info.t5})
    (folder / "bert-folder" / "vocab.txt").write_bytes(PARTS.bert_vocab)
    (folder / "mt5-folder" / "spiece.model").write_bytes(PARTS.spiece_model)
    _write(folder / "no-tokenizer", "model", tensors("mt5"), {"model_type": "mt5", **info.t5})


def write_wrong(models: Path) -> None:
    """What the loaders must refuse."""
    checkpoints, encoders = models / "checkpoints", models / "text_encoders"
    sparse_safetensors(checkpoints / "sdxl.safetensors", SDXL)
    sparse_safetensors(checkpoints / "controlnet.safetensors", key_list("cn_v12"))
    sparse_safetensors(checkpoints / "lora.safetensors", LORA)
    sparse_safetensors(checkpoints / "v12.safetensors", key_list("g2_v12"))
    (checkpoints / "cut.safetensors").write_bytes(EMBEDDED.read_bytes()[: EMBEDDED.stat().st_size // 2])
    save_file(tensors("vae"), checkpoints / "vae.safetensors")
    whole = load_file(EMBEDDED)
    save_file(
        {k: v for k, v in whole.items() if not k.startswith("vae.")}, checkpoints / "no_vae.safetensors"
    )
    (models / "diffusers" / "empty").mkdir(parents=True)
    (encoders / "empty").mkdir(parents=True)
    sparse_safetensors(encoders / "t5xxl.safetensors", T5_V11)


def _copy(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(EMBEDDED, path)


def _write(folder: Path, name: str, content: dict[str, torch.Tensor], config: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(content, folder / f"{name}.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
