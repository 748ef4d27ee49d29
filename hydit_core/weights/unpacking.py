"""Files with quantised layers in ComfyUI's formats, as if their weights were ordinary ones.

Every file is opened through :func:`unpacking`, so that what reads, merges, converts or compares weights need
not know that they are quantised. What can keep them packed asks :meth:`~.source.TensorSource.scheme`.

ComfyUI describes layer ``X`` in the tensor ``X.comfy_quant`` (JSON as bytes) or in the metadata
``_quantization_metadata``; the scales are ``X.weight_scale``. Older files have ``X.scale_weight``, and a
tensor ``scaled_fp8``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import FP8_DTYPES, dtype_name
from ..errors import WeightsError
from ..untrusted import parse_json
from .packed import FORMATS, INT8, LARGEST_GROUP, Packed, Scheme, is_group
from .source import TensorSource, cast

METADATA = "_quantization_metadata"
NOTE, SCALE, INPUT_SCALE = "comfy_quant", "weight_scale", "input_scale"
_OLD_MARK, _OLD_SCALE, _OLD_INPUT_SCALE = "scaled_fp8", "scale_weight", "scale_input"
_LONGEST_NOTE = 10_000

Notes = Mapping[str, Mapping[str, Any]]


class _Layer(NamedTuple):
    scheme: Scheme
    scale: str


def unpacking(source: TensorSource) -> TensorSource:
    """``source`` with its quantised weights unpacked as they are read; itself if it has none.

    A file with a format that is not read stays as it is, for :mod:`.quantised` to refuse.

    Raises:
        WeightsError: a description is damaged, a scale is missing or has another shape than its weight needs.
    """
    if not (notes := layer_notes(source)):
        return source
    if not all(is_read(note.get("format")) for note in notes.values()):
        return source
    return UnpackingSource(source, notes)


def is_read(form: object) -> bool:
    """Whether it is the name of a format that is read."""
    return isinstance(form, str) and form in FORMATS


def layer_notes(source: TensorSource) -> dict[str, Mapping[str, Any]]:
    """What a file says of its quantised layers, by their names.

    Raises:
        WeightsError: it is not such a description.
    """
    notes: dict[str, Mapping[str, Any]] = {}
    for key in source:
        layer, _, last = key.rpartition(".")
        if last == NOTE:
            notes[layer] = _note(source, key)
        elif last == _OLD_SCALE:
            notes[layer] = _old_note(source, layer)
    if METADATA in source.metadata:
        where = f"{source.path}: metadata {METADATA}"
        layers = parse_json(source.metadata[METADATA], where).get("layers")
        if not isinstance(layers, dict) or not all(isinstance(note, dict) for note in layers.values()):
            raise WeightsError(f"{where} holds no layers; expected an object for each quantised layer")
        notes |= layers
    return notes


def _note(source: TensorSource, key: str) -> Mapping[str, Any]:
    if source.dtype(key) != torch.uint8 or source.numel(key) > _LONGEST_NOTE:
        raise WeightsError(
            f"{source.path}: tensor {key} is {dtype_name(source.dtype(key))} {source.shape(key)}; expected "
            f"at most {_LONGEST_NOTE:,} bytes of text"
        )
    return parse_json(source.get(key).numpy().tobytes(), f"{source.path}: tensor {key}")


def _old_note(source: TensorSource, layer: str) -> Mapping[str, Any]:
    key = f"{layer}.weight"
    e5m2 = key in source and source.dtype(key) == torch.float8_e5m2
    # A mark of two numbers asks for products in full precision.
    marks = (mark for mark in _above(layer, _OLD_MARK) if mark in source)
    full = any(source.numel(mark) == 2 for mark in marks)
    return {"format": "float8_e5m2" if e5m2 else "float8_e4m3fn", "full_precision_matrix_mult": full}


def _above(layer: str, name: str) -> Iterator[str]:
    """``a.b.name``, ``a.name``, ``name`` for the layer ``a.b.c``."""
    while layer:
        layer = layer.rpartition(".")[0]
        yield f"{layer}.{name}" if layer else name


class UnpackingSource(TensorSource):
    """The tensors of ``source``, its quantised weights unpacked, without what describes them.

    A weight's dtype is that of its layer's bias, or else of what stands nearest to it in 16 bits or more.
    """

    def __init__(self, source: TensorSource, notes: Notes) -> None:
        self.path = source.path
        self.metadata = {key: text for key, text in source.metadata.items() if key != METADATA}
        self._source = source
        self._layers = {f"{name}.weight": self._layer(name, note) for name, note in notes.items()}
        hidden = {key for key in source if key.rpartition(".")[2] in (NOTE, _OLD_MARK)}
        for key, layer in self._layers.items():
            name = key.removesuffix(".weight")
            hidden |= {layer.scale, f"{name}.{INPUT_SCALE}", f"{name}.{_OLD_INPUT_SCALE}"}
        self._keys = dict.fromkeys(key for key in source if key not in hidden)
        self._near = _dtypes_near(source, (key for key in self._keys if key not in self._layers))

    def _layer(self, name: str, note: Mapping[str, Any]) -> _Layer:
        source, key, where = self._source, f"{name}.weight", f"{self.path}: {name}"
        if key not in source:
            raise WeightsError(f"{where} is described as quantised, but there is no {key}")
        given = Scheme(note["format"])
        if source.dtype(key) != given.dtype:
            raise WeightsError(
                f"{where}: its weight is {dtype_name(source.dtype(key))}; the format {given.format} is "
                f"{dtype_name(given.dtype)}"
            )
        scale = next((s for s in (f"{name}.{SCALE}", f"{name}.{_OLD_SCALE}") if s in source), None)
        if scale is None:
            raise WeightsError(f"{where} is {given.format}, but its scale {name}.{SCALE} is missing")
        shape, found = source.shape(key), source.shape(scale)
        rows = math.prod(found) != 1
        if not source.dtype(scale).is_floating_point or (
            rows and (len(shape) != 2 or found not in ((shape[0],), (shape[0], 1)))
        ):
            raise WeightsError(
                f"{self.path}: {scale} is {dtype_name(source.dtype(scale))} {found}; expected one number, or "
                f"one for each row of the weight {shape}"
            )
        group = _group(note, shape, where) if given.format == INT8 else 0
        full = note.get("full_precision_matrix_mult") is True
        return _Layer(Scheme(given.format, rows, group, full), scale)

    def keys(self) -> list[str]:
        return list(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def shape(self, key: str) -> tuple[int, ...]:
        return self._source.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        if key not in self._layers:
            return self._source.dtype(key)
        bias = f"{key.removesuffix('.weight')}.bias"
        if bias in self._keys and _is_wide(self._source.dtype(bias)):
            return self._source.dtype(bias)
        return next((self._near[place] for place in _above(key, "") if place in self._near), torch.bfloat16)

    def get(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        if key not in self._layers:
            return self._source.get(key, dtype)
        return cast(self.packed(key).dense(), dtype or self.dtype(key))

    def rows(self, key: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        if key not in self._layers:
            return self._source.rows(key, start, stop, dtype)
        return self.get(key, dtype)[start:stop]

    def scheme(self, key: str) -> Scheme | None:
        layer = self._layers.get(key)
        return layer and layer.scheme

    def packed(self, key: str) -> Packed:
        layer = self._layers[key]
        scale = self._source.get(layer.scale).float().clone()
        if not torch.isfinite(scale).all():
            raise WeightsError(f"{self.path}: {layer.scale} has values that are not finite; it is damaged")
        rows = self._source.shape(key)[0] if layer.scheme.rows else 0
        return Packed(self._source.get(key), scale.reshape(layer.scheme.scale_shape(rows)), layer.scheme)

    def release(self, key: str) -> None:
        self._source.release(key)
        if key in self._layers:
            self._source.release(self._layers[key].scale)


def _group(note: Mapping[str, Any], shape: tuple[int, ...], where: str) -> int:
    """The columns that ConvRot rotated together; 0 without it."""
    inner = note.get("params")
    said = {**(inner if isinstance(inner, dict) else {}), **note}
    if not said.get("convrot"):
        return 0
    group = said.get("convrot_groupsize", LARGEST_GROUP)
    if type(group) is not int or not is_group(group):
        raise WeightsError(f"{where}: convrot_groupsize is {group!r}; expected a power of 4")
    if len(shape) != 2 or shape[1] % group:
        raise WeightsError(
            f"{where}: convrot_groupsize {group} does not divide the columns of its weight {shape}"
        )
    return group


def _is_wide(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype not in FP8_DTYPES


def _dtypes_near(source: TensorSource, keys: Iterable[str]) -> dict[str, torch.dtype]:
    """For each beginning of a name, as :func:`_above` makes them, the dtype of the first tensor there."""
    near: dict[str, torch.dtype] = {}
    for key in keys:
        if _is_wide(dtype := source.dtype(key)):
            for place in _above(key, ""):
                near.setdefault(place, dtype)
    return near
