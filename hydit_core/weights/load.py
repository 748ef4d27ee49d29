"""Loading a DiT or ControlNet from a file or folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ..dtypes import FP8_DTYPES, dtype_name
from ..errors import WeightsError
from ..facts import ModelInfo
from ..model.attention import AttentionFn, sdpa
from ..model.config import DiTConfig
from ..model.controlnet import ControlNet
from ..model.dit import DiT
from ..model.ip_adapter import IPAdapter, IPAdapterConfig
from ..moved import former
from . import hub, kitchen, unread
from .bundle import Bundle, Place, bundle
from .detect import FileKind, detect, ip_adapter_view, require_kind
from .files import open_tensors
from .frozen import freeze_kept
from .quantised import refuse_quantised
from .source import TensorSource, cast

Module = TypeVar("Module", bound=nn.Module)
Model = TypeVar("Model", DiT, ControlNet)


def load_dit(
    path: Place,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    operations: Any = None,
    attention: AttentionFn | None = None,
    load_key: str | None = None,
    keep_quantised: bool = False,
    deferred: bool = False,
) -> tuple[DiT, ModelInfo]:
    """Load a HunyuanDiT of any version, size and layout.

    Tensors are cast as they are read, and nothing is ever held twice. Without a cast, CPU weights are views
    of the mapped file (copy on write): do not truncate the file while the model exists.

    Args:
        path: a file, or a folder (diffusers pipeline, its transformer, Tencent's ``t2i``), or what was
            opened there.
        dtype: of the weights; by default the file's own, or bfloat16 if that is an 8-bit float.
        operations: namespace of layer classes, by default ``torch.nn``.
        attention: attention function, by default the model's own.
        load_key: which weights of a torch file with several sets (``ema``, ``module`` ...).
        keep_quantised: quantised matrices stay so in memory, frozen, if comfy-kitchen is installed; by
            default, and without it, they are unpacked.
        deferred: read no weights yet: see :mod:`.unread`.

    Returns:
        The :class:`~..model.dit.DiT` in eval mode, and what the file says about itself.

    Raises:
        WeightsError: if the file is something else, lacks tensors, or has unknown ones.
    """
    opened = bundle(path, only=("dit",), kinds=("dit",), load_key=load_key)
    how = {"keep_quantised": keep_quantised, "deferred": deferred}
    return _load(DiT, opened, opened.dit, dtype, device, operations, attention, how)


def load_controlnet(
    path: Place,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    operations: Any = None,
    attention: AttentionFn | None = None,
    load_key: str | None = None,
    keep_quantised: bool = False,
    deferred: bool = False,
) -> tuple[ControlNet, ModelInfo]:
    """Load a HunyuanDiT ControlNet in either layout; like :func:`load_dit`."""
    opened = bundle(path, only=("controlnet",), kinds=("controlnet",), load_key=load_key)
    how = {"keep_quantised": keep_quantised, "deferred": deferred}
    return _load(ControlNet, opened, opened.controlnet, dtype, device, operations, attention, how)


def load_ip_adapter(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    operations: Any = None,
    load_key: str | None = None,
    deferred: bool = False,
) -> IPAdapter:
    """Load a HunyuanDiT IP-Adapter, in eval mode: Tencent's ``ipa.pt``, or safetensors with the same names.

    A checkpoint that was trained with one gives its own; an image encoder beside it is not read. It may be on
    the hub: ``hub:ORG/NAME[@REVISION]/FILE``. ``load_key``, ``deferred``: see :func:`load_dit`.

    Raises:
        WeightsError: if the file is something else, lacks tensors, or has unknown ones.
    """
    path = hub.local(path, ("ip_adapter",))
    source = open_tensors(path, load_key=load_key)
    view = ip_adapter_view(source)
    if not len(view):
        require_kind(source, detect(source), "ip_adapter")
    try:
        config = IPAdapterConfig.from_state_dict(view.shapes())
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    dtype = dtype or compute_dtype(view)
    model = IPAdapter(config, dtype=dtype, device="meta", operations=operations or nn)
    return assign_weights(model, view, dtype=dtype, device=device, deferred=deferred).eval()


def _load(
    cls: type[Model],
    opened: Bundle,
    view: TensorSource | None,
    dtype: torch.dtype | None,
    device: str | torch.device,
    operations: Any,
    attention: AttentionFn | None,
    how: Mapping[str, bool],
) -> tuple[Model, ModelInfo]:
    assert view is not None  # it was opened as one of this kind
    config = model_config(view, opened.kind)
    dtype = dtype or compute_dtype(view)
    model = cls(config, dtype=dtype, device="meta", operations=operations or nn, attention=attention or sdpa)
    assign_weights(model, view, dtype=dtype, device=device, in_8_bits=True, **how)
    return model.eval(), opened.info


def compute_dtype(source: TensorSource) -> torch.dtype:
    """The dtype that a file's weights are used in by default."""
    stored = source.main_dtype() or torch.float32
    return torch.bfloat16 if stored in FP8_DTYPES else stored


def assign_weights(
    model: Module,
    source: TensorSource,
    *,
    dtype: torch.dtype | None,
    device: str | torch.device,
    keep_quantised: bool = False,
    in_8_bits: bool = False,
    deferred: bool = False,
) -> Module:
    """Fill a model on the meta device with its weights, one tensor at a time.

    Args:
        keep_quantised: see :func:`load_dit`.
        in_8_bits: see :class:`~.frozen.FrozenLinear`, for those that are kept.
        deferred: leave it there; its parameters know where their weights are (:mod:`.unread`).

    Raises:
        WeightsError: listing tensors that are missing, unexpected or of another shape.
    """
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    check_names(expected, source)
    device = torch.device(device)
    state: dict[str, torch.Tensor] = {}
    kept = _kept(model, source) if keep_quantised else set()
    if deferred:
        unread.defer(model, source, dtype=dtype, packed=kept)
        return model
    for key in expected:
        if key in kept:
            state[key] = kitchen.keep(source.packed(key), dtype or source.dtype(key), device)
        elif device.type == "cpu":
            state[key] = source.get(key, dtype)
        else:
            state[key] = cast(source.get(key).to(device), dtype)
        source.release(key)
    model.load_state_dict(state, strict=True, assign=True)
    freeze_kept(model, in_8_bits=in_8_bits)
    return model


def _kept(model: nn.Module, source: TensorSource) -> set[str]:
    """The weights that can stay quantised in memory: those of linear layers, with comfy-kitchen."""
    layers = (f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear))
    quantised = {key for key in layers if key in source and source.scheme(key)}
    if quantised and not kitchen.is_available():
        what = f"{source.path}: {len(quantised)} quantised layers are unpacked"
        warnings.warn(f"{what}, because comfy-kitchen is missing; {kitchen.ADVICE}", stacklevel=5)
        return set()
    return quantised


