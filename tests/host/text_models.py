"""Small random text encoders from transformers, and the files in which people have them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from transformers import BertConfig, BertModel, MT5Config, MT5EncoderModel

from hydit_core.embedded import embedded_model
from hydit_core.facts import METADATA_KEY, ModelInfo
from hydit_core.weights.bundle import bundle

_EMBEDDED = bundle(embedded_model())
assert _EMBEDDED.bert_vocab is not None and _EMBEDDED.spiece_model is not None
#: The embedded model's tokenizers, of English and Chinese.
VOCAB: bytes = _EMBEDDED.bert_vocab
SPIECE: bytes = _EMBEDDED.spiece_model
BERT_ROWS = VOCAB.count(b"\n")
PIECES: int = SentencePieceProcessor(model_proto=SPIECE).get_piece_size()
#: mT5 has more rows than its tokenizer has pieces.
T5_ROWS = PIECES + 5

BERT = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
T5 = {"d_model": 64, "d_kv": 24, "d_ff": 80, "num_heads": 3, "num_layers": 2}
PUBLISHED_ROWS = 47020


def randomize(model: torch.nn.Module, seed: int, std: float) -> Any:
    """Random values everywhere; norms stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise + 1 if "norm" in name.lower() and name.endswith("weight") else noise)
    return model.requires_grad_(False).eval()


def bert_model(rows: int = BERT_ROWS, seed: int = 1, std: float = 0.3, **options: Any) -> BertModel:
    values = {"max_position_embeddings": 512, **BERT, **options}
    return randomize(BertModel(BertConfig(vocab_size=rows, **values), add_pooling_layer=False), seed, std)


def t5_model(rows: int = T5_ROWS, seed: int = 2, std: float = 0.3, **options: Any) -> MT5EncoderModel:
    return randomize(MT5EncoderModel(MT5Config(vocab_size=rows, **{**T5, **options})), seed, std)


def t5_tensors(model: MT5EncoderModel) -> dict[str, torch.Tensor]:
    tensors = dict(model.state_dict())
    tensors.pop("encoder.embed_tokens.weight", None)
    return tensors


def data(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def metadata(bert: BertModel, t5: MT5EncoderModel) -> dict[str, str]:
    """What the shapes do not tell of these two."""
    info = ModelInfo(
        "v1.2",
        bert={
            "num_attention_heads": bert.config.num_attention_heads,
            "layer_norm_eps": bert.config.layer_norm_eps,
        },
        t5={
            "relative_attention_max_distance": t5.config.relative_attention_max_distance,
            "feed_forward_proj": t5.config.feed_forward_proj,
            "layer_norm_epsilon": t5.config.layer_norm_epsilon,
        },
    )
    return {METADATA_KEY: info.to_json()}


def all_in_one(
    bert: BertModel, t5: MT5EncoderModel, *, vocab: bytes | None = VOCAB, spiece: bytes | None = SPIECE
) -> dict[str, torch.Tensor]:
    """Both encoders and their tokenizers under the names of a ComfyUI checkpoint."""
    tensors = {f"text_encoders.hydit_clip.transformer.bert.{k}": v for k, v in bert.state_dict().items()}
    tensors |= {f"text_encoders.mt5xl.transformer.{k}": v for k, v in t5_tensors(t5).items()}
    if vocab is not None:
        tensors["text_encoders.hydit_clip.vocab"] = data(vocab)
    if spiece is not None:
        tensors["text_encoders.mt5xl.spiece_model"] = data(spiece)
    return tensors


def write(path: Path, tensors: Mapping[str, torch.Tensor], info: Mapping[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata=dict(info or {}) or None
    )
    return path


def write_tokenizers(bert: Path, t5: Path) -> None:
    """The tokenizers' files as in a published folder."""
    bert.mkdir(parents=True, exist_ok=True)
    t5.mkdir(parents=True, exist_ok=True)
    (bert / "vocab.txt").write_bytes(VOCAB)
    (bert / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}), encoding="utf-8")
    (t5 / "spiece.model").write_bytes(SPIECE)


def grown_spiece(pieces: int) -> bytes:
    """SPIECE with meaningless pieces at its end, as many as make ``pieces`` in all.

    (Protocol buffers are put together by appending: field 1 is one piece, of text (1), score (2).)
    """
    more = bytearray()
    for i in range(PIECES, pieces):
        text = f"\ue000{i}".encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + b"\x00\x00\xc8\xc2"  # score -100
        more += b"\x0a" + bytes([len(piece)]) + piece
    return SPIECE + bytes(more)


def write_published(bert: Path, mt5: Path) -> None:
    """Files of the published dimensions in float16 with small random weights, written piece by piece."""
    with torch.device("meta"):
        encoder = BertModel(
            BertConfig(
                vocab_size=PUBLISHED_ROWS,
                hidden_size=1024,
                num_hidden_layers=24,
                num_attention_heads=16,
                intermediate_size=4096,
            ),
            add_pooling_layer=False,
        )
        t5 = MT5EncoderModel(
            MT5Config(vocab_size=250112, d_model=2048, d_kv=64, d_ff=5120, num_heads=32, num_layers=24)
        )
    _stream(bert, {f"bert.{name}": tuple(value.shape) for name, value in encoder.state_dict().items()})
    _stream(mt5, {name: tuple(value.shape) for name, value in t5_tensors(t5).items()})


def _stream(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    block = (torch.randn(2**22, generator=torch.Generator().manual_seed(0)) * 0.02).half().numpy().tobytes()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            left = 2 * math.prod(shape)
            while left:
                left -= file.write(block[:left])
