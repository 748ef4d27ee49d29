"""A place that holds a model or some of its parts: opened once, and handed on to all that need it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import torch

from ..errors import WeightsError
from ..facts import ModelInfo
from . import hub
from .beside import FOLDERS, Beside, look_beside, options_beside, pipeline_class
from .detect import (
    BERT_PREFIXES,
    MT5_PREFIXES,
    VAE_PREFIXES,
    FileKind,
    detect,
    require_kind,
    sets,
    tencent_view,
)
from .files import has_weights, open_tensors, refuse_other_formats
from .info import model_info
from .quantised import refuse_quantised
from .save import other_parts
from .single import bert_part, mt5_part, vae_part
from .source import MergedSource, TensorSource
from .views import rename, without_prefix

# Where published folders keep the transformer: diffusers' and Tencent's.
_MODEL_FOLDERS = ("", "transformer", "model", "t2i/model", "controlnet")
_BERT = tuple(f"{prefix}transformer.bert." for prefix in BERT_PREFIXES)
_MT5 = tuple(f"{prefix}transformer." for prefix in MT5_PREFIXES)


class Bundle:
    """What an open place holds; None for a part that it lacks, or that was not looked for.

    Each part can be loaded from it once, which frees the memory that the part's tensors took.

    Attributes:
        place: the path that was given, or that it was downloaded to.
        origin: its name on the hub, if it was given by that.
        load_key: which of several sets of weights was asked for.
        path: of the file, or of the folder if there are parts beside the model's file.
        source: the model's file under its own names; in a folder without one, the parts in it.
        metadata, kind: of ``source``.
        beside: what is beside the model's file.
        dit, controlnet: Tencent's names.
        bert: the names of transformers' BertModel (``embeddings.word_embeddings.weight`` ...).
        mt5: the names of transformers' MT5EncoderModel (``shared.weight``, ``encoder.block.0...``).
        spiece_model: the serialized sentencepiece model of mT5's tokenizer.
        bert_vocab: the text of BERT's ``vocab.txt``, in UTF-8.
        vae: LDM or TAESD names.
        info: what shapes do not tell. Without a DiT or ControlNet, its version and diffusion are v1.2's and
            mean nothing.

    Raises:
        WeightsError: its weights are quantised, or its metadata is impossible.
    """

    def __init__(
        self,
        source: TensorSource,
        kind: FileKind | None = None,
        beside: Beside | None = None,
        place: Path | None = None,
        origin: str = "",
        load_key: str | None = None,
    ) -> None:
        refuse_quantised(source)
        self.place = place or source.path
        self.origin = origin
        self.load_key = load_key
        self.source = source
        self.metadata = source.metadata
        self.kind = kind or detect(source)
        self.beside = beside or Beside()
        self.path = self.place if self.beside.sources else source.path
        self.info = self.beside.complete(_info(source, self.kind))
        places = [*_alone(source, self.kind, self.info), source]
        if self.beside.sources:
            others = MergedSource(self.beside.sources, path=self.path, metadata={})
            refuse_quantised(others)
            places.append(others)
        model = tencent_view(source, self.kind) if self.kind.kind in ("dit", "controlnet") else None
        self.dit: TensorSource | None = model if self.kind.kind == "dit" else None
        self.controlnet: TensorSource | None = model if self.kind.kind == "controlnet" else None
        self.bert = _part(places, _BERT)
        self.mt5 = _part(places, _MT5)
        if self.mt5 is not None and "shared.weight" in self.mt5:
            self.mt5 = rename(self.mt5, lambda key: None if key == "encoder.embed_tokens.weight" else key)
        # Without a prefix, as ComfyUI saves each text encoder in its own file.
        self.spiece_model = _bytes(places, tuple(f"{prefix}spiece_model" for prefix in (*MT5_PREFIXES, "")))
        self.bert_vocab = _bytes(places, tuple(f"{prefix}vocab" for prefix in (*BERT_PREFIXES, "")))
        self.vae = _part(places, VAE_PREFIXES)

    @property
    def sets(self) -> tuple[str, tuple[str, ...]]:
        """Of a torch file with several sets of weights the one that was taken, and the others."""
        return sets(self.metadata)


Place = str | os.PathLike[str] | Bundle
"""A model's place: a path, or what was opened there."""


def bundle(
    path: Place,
    *,
    only: Collection[str] = ("dit", *FOLDERS),
    kinds: Collection[str] = (),
    load_key: str | None = None,
) -> Bundle:
    """Open a place that holds a model or some of its parts; what is already open is not opened again.

    A file can be an all-in-one checkpoint, a DiT, one text encoder or a VAE. A folder can be that of such a
    file, or a diffusers pipeline's, Tencent's ``t2i`` or its parent, with what is beside the transformer.

    Args:
        only: the parts that are wanted: ``dit``, ``bert``, ``t5``, ``vae``, ``controlnet``. The folders of
            others are not searched.
        kinds: what the model's file must be, such as ``dit``; default: anything.
        load_key: which weights of a torch file with several sets.

    Raises:
        WeightsError: if no such thing is there, or it cannot be read.
    """
    if isinstance(path, Bundle):
        return _more(path, only, kinds)
    origin = hub.name(path)
    path = hub.local(path, only, load_key=load_key)
    source, kind = _own_source(path, only, load_key), None
    if kinds:
        if source is None:
            raise _no_model(path)
        kind = detect(source)
        require_kind(source, kind, *kinds)
    beside = look_beside(path, only) if path.is_dir() else Beside()
    if source is None and not beside.sources:
        raise _no_model(path) if "controlnet" in only else _nothing(path, only)
    if source is None:
        source = MergedSource(beside.sources, path=path, metadata={})
    return Bundle(source, kind, beside, path, origin, load_key)


