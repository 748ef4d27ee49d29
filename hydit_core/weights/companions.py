"""The text encoders, tokenizers and VAE that stand beside the transformer in a published folder."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import facts
from ..errors import ConfigError, WeightsError
from ..facts import ModelInfo
from ..untrusted import read_bytes, read_json
from . import vae_layout
from .detect import expect
from .files import has_weights, open_tensors
from .save import other_parts
from .source import MemorySource, TensorSource
from .views import rename

# diffusers' names, then Tencent's (t2i/).
FOLDERS = {
    "bert": ("text_encoder", "clip_text_encoder"),
    "t5": ("text_encoder_2", "mt5"),
    "vae": ("vae", "sdxl-vae-fp16-fix"),
}
"""Where the folders that are published keep each part, the transformer apart."""
# What an encoder's file may hold that this model does not use: heads, a decoder, buffers, a tokenizer.
_SURPLUS = {
    "bert": re.compile(
        r"(^|\.)((pooler|cls|classifier|qa_outputs|lm_head|text_projection|visual\w*)\."
        r"|(position_ids|token_type_ids|logit_scale|text_projection|vocab)$)"
    ),
    "t5": re.compile(
        r"(^|\.)((decoder|lm_head|classification_head|qa_outputs|classifier)\."
        r"|(final_logits_bias|logit_scale|spiece_model)$)"
    ),
}
# How such a file says what it describes.
_MARKS = {"bert": "bert", "t5": "t5", "vae": "autoencoder"}
_TOKENIZER = "tokenizer_config.json"
_SPIECE = ("tokenizer_2/spiece.model", "mt5/spiece.model")


@dataclass(frozen=True)
class Companions:
    """Sources under the names of an all-in-one checkpoint, and what their config.json files say."""

    sources: list[TensorSource] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    bert: dict[str, Any] = field(default_factory=dict)
    t5: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)

    def complete(self, info: ModelInfo) -> ModelInfo:
        """``info`` with what these parts' shapes do not tell."""
        return replace(
            info,
            bert={**self.bert, **info.bert},
            t5={**self.t5, **info.t5},
            vae={**self.vae, **info.vae},
        )


def companions(folder: Path, only: Collection[str] = tuple(FOLDERS)) -> Companions:
    """Look in a diffusers pipeline's folder or Tencent's ``t2i`` (or the one above it); may find nothing.

    Args:
        only: which parts to look for: ``bert``, ``t5`` (each with its tokenizer), ``vae``.

    Raises:
        WeightsError: if a part's folder holds something else.
    """
    root = folder / "t2i" if (folder / "t2i").is_dir() else folder
    bert, mt5, vae = (_weights_folder(root, FOLDERS[part]) if part in only else None for part in FOLDERS)
    vocab = vocabulary(root / "tokenizer") if "bert" in only else None
    spiece = _content(root, _SPIECE) if "t5" in only else None
    named = {"BERT": bert, "mT5": mt5, "VAE": vae, "BERT's vocabulary": vocab, "mT5's tokenizer": spiece}
    return Companions(
        sources=other_parts(
            bert=bert_part(open_tensors(bert)) if bert else None,
            t5=mt5_part(open_tensors(mt5)) if mt5 else None,
            vae=vae_part(open_tensors(vae), _options("vae", vae)) if vae else None,
            bert_vocab=vocab,
            spiece_model=spiece,
        ),
        found=[name for name, part in named.items() if part is not None],
        bert={
            **_options("bert", bert),
            **(_options("bert", root / "tokenizer", _TOKENIZER) if "bert" in only else {}),
        },
        t5=_options("t5", mt5),
        vae=_options("vae", vae),
    )


def options_beside(source: TensorSource, part: str) -> Companions:
    """What a config.json beside a part's file, or in its folder, says, if it is about such a part."""
    folder = source.path if source.path.is_dir() else source.path.parent
    says = _config(folder, "model_type", "_class_name")
    if not any(_MARKS[part] in str(value).lower() for value in says.values()):
        return Companions()
    options = {part: _options(part, folder)}
    return Companions(bert=options.get("bert", {}), t5=options.get("t5", {}), vae=options.get("vae", {}))


