"""What ``inspect`` prints about a file; reads headers, never tensors."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..dtypes import dtype_name
from ..errors import HyditError, printable
from ..model.config import DiTConfig
from ..model.ip_adapter import IPAdapterConfig
from .bundle import open_model
from .detect import BERT_PREFIXES, MT5_PREFIXES, VAE_PREFIXES, FileKind, detect, ip_adapter_view, version_text
from .info import model_info
from .packed import Scheme
from .quantised import quantised
from .source import TensorSource
from .vision_layout import VisionConfig, find_vision, vision_config, vision_view

_TEXT_LIMIT = 600
_PART_NAMES = {
    "model.": "DiT",
    **dict.fromkeys(BERT_PREFIXES, "BERT"),
    **dict.fromkeys(MT5_PREFIXES, "mT5"),
    **dict.fromkeys(VAE_PREFIXES, "VAE"),
}


def describe(path: str | os.PathLike[str], *, load_key: str | None = None) -> str:
    """Kind, version, layout, dimensions, dtypes, size, parameter count and metadata of a file or folder.

    Raises:
        WeightsError: if it is missing, damaged, or holds no tensors.
    """
    source = open_model(path, load_key=load_key)
    kind, said = detect(source), quantised(source)
    rows = [("file", str(source.path)), ("kind", kind.name), *_model_rows(source, kind)]
    rows += [
        *([("note", kind.advice)] if kind.advice else []),
        ("dtype", _dtypes(source, source)),
        *([("quantised", _quantised(schemes.values()))] if (schemes := source.schemes()) else []),
        *([("note", f"{said}; this cannot be read")] if said else []),
        ("size", f"{_size(Path(path), source):,} bytes"),
        ("tensors", f"{len(source):,}"),
        ("parameters", f"{_parameters(source, source):,}"),
    ]
    if kind.parts:
        rows += list(_part_rows(source, kind))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}" for name, text in rows]
    lines += ["metadata"] if source.metadata else []
    lines += [f"  {key}: {_shorten(text)}" for key, text in sorted(source.metadata.items())]
    return "\n".join(map(printable, lines))


def _model_rows(source: TensorSource, kind: FileKind) -> Iterator[tuple[str, str]]:
    if kind.config is None:
        if kind.layout:
            yield "layout", kind.layout
        with contextlib.suppress(HyditError):  # impossible ones are told where the file is loaded
            if kind.kind == "ip_adapter":
                yield (
                    "dimensions",
                    _of_ip_adapter(IPAdapterConfig.from_state_dict(ip_adapter_view(source).shapes())),
                )
            if where := find_vision(source.keys()):
                yield "image encoder", _of_vision(vision_config(vision_view(source, where), where.layout))
        return
    info = model_info(source, kind)
    version = version_text(kind.config, source.metadata) + (f", {info.variant}" if info.variant else "")
    yield "version", version
    yield "layout", kind.layout + (f", names behind {kind.prefix!r}" if kind.prefix else "")
    yield "dimensions", _dimensions(kind.config)
    diffusion = info.diffusion
    yield (
        "diffusion",
        f"{diffusion.prediction}-prediction, betas {diffusion.beta_start} to {diffusion.beta_end}",
    )


def _of_ip_adapter(config: IPAdapterConfig) -> str:
    head_dim = config.hidden_size // config.num_heads
    return (
        f"for a DiT of hidden {config.hidden_size}, depth {config.depth}, "
        f"heads {config.num_heads} x {head_dim}; "
        f"{config.num_tokens} tokens x {config.token_dim} of an image encoder's {config.embed_dim} values"
    )


def _of_vision(config: VisionConfig) -> str:
    head_dim = config.width // config.heads
    return (
        f"width {config.width}, {config.layers} layers, heads {config.heads} x {head_dim}, "
        f"MLP {config.mlp_hidden}, {config.activation}; {config.size} x {config.size} px in patches of "
        f"{config.patch} become {config.embed_dim} values"
    )


def _dimensions(config: DiTConfig) -> str:
    conditions = [name for name, on in (("size", config.size_cond), ("style", config.style_cond)) if on]
    return (
        f"hidden {config.hidden_size}, depth {config.depth}, heads {config.num_heads} x {config.head_dim},"
        f" MLP {config.mlp_hidden}, channels {config.in_channels} in {config.out_channels} out,"
        f" BERT {config.text_len} x {config.text_dim}, mT5 {config.t5_len} x {config.t5_dim},"
        f" pooled {config.pooled_dim}, conditions {' and '.join(conditions) or 'none'}"
    )


def _dtypes(source: TensorSource, keys: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for key in keys:
        scheme = source.scheme(key)
        name = scheme.name if scheme else dtype_name(source.dtype(key))
        counts[name] = counts.get(name, 0) + source.numel(key)
    if len(counts) == 1:
        return next(iter(counts))
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} ({count:,} values)" for name, count in ordered)


def _quantised(schemes: Iterable[Scheme]) -> str:
    counts = Counter(scheme.name for scheme in schemes)
    return "layers: " + ", ".join(f"{count} in {name}" for name, count in counts.most_common())


def _part_rows(source: TensorSource, kind: FileKind) -> Iterator[tuple[str, str]]:
    groups: dict[str, list[str]] = {}
    for key in source:
        found = (part for part in _PART_NAMES if key.startswith(part))
        name = _PART_NAMES.get(next(found, ""), "DiT" if key.startswith(kind.prefix) else "other")
        groups.setdefault(name, []).append(key)
    for name, keys in groups.items():
        yield f"part {name}", f"{_parameters(source, keys):,} parameters, {_dtypes(source, keys)}"


def _parameters(source: TensorSource, keys: Iterable[str]) -> int:
    # The bytes of tokenizers travel as integers.
    return sum(source.numel(key) for key in keys if source.dtype(key).is_floating_point)


def _size(path: Path, source: TensorSource) -> int:
    return path.stat().st_size if path.is_file() else sum(source.nbytes(key) for key in source)


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _TEXT_LIMIT else f"{text[:_TEXT_LIMIT]}... ({len(text):,} characters)"
