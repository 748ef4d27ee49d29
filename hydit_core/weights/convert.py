"""Changing a file's layout and dtype, tensor by tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..dtypes import dtype_name
from ..errors import WeightsError
from ..facts import METADATA_KEY, ModelInfo
from ..model.config import DiTConfig
from ..new_files import atomic_path
from .beside import FOLDERS, Beside
from .bundle import Bundle, Place, bundle
from .detect import BERT_PREFIXES, MT5_PREFIXES, FileKind, adapter_among, tencent_view
from .diffusers_config import controlnet_config, scheduler_config, transformer_config
from .layouts import PART_PREFIXES, Layout, belongs_to_model, from_tencent
from .load import check_names, model_shapes
from .modelspec import file_metadata
from .output import check_output
from .packing import unquantised
from .save import dtypes_for
from .source import CastSource, MergedSource, TensorSource
from .views import rename
from .writer import Progress, save_safetensors

_WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
# Metadata that we write anew, or that is wrong for other tensors: an index's size, the hashes of kohya's
# trainer and of the metadata standard.
_NOT_KEPT = (
    "hydit.source",
    "hydit.load_key",
    "hydit.load_keys",
    "total_size",
    "modelspec.hash_sha256",
    "sshs_model_hash",
    "sshs_legacy_hash",
)
_TEXT = {
    **{f"{prefix}transformer.bert.": "bert." for prefix in BERT_PREFIXES},
    **{f"{prefix}transformer.": "t5." for prefix in MT5_PREFIXES},
}


@dataclass(frozen=True)
class Converted:
    """What was written, and one line for each thing that a user should know."""

    path: Path
    kind: FileKind
    notes: tuple[str, ...]


def convert(
    path: Place,
    out: str | os.PathLike[str],
    *,
    layout: Layout,
    dtype: torch.dtype | None = None,
    load_key: str | None = None,
    change: Callable[[TensorSource], TensorSource] = lambda source: source,
    extra: Mapping[str, str] | None = None,
    inputs: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
    told: bool = True,
) -> Converted:
    """Write a DiT or ControlNet in another layout or dtype, one tensor at a time and atomically.

    * ``tencent``: one safetensors file with the DiT alone.
    * ``comfy``: one safetensors file. Everything else in an all-in-one file is kept as it is; the text
      encoders, tokenizers and VAE of a published folder are added. A ControlNet gets no prefix.
    * ``diffusers``: a folder with ``transformer/`` and ``scheduler/`` (for a ControlNet, the folder itself).

    Args:
        path: a file or folder, or what was opened there.
        out: the file to write or, for the layout diffusers, the folder, new or empty.
        dtype: for the DiT or ControlNet; by default unchanged: what is quantised stays so, but in the layout
            diffusers. Other parts keep theirs.
        load_key: which weights of a torch file with several sets.
        change: replaces a source that is written by another with the same names: the DiT's under Tencent's
            names, before the cast, and the other parts' under those of an all-in-one file.
        extra: metadata that is added to the file's, or replaces it.
        inputs: what else is read for it, and so must not be overwritten.
        overwrite: an existing file may be replaced, unless it is an input.
        told: the notes say what becomes of layers that are quantised in the input.

    Raises:
        WeightsError: if the input is something else or does not fit the layout, or the output cannot be
            written or exists. Nothing half-written is left.
    """
    out = Path(out)
    given = path.place if isinstance(path, Bundle) else Path(path)
    form = f"the layout {layout}"
    check_output(out, (given, *inputs), overwrite=overwrite, folder=layout == "diffusers", form=form)
    only = ("dit", *FOLDERS) if layout == "comfy" else ("dit",)
    opened = bundle(path, only=only, kinds=("dit", "controlnet"), load_key=load_key)
    source, kind, info, beside = opened.source, opened.kind, opened.info, opened.beside
    if kind.config is None:
        raise WeightsError(f"{given} is {kind.name}, without dimensions")
    view = tencent_view(source, kind)
    check_names(model_shapes(kind), view)
    model = change(view)
    if dtype is not None:
        model = CastSource(model, dtypes_for(model, dtype))
    metadata = {**_metadata(source, kind, info), **(extra or {})}
    said = _told_of_quantised(view, layout, dtype) if told else ()
    if adapter_among(source, kind):
        said = (*said, "left out: its IP-Adapter (to draw with it, give the input as that)")
    if layout == "diffusers":
        tensors = from_tencent(unquantised(model), layout)
        _write_folder(out, tensors, kind, kind.config, info, metadata, progress)
        return Converted(out, kind, (*said, *_left_out(kind)))
    if layout == "tencent" or kind.kind == "controlnet":
        save_safetensors(out, model, metadata, progress=progress)
        return Converted(out, kind, (*said, *_left_out(kind)))
    others = _others(source, kind)
    rest = [change(part) for part in (others, *beside.sources)]
    whole = MergedSource([from_tencent(model, layout), *rest], path=source.path, metadata={})
    save_safetensors(out, whole, metadata, progress=progress)
    return Converted(out, kind, (*said, *_put_in(others, beside)))


def _metadata(source: TensorSource, kind: FileKind, info: ModelInfo) -> dict[str, str]:
    """Our metadata, and what else the input's metadata says."""
    assert kind.config is not None
    role = "controlnet" if kind.kind == "controlnet" else ""
    kept = {key: text for key, text in kept_metadata(source).items() if key != METADATA_KEY}
    return file_metadata(kind.config, info, role=role, source=source.path.name, extra=kept)


