"""What the writers of published kinds of files share."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tiny import TINY, bert_vocab, randomize
from torch import Tensor

Tensors = dict[str, Tensor]
Change = Callable[[Tensor], Tensor]
"""From a base's weight to the changed one, both in float64."""


class Written(NamedTuple):
    """A file or folder.

    Attributes:
        place: what a user names.
        tensors: of a DiT or ControlNet, under Tencent's names, as they must be read.
        changes: of a LoRA, by the weight's name behind its part (``dit.blocks.0.attn1.Wqkv.weight``).
        complete: there are text encoders and a VAE in it, too.
    """

    place: Path
    tensors: Tensors = {}
    changes: Mapping[str, Change] = {}
    complete: bool = False


class Kind(NamedTuple):
    """Attributes:
    role: ``model``, ``controlnet``, ``lora``, ``ip_adapter`` or ``vision``.
    says: what ``weights inspect`` calls it, a regular expression.
    write: puts one into a folder.
    """

    role: str
    says: str
    write: Callable[[Path], Written]


@functools.cache
def encoders(width: int = TINY.text_dim) -> tuple[Tensors, Tensors]:
    """BERT of a width and mT5 under transformers' names, in TINY's dimensions."""
    from transformers import BertConfig, BertModel, MT5Config, MT5EncoderModel

    bert = BertConfig(
        vocab_size=bert_vocab().count(b"\n"), hidden_size=width, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=TINY.text_len,
    )  # fmt: skip
    mt5 = MT5Config(vocab_size=100, d_model=TINY.t5_dim, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    found = []
    for seed, model in enumerate((BertModel(bert, add_pooling_layer=False), MT5EncoderModel(mt5))):
        state = randomize(model, seed).state_dict()
        found.append({key: value for key, value in state.items() if key != "encoder.embed_tokens.weight"})
    return found[0], found[1]


def write_shards(tensors: Tensors, path: Path) -> None:
    """Two files and their index, in the spelling of transformers and diffusers."""
    names = list(tensors)
    stem, suffix = path.name.split(".")
    where = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        name = f"{stem}-{number:05d}-of-00002.{suffix}"
        some = {key: tensors[key] for key in part}
        save_file(some, path.with_name(name)) if suffix == "safetensors" else torch.save(
            some, path.with_name(name)
        )
        where |= dict.fromkeys(part, name)
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_json(path.with_name(f"{path.name}.index.json"), index)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