def _more(opened: Bundle, only: Collection[str], kinds: Collection[str]) -> Bundle:
    """An open bundle, completed with parts beside it that were not looked for before."""
    if kinds:
        require_kind(opened.source, opened.kind, *kinds)
    more = [part for part in FOLDERS if part in only and part not in opened.beside.looked_for]
    if not more or not opened.place.is_dir():
        return opened
    if opened.origin:
        hub.local(opened.origin, more)
    beside = opened.beside.joined(look_beside(opened.place, more))
    return Bundle(opened.source, opened.kind, beside, opened.place, opened.origin, opened.load_key)


def open_model(path: str | os.PathLike[str], *, load_key: str | None = None) -> TensorSource:
    """Open only the file of a DiT or ControlNet: itself, or in its own, a diffusers or Tencent's folder.

    Raises:
        WeightsError: if nothing is there or it cannot be read.
    """
    path = hub.local(path, ("dit",), load_key=load_key)
    source = _own_source(path, ("dit",), load_key)
    if source is None:
        raise _no_model(path)
    return source


def _own_source(path: Path, only: Collection[str], load_key: str | None) -> TensorSource | None:
    """The file, or the one in a folder itself or in its transformer's folder."""
    if not path.is_dir():
        return open_tensors(path, load_key=load_key)
    names: tuple[str, ...] = _MODEL_FOLDERS if "dit" in only else ("",)
    if "controlnet" in only:  # takes precedence over the DiT beside it
        names = ("controlnet", *_MODEL_FOLDERS)
    return next(
        (open_tensors(path / name, load_key=load_key) for name in names if has_weights(path / name)), None
    )


def _no_model(path: Path) -> WeightsError:
    refuse_other_formats(path)
    looked = ", ".join(name for name in _MODEL_FOLDERS if name)
    what = f"{path} holds no weights, neither in itself nor in {looked}"
    return WeightsError(f"{what}; it is the folder of a {kind}" if (kind := pipeline_class(path)) else what)


def _nothing(path: Path, only: Collection[str]) -> WeightsError:
    labels = {"dit": "HunyuanDiT", "bert": "BERT", "t5": "mT5", "vae": "VAE"}
    wanted = [label for part, label in labels.items() if part in only]
    folders = [name for part, names in FOLDERS.items() if part in only for name in names]
    looked = [*(name for name in _MODEL_FOLDERS if name and "dit" in only), *folders]
    refuse_other_formats(path)
    return WeightsError(
        f"{path} holds no {' and no '.join(wanted)}: no weights in itself, nor in {', '.join(looked)}"
    )


def _info(source: TensorSource, kind: FileKind) -> ModelInfo:
    if kind.kind in ("dit", "controlnet"):
        return model_info(source, kind)
    try:
        # The version only selects defaults that do not concern the other parts.
        info = ModelInfo.from_metadata(source.metadata, version="v1.2")
    except WeightsError as error:
        raise WeightsError(f"{source.path}: {error}") from error
    return options_beside(source, kind.kind).complete(info) if _is_alone(source, kind) else info


def _is_alone(source: TensorSource, kind: FileKind) -> bool:
    """Whether a file holds one part and nothing else, without the prefix that it has in all-in-one files."""
    return kind.kind in FOLDERS and not any(key.startswith((*_BERT, *_MT5, *VAE_PREFIXES)) for key in source)


def _alone(source: TensorSource, kind: FileKind, info: ModelInfo) -> list[TensorSource]:
    """A file's only part, under the names of an all-in-one checkpoint."""
    if not _is_alone(source, kind):
        return []
    if kind.kind == "vae":
        return other_parts(vae=vae_part(source, info.vae))
    return other_parts(bert=bert_part(source)) if kind.kind == "bert" else other_parts(t5=mt5_part(source))


def _part(places: Iterable[TensorSource], prefixes: tuple[str, ...]) -> TensorSource | None:
    for source in places:
        for prefix in prefixes:
            if any(key.startswith(prefix) for key in source):
                return without_prefix(source, prefix)
    return None


def _bytes(places: Iterable[TensorSource], names: tuple[str, ...]) -> bytes | None:
    for source in places:
        for name in names:
            if name in source:
                return source.get(name).to(torch.uint8).contiguous().numpy().tobytes()
    return None


@contextlib.contextmanager
def say_where(part: str, *, given: bool) -> Iterator[None]:
    """Complete an error about a part that was looked for beside the model: say how to name another place."""
    try:
        yield
    except WeightsError as error:
        if given:
            raise
        raise WeightsError(f"{error} (--{part.replace('_', '-')} PATH, or {part}= in Python)") from None