def kept_metadata(source: TensorSource) -> dict[str, str]:
    """What a file's metadata says that still holds when its tensors are written in another form."""
    return {key: text for key, text in source.metadata.items() if key not in _NOT_KEPT}


def full_name(key: str) -> str:
    """The full name of a tensor that :func:`convert` writes: ``dit.blocks.0.mlp.fc1.weight``, ``bert...``.

    ``key`` is Tencent's name for a DiT's, else that of an all-in-one file.
    """
    for prefix, part in _TEXT.items():
        if key.startswith(prefix):
            return part + key.removeprefix(prefix)
    return key if key.startswith(PART_PREFIXES) else f"dit.{key}"


def _write_folder(
    out: Path,
    tensors: TensorSource,
    kind: FileKind,
    config: DiTConfig,
    info: ModelInfo,
    metadata: Mapping[str, str],
    progress: Progress | None,
) -> None:
    try:
        if kind.kind == "controlnet":
            files = {"config.json": controlnet_config(config, info)}
            weights = _WEIGHTS_NAME
        else:
            files = {
                "transformer/config.json": transformer_config(config, info),
                "scheduler/scheduler_config.json": scheduler_config(info),
            }
            weights = f"transformer/{_WEIGHTS_NAME}"
    except WeightsError as error:
        raise WeightsError(f"{tensors.path}: {error}") from None
    with atomic_path(out) as folder:
        save_safetensors(folder / weights, tensors, metadata, progress=progress)
        for name, content in files.items():
            _write_json(folder / name, content)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _others(source: TensorSource, kind: FileKind) -> TensorSource:
    """What a file holds besides its DiT, under the file's own names."""
    return rename(source, lambda key: None if belongs_to_model(key, kind.prefix) else key)


def _told_of_quantised(view: TensorSource, layout: Layout, dtype: torch.dtype | None) -> tuple[str, ...]:
    """What becomes of quantised layers, if there are any."""
    names = sorted({scheme.name for scheme in view.schemes().values()})
    if not names:
        return ()
    if dtype is None and layout != "diffusers":
        return (f"still quantised: {', '.join(names)} (--dtype fp16 or bf16 unpacks it)",)
    reason = "" if dtype else "; diffusers does not read ComfyUI's formats"
    unpacked = dtype_name(dtype or view.main_dtype() or torch.bfloat16)
    return (f"unpacked from {', '.join(names)} into {unpacked}{reason}",)


def _left_out(kind: FileKind) -> tuple[str, ...]:
    if not kind.parts:
        return ()
    names = {"bert": "BERT", "t5": "mT5", "vae": "the VAE"}
    left = ", ".join(names[part] for part in kind.parts)
    return (f"left out: {left} (the layout comfy keeps them)",)


def _put_in(others: TensorSource, beside: Beside) -> tuple[str, ...]:
    notes = []
    if len(others):
        notes.append(f"kept as they are: {len(others)} tensors beside the DiT")
    if beside.found:
        notes.append(f"put in from the folder: {', '.join(beside.found)}")
    return tuple(notes)
