"""Finding a text encoder's tokenizer: in the encoder's file, then beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import WeightsError
from ..untrusted import read_bytes, read_json
from ..weights.beside import vocabulary
from ..weights.bundle import Bundle
from .dimensions import LOWERCASE

# Below the folder of an encoder's file, or below a model's folder; ".." for one encoder of a pipeline.
_VOCAB_FOLDERS = ("", "tokenizer", "t2i/tokenizer", "../tokenizer")
_SPIECE_FOLDERS = ("", "tokenizer_2", "mt5", "t2i/mt5", "../tokenizer_2")


class Vocabulary(NamedTuple):
    """BERT's ``vocab.txt``; ``lowercase`` is None if no file beside it says."""

    content: bytes
    lowercase: bool | None


def vocabulary_of(opened: Bundle, *given: Path, default: bytes | None = None) -> Vocabulary:
    """The vocabulary of an opened BERT: inside its file, else beside it.

    Args:
        given: where to look first: a ``vocab.txt``, its folder, or a model's folder.
        default: the vocabulary to use if none is found.

    Raises:
        WeightsError: it was not found; the error lists every place that was searched.
    """
    found = _vocabulary([place for path in given for place in _given_vocabulary(path)])
    if found is None and opened.bert_vocab is not None:
        return Vocabulary(opened.bert_vocab, None)
    beside = _beside(opened.path, ("vocab.txt",))
    folders = [_folder(opened.path) / name for name in _VOCAB_FOLDERS]
    if found := found or _vocabulary([*beside, *folders]):
        return found
    if default is not None:
        return Vocabulary(default, None)
    places = [*beside, *(folder / "vocab.txt" for folder in folders)]
    raise WeightsError(
        f"BERT's vocabulary was found neither {_in(given)}in {opened.path} nor beside it (looked for "
        f"{_shown(places, opened.path)}). Put the vocab.txt of HunyuanDiT's BERT tokenizer (t2i/tokenizer/ "
        f"in Tencent's repository, tokenizer/ in the diffusers one) into {_folder(opened.path)}"
    )


def spiece_of(opened: Bundle, *given: Path, after: Sequence[Path] = ()) -> bytes:
    """The sentencepiece model of an opened mT5: inside its file, else beside it.

    Args:
        given: where to look first: a ``spiece.model``, its folder, or a model's folder.
        after: folders to look in last.

    Raises:
        WeightsError: it was not found; the error lists every place that was searched.
    """
    content = _content([place for path in given for place in _given_spiece(path)]) or opened.spiece_model
    places = _beside(opened.path, ("spiece.model", "model"))
    places += [_folder(opened.path) / name / "spiece.model" for name in _SPIECE_FOLDERS]
    places += [folder / "spiece.model" for folder in after]
    if content := content or _content(places):
        return content
    raise WeightsError(
        f"mT5's tokenizer was found neither {_in(given)}in {opened.path} nor beside it (looked for "
        f"{_shown(places, opened.path)}). Put the spiece.model of google/mt5-xl (t2i/mt5/ in Tencent's "
        f"repository, tokenizer_2/ in the diffusers one) into {_folder(opened.path)}"
    )


def _given_vocabulary(path: Path) -> list[Path]:
    if path.is_file():
        return [] if path.suffix == ".model" else [path]
    return [path / name for name in _VOCAB_FOLDERS]


def _given_spiece(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == ".model" else []
    return [path / name / "spiece.model" for name in _SPIECE_FOLDERS]


def _beside(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files that share the name of an encoder's file."""
    return [] if path.is_dir() else [path.with_name(f"{path.stem}.{suffix}") for suffix in suffixes]


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _vocabulary(places: Sequence[Path]) -> Vocabulary | None:
    for place in places:
        if place.is_file():
            return Vocabulary(read_bytes(place), _lowercase(place.parent))
        if (content := vocabulary(place)) is not None:
            return Vocabulary(content, _lowercase(place))
    return None


def _content(places: Sequence[Path]) -> bytes | None:
    return next((read_bytes(place) for place in places if place.is_file()), None)


def _lowercase(folder: Path) -> bool | None:
    """Whether the tokenizer's own settings say that its vocabulary is lower-case; None if they do not say."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return None
    values = read_json(file)
    return bool(values[LOWERCASE]) if LOWERCASE in values else None


def _in(given: Sequence[Path]) -> str:
    return "".join(f"in {path}, " for path in given)


def _shown(places: Sequence[Path], path: Path) -> str:
    """The places as text; those in the encoder's folder relative to it."""
    folder = _folder(path)
    names = (place.relative_to(folder) if place.is_relative_to(folder) else place for place in places)
    return ", ".join(dict.fromkeys(name.as_posix() for name in names))
