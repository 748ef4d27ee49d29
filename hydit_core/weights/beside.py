"""The text encoders, tokenizers and VAE beside the transformer in a published folder."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import facts
from ..errors import ConfigError, WeightsError
from ..facts import ModelInfo
from ..untrusted import read_bytes, read_json
from .files import has_weights, open_tensors
from .save import other_parts
from .single import bert_part, mt5_part, vae_part
from .source import TensorSource

# diffusers' names, then Tencent's (t2i/).
FOLDERS = {
    "bert": ("text_encoder", "clip_text_encoder"),
    "t5": ("text_encoder_2", "mt5"),
    "vae": ("vae", "sdxl-vae-fp16-fix"),
}
"""Where published folders keep each part except the transformer."""
# The fields in which such a file says what it describes.
_MARKS = {"bert": "bert", "t5": "t5", "vae": "autoencoder"}
_TOKENIZER = "tokenizer_config.json"
_SPIECE = ("tokenizer_2/spiece.model", "mt5/spiece.model")


@dataclass(frozen=True)
class Beside:
    """What was found beside a model's file.

    Attributes:
        sources: their tensors, under the names of an all-in-one checkpoint.
        found: what they are, in words.
        options: by part, what its config.json says beyond the shapes.
        looked_for: the parts that were looked for.
    """

    sources: list[TensorSource] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    looked_for: tuple[str, ...] = ()

    def joined(self, other: Beside) -> Beside:
        """This, together with what was found of other parts."""
        return Beside(
            [*self.sources, *other.sources],
            [*self.found, *other.found],
            {**self.options, **other.options},
            (*self.looked_for, *other.looked_for),
        )

    def complete(self, info: ModelInfo) -> ModelInfo:
        """``info``, completed with what these parts' shapes do not tell."""
        said: dict[str, Any] = {}
        for part, options in self.options.items():
            said[part] = {**options, **getattr(info, part)}
        return replace(info, **said)


def look_beside(folder: Path, only: Collection[str] = tuple(FOLDERS)) -> Beside:
    """Look in a diffusers pipeline's folder or Tencent's ``t2i`` (or its parent); may find nothing.

    Args:
        only: which parts to look for: ``bert``, ``t5`` (each with its tokenizer), ``vae``.

    Raises:
        WeightsError: if a part's folder holds something else.
    """
    looked_for = tuple(part for part in FOLDERS if part in only)
    root = folder / "t2i" if (folder / "t2i").is_dir() else folder
    bert, mt5, vae = (_weights_folder(root, FOLDERS[part]) if part in only else None for part in FOLDERS)
    vocab = vocabulary(root / "tokenizer") if "bert" in only else None
    spiece = _content(root, _SPIECE) if "t5" in only else None
    options = {"bert": _options("bert", bert), "t5": _options("t5", mt5), "vae": _options("vae", vae)}
    if "bert" in only:
        options["bert"] |= _options("bert", root / "tokenizer", _TOKENIZER)
    named = {"BERT": bert, "mT5": mt5, "VAE": vae, "BERT's vocabulary": vocab, "mT5's tokenizer": spiece}
    return Beside(
        sources=other_parts(
            bert=bert_part(open_tensors(bert)) if bert else None,
            t5=mt5_part(open_tensors(mt5)) if mt5 else None,
            vae=vae_part(open_tensors(vae), options["vae"]) if vae else None,
            bert_vocab=vocab,
            spiece_model=spiece,
        ),
        found=[name for name, part in named.items() if part is not None],
        options={part: options[part] for part in looked_for},
        looked_for=looked_for,
    )


def options_beside(source: TensorSource, part: str) -> Beside:
    """What a config.json beside a part's file, or in its folder, says, if it describes such a part."""
    folder = source.path if source.path.is_dir() else source.path.parent
    says = _config(folder, "model_type", "_class_name")
    if not any(_MARKS[part] in str(value).lower() for value in says.values()):
        return Beside()
    return Beside(options={part: _options(part, folder)})


def vocabulary(folder: Path) -> bytes | None:
    """The text of BERT's ``vocab.txt`` in a tokenizer's folder; None without one.

    Raises:
        WeightsError: if a ``tokenizer.json`` there is damaged.
    """
    if (folder / "vocab.txt").is_file():
        return read_bytes(folder / "vocab.txt")
    # transformers 5 writes the vocabulary only into tokenizer.json.
    model = _config(folder, "model", file_name="tokenizer.json").get("model")
    if not isinstance(model, dict) or model.get("type") != "WordPiece":
        return None
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(type(number) is int for number in vocab.values()):
        raise WeightsError(f"{folder / 'tokenizer.json'}: its vocabulary does not map words to numbers")
    return "\n".join(sorted(vocab, key=vocab.__getitem__)).encode()


def pipeline_class(folder: Path) -> str:
    """What diffusers' ``model_index.json`` in a folder says that it is; "" without one."""
    return str(_config(folder, "_class_name", file_name="model_index.json").get("_class_name", ""))[:80]


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
    """The fields of a folder's config.json that shapes do not tell, named as in hydit.config."""
    values = _config(folder, *facts.RULES[part], file_name=file_name)
    try:
        facts.check(part, values)
    except ConfigError as error:
        assert folder is not None  # values come from a file in it
        raise WeightsError(f"{folder / file_name}: {error}") from None
    return values
