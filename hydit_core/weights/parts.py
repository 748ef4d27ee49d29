"""The parts of a checkpoint, and what it says about itself."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..errors import ConfigError, WeightsError
from ..facts import METADATA_KEY, ModelInfo
from ..untrusted import read_json
from .companions import FOLDERS, Companions, bert_part, companions, mt5_part, options_beside, vae_part
from .detect import BERT_PREFIXES, MT5_PREFIXES, VAE_PREFIXES, FileKind, detect, tencent_view
from .files import has_weights, open_tensors
from .quantised import refuse_quantised
from .source import MergedSource, TensorSource
from .views import rename, without_prefix

# Where the folders that are published keep the transformer: diffusers' and Tencent's.
_MODEL_FOLDERS = ("", "transformer", "model", "t2i/model", "controlnet")
_SCHEDULER = Path("scheduler") / "scheduler_config.json"
_PREDICTIONS = {"v_prediction": "v"}
# What other values of these would change, and ours has not.
_SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "thresholding": False,
    "clip_sample": False,
}
_VARIANT = re.compile(r"(?<![a-z])(ema|module|distill)(?:ed)?(?![a-z])")
_DISTILLED_STEPS = 25
"""Tencent's model card, for the Distill weights."""


def open_model(path: str | os.PathLike[str], *, load_key: str | None = None) -> TensorSource:
    """Open a DiT or ControlNet: a file, its folder, a diffusers pipeline's folder, or Tencent's.

    Raises:
        WeightsError: if nothing is there or it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        for name in _MODEL_FOLDERS:
            if has_weights(path / name):
                return open_tensors(path / name, load_key=load_key)
        looked = ", ".join(name for name in _MODEL_FOLDERS if name)
        raise WeightsError(f"{path} holds no weights, neither in itself nor in {looked}")
    return open_tensors(path, load_key=load_key)


def open_controlnet(path: str | os.PathLike[str], *, load_key: str | None = None) -> TensorSource:
    """As :func:`open_model`; of a pipeline's folder with a ControlNet beside its DiT, the ControlNet."""
    inside = Path(path) / "controlnet"
    return open_model(inside if has_weights(inside) else path, load_key=load_key)


def model_info(source: TensorSource, kind: FileKind) -> ModelInfo:
    """What the file says about itself, completed by a diffusers scheduler beside it and by its name."""
    info = ModelInfo.from_metadata(source.metadata, version=kind.version)
    if METADATA_KEY in source.metadata:
        return info
    info = _with_scheduler(info, source.path)
    # A torch file's own key comes first, then Tencent's file names (pytorch_model_ema.pt).
    text = f"{source.metadata.get('hydit.load_key', '')} {source.path.name}"
    variant = _VARIANT.search(text.lower())
    name = variant.group(1) if variant else ""
    # A pipeline says it in the name of its folder alone.
    if not name and re.search(r"(?<![a-z])distill(ed)?(?![a-z])", "/".join(source.path.parts[-4:]).lower()):
        name = "distill"
    if name == "distill":
        info = replace(info, defaults=replace(info.defaults, steps=_DISTILLED_STEPS))
    return replace(info, variant=name)


def _with_scheduler(info: ModelInfo, path: Path) -> ModelInfo:
    """Take the steps, betas and prediction type of a diffusers pipeline's scheduler.

    Raises:
        WeightsError: it is no schedule that this library has.
    """
    folder = path if path.is_dir() else path.parent
    config = next(
        (file for base in (folder, folder.parent) if (file := base / _SCHEDULER).is_file()),
        None,
    )
    if config is None:
        return info
    values = read_json(config)
    for name, usual in _SCHEDULE.items():
        if (found := values.get(name, usual)) != usual:
            raise WeightsError(
                f"{config}: {name} is {found!r}; this library has {usual!r} alone, so pictures would be "
                "wrong. If the weights were trained with that after all, correct the file"
            )
    if "Flow" in str(values.get("_class_name")):
        raise WeightsError(f"{config} is of {values['_class_name']}; HunyuanDiT has a schedule of betas")
    prediction = values.get("prediction_type", "v_prediction")
    numbers = ("num_train_timesteps", "beta_start", "beta_end")
    changes = {name: values[name] for name in numbers if name in values}
    try:
        diffusion = replace(info.diffusion, **changes, prediction=_PREDICTIONS.get(prediction, prediction))
        return replace(info, diffusion=diffusion)
    except (ConfigError, TypeError) as error:
        raise WeightsError(f"{config} is no scheduler configuration of diffusers: {error}") from error


@dataclass(frozen=True)
class Parts:
    """The parts of a checkpoint; None for what it does not hold.

    Attributes:
        dit: Tencent's names.
        bert: the names of transformers' BertModel (``embeddings.word_embeddings.weight`` ...).
        mt5: the names of transformers' MT5EncoderModel (``shared.weight``, ``encoder.block.0...``).
        spiece_model: the serialized sentencepiece model of mT5's tokenizer.
        bert_vocab: the text of BERT's ``vocab.txt``, in UTF-8.
        vae: LDM or TAESD names.
        info: what shapes do not tell; None without a DiT (:func:`bundle` always gives it).
    """

    path: Path
    metadata: Mapping[str, str]
    kind: FileKind
    dit: TensorSource | None
    bert: TensorSource | None
    mt5: TensorSource | None
    spiece_model: bytes | None
    bert_vocab: bytes | None
    vae: TensorSource | None
    info: ModelInfo | None