def check_names(expected: Mapping[str, tuple[int, ...]], source: TensorSource) -> None:
    """Raise a WeightsError that lists tensors of a model that are missing, unexpected or of another shape.

    Integers are not accepted as weights either: they belong to something quantised, or to something else.
    Weights with scales are refused with the name of their scheme.
    """
    refuse_quantised(source)
    found = source.shapes()
    problems = []
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    other = [
        f"{key} {found[key]} instead of {shape}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    integers = [
        f"{key} {dtype_name(source.dtype(key))}"
        for key in expected
        if key in found and not source.dtype(key).is_floating_point
    ]
    for label, names in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", other),
        ("without fractions", integers),
    ):
        if names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            problems.append(f"{len(names)} {label}: {', '.join(names[:8])}{more}")
    if problems:
        raise WeightsError(f"{source.path} does not fit its own dimensions; tensors {'; '.join(problems)}")


def model_shapes(kind: FileKind) -> dict[str, tuple[int, ...]]:
    """The tensors that a detected DiT or ControlNet must have, under Tencent's names."""
    assert kind.config is not None
    cls = ControlNet if kind.kind == "controlnet" else DiT
    return {key: tuple(value.shape) for key, value in cls(kind.config, device="meta").state_dict().items()}


def model_config(view: TensorSource, kind: FileKind) -> DiTConfig:
    """The dimensions of a detected DiT or ControlNet."""
    if kind.config is None:
        raise WeightsError(f"{view.path} is {kind.name}, which has no dimensions of a HunyuanDiT")
    return kind.config


__getattr__ = former(__name__)