def vocabulary(folder: Path) -> bytes | None:
    """The text of BERT's ``vocab.txt`` in a tokenizer's folder; None without one.

    Raises:
        WeightsError: if a ``tokenizer.json`` there is damaged.
    """
    if (folder / "vocab.txt").is_file():
        return read_bytes(folder / "vocab.txt")
    # transformers 5 writes the vocabulary into tokenizer.json only.
    model = _config(folder, "model", file_name="tokenizer.json").get("model")
    if not isinstance(model, dict) or model.get("type") != "WordPiece":
        return None
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(type(number) is int for number in vocab.values()):
        raise WeightsError(f"{folder / 'tokenizer.json'}: its vocabulary is no object of words and numbers")
    return "\n".join(sorted(vocab, key=vocab.__getitem__)).encode()


def _weights_folder(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if has_weights(root / name)), None)


def _content(root: Path, names: tuple[str, ...]) -> bytes | None:
    return next((read_bytes(root / name) for name in names if (root / name).is_file()), None)


def _config(folder: Path | None, *names: str, file_name: str = "config.json") -> dict[str, Any]:
    """Some fields of a folder's config.json."""
    file = folder / file_name if folder else None
    if file is None or not file.is_file():
        return {}
    values = read_json(file)
    return {name: values[name] for name in names if values.get(name) is not None}


def _options(part: str, folder: Path | None, file_name: str = "config.json") -> dict[str, Any]:
    """Those fields of a folder's config.json that shapes do not tell, as hydit.config keeps them."""
    values = _config(folder, *facts.RULES[part], file_name=file_name)
    try:
        facts.check(part, values)
    except ConfigError as error:
        assert folder is not None  # there are values
        raise WeightsError(f"{folder / file_name}: {error}") from None
    return values


def check_rest(source: TensorSource, part: str, used: Collection[str]) -> None:
    """Whether all that a text encoder's file holds beside the ``used`` names is known to be of no use.

    Raises:
        WeightsError: there are other tensors, which may change what those that are used mean.
    """
    rest = [key for key in source if key not in used and not _SURPLUS[part].search(key)]
    if rest:
        label = {"bert": "BERT", "t5": "mT5's encoder"}[part]
        more = f" and {len(rest) - 5} more" if len(rest) > 5 else ""
        raise WeightsError(
            f"{source.path}: {label} has no place for {len(rest)} tensors: {', '.join(rest[:5])}{more}"
        )


def bert_part(source: TensorSource) -> TensorSource:
    """A file of BERT alone, under the names of transformers' BertModel.

    Raises:
        WeightsError: if the file is something else.
    """
    prefix = expect(source, "bert").prefix
    wanted = ("embeddings.", "encoder.")  # not the pooler, which this model does not use

    def name(key: str) -> str | None:
        short = key.removeprefix(prefix)
        inside = key.startswith(prefix) and short.startswith(wanted)
        return short if inside and not short.endswith("position_ids") else None

    check_rest(source, "bert", {key for key in source if name(key)})
    return rename(source, name)


def mt5_part(source: TensorSource) -> TensorSource:
    """A file of mT5 alone, under the names of transformers' MT5EncoderModel, the embedding once.

    Raises:
        WeightsError: if the file is something else.
    """
    prefix = expect(source, "t5").prefix
    embedding, copy = f"{prefix}shared.weight", f"{prefix}encoder.embed_tokens.weight"

    def name(key: str) -> str | None:
        if key == copy:
            return None if embedding in source else "shared.weight"
        short = key.removeprefix(prefix)
        return short if key.startswith(prefix) and short.startswith(("shared.", "encoder.")) else None

    check_rest(source, "t5", {copy, *(key for key in source if name(key))})
    return rename(source, name)


def vae_part(source: TensorSource, options: Mapping[str, Any]) -> TensorSource:
    """A file of a VAE alone, under LDM or TAESD names; ``options`` may hold a TAESD's scale and shift.

    Raises:
        WeightsError: if the file is something else.
    """
    expect(source, "vae")
    kind = vae_layout.detect_vae(source.keys())
    assert kind is not None  # expect() asked the same
    names: Mapping[str, str] = vae_layout.strip_vae_prefix(source.keys(), kind)
    # Views of a mapped file: nothing is read until it is written.
    tensors = {name: source.get(key) for name, key in names.items()}
    if kind.layout == "diffusers":
        if kind.architecture == "kl":
            tensors = vae_layout.diffusers_to_ldm(
                {vae_layout.undeprecate(name): tensor for name, tensor in tensors.items()}
            )
        else:
            vae_scale, vae_shift = vae_layout.taesd_scale(
                options.get("scaling_factor", 1.0), options.get("shift_factor", 0.0)
            )
            tensors = vae_layout.diffusers_to_taesd(tensors, vae_scale=vae_scale, vae_shift=vae_shift)
    return MemorySource(tensors, path=source.path)