def parts(path: str | os.PathLike[str], *, load_key: str | None = None) -> Parts:
    """Open an all-in-one checkpoint (or a DiT, which is one with a single part)."""
    return split_parts(open_model(path, load_key=load_key))


def split_parts(source: TensorSource) -> Parts:
    """The parts of an open checkpoint, as lazy views.

    Raises:
        WeightsError: its weights are quantised.
    """
    refuse_quantised(source)
    kind = detect(source)
    has_dit = kind.kind == "dit"
    mt5 = _part(source, tuple(f"{p}transformer." for p in MT5_PREFIXES))
    if mt5 is not None and "shared.weight" in mt5:
        mt5 = rename(mt5, lambda key: None if key == "encoder.embed_tokens.weight" else key)
    return Parts(
        path=source.path,
        metadata=source.metadata,
        kind=kind,
        dit=tencent_view(source, kind) if has_dit else None,
        bert=_part(source, tuple(f"{p}transformer.bert." for p in BERT_PREFIXES)),
        mt5=mt5,
        # Without a prefix: ComfyUI saves each text encoder in a file of its own so.
        spiece_model=_bytes(source, tuple(f"{p}spiece_model" for p in (*MT5_PREFIXES, ""))),
        bert_vocab=_bytes(source, tuple(f"{p}vocab" for p in (*BERT_PREFIXES, ""))),
        vae=_part(source, VAE_PREFIXES),
        info=model_info(source, kind) if has_dit else None,
    )


def bundle(
    path: str | os.PathLike[str],
    *,
    only: Collection[str] = ("dit", *FOLDERS),
    load_key: str | None = None,
) -> Parts:
    """Open whatever place holds a model, or some of its parts.

    A file: an all-in-one checkpoint, a DiT, one text encoder or a VAE. A folder: that of such a file, a
    diffusers pipeline's, Tencent's ``t2i`` or the one above it, with what stands beside the transformer.

    Args:
        only: the parts that are wanted. Folders of others are not looked into.
        load_key: which weights of a torch file that holds several.

    Returns:
        The parts, with ``info`` completed by the config.json files that describe them; of a place without a
        DiT, its version and diffusion are those of v1.2 and mean nothing.

    Raises:
        WeightsError: if nothing of the kind is there or it cannot be read.
    """
    path = Path(path)
    beside = companions(path, only) if path.is_dir() else Companions()
    source = _own_source(path, only, load_key)
    if source is None and not beside.sources:
        raise WeightsError(_nothing(path, only))
    others = split_parts(MergedSource(beside.sources, path=path, metadata={}))
    own = others if source is None else _own_parts(source)
    return Parts(
        path=path if beside.sources else own.path,
        metadata=own.metadata,
        kind=own.kind,
        dit=own.dit,
        bert=own.bert or others.bert,
        mt5=own.mt5 or others.mt5,
        spiece_model=own.spiece_model or others.spiece_model,
        bert_vocab=own.bert_vocab or others.bert_vocab,
        vae=own.vae or others.vae,
        info=beside.complete(own.info or ModelInfo.published("v1.2")),
    )


def _own_source(path: Path, only: Collection[str], load_key: str | None) -> TensorSource | None:
    """The file, or the one that a folder itself or its transformer's folder holds."""
    if not path.is_dir():
        return open_tensors(path, load_key=load_key)
    names = _MODEL_FOLDERS if "dit" in only else ("",)
    return next(
        (open_tensors(path / name, load_key=load_key) for name in names if has_weights(path / name)), None
    )


def _own_parts(source: TensorSource) -> Parts:
    """The parts of one file, which may also be one encoder or a VAE alone."""
    found = split_parts(source)
    try:
        # The version only picks defaults that do not concern the other parts.
        info = found.info or ModelInfo.from_metadata(source.metadata, version="v1.2")
    except WeightsError as error:
        raise WeightsError(f"{source.path}: {error}") from error
    kind = found.kind.kind
    if kind not in FOLDERS or any((found.bert, found.mt5, found.vae)):
        return replace(found, info=info)
    info = options_beside(source, kind).complete(info)
    return replace(
        found,
        info=info,
        bert=bert_part(source) if kind == "bert" else None,
        mt5=mt5_part(source) if kind == "t5" else None,
        vae=vae_part(source, info.vae) if kind == "vae" else None,
    )


def _nothing(path: Path, only: Collection[str]) -> str:
    labels = {"dit": "HunyuanDiT", "bert": "BERT", "t5": "mT5", "vae": "VAE"}
    wanted = [label for part, label in labels.items() if part in only]
    folders = [name for part, names in FOLDERS.items() if part in only for name in names]
    looked = [*(name for name in _MODEL_FOLDERS if name and "dit" in only), *folders]
    return f"{path} holds no {' and no '.join(wanted)}: no weights in itself, nor in {', '.join(looked)}"


def _part(source: TensorSource, prefixes: tuple[str, ...]) -> TensorSource | None:
    for prefix in prefixes:
        if any(key.startswith(prefix) for key in source):
            return without_prefix(source, prefix)
    return None


def _bytes(source: TensorSource, names: tuple[str, ...]) -> bytes | None:
    for name in names:
        if name in source:
            return source.get(name).to(torch.uint8).contiguous().numpy().tobytes()
    return None
