"""Reads LoRA files of every layout into an :class:`~.adapter.Adapter`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..dtypes import dtype_name
from ..errors import LoraError
from ..weights import hub
from ..weights.bundle import open_model
from ..weights.detect import detect, what_to_do
from ..weights.files import has_weights, open_tensors
from ..weights.source import MemorySource, TensorSource
from .adapter import Adapter
from .kinds import KINDS, BiasOnly, DoRA, SetWeight
from .names import is_diffusers, locate, own_name, part_of
from .patch import Patch
from .scaling import PEFT_CONFIG, PeftConfig, Scaling, read_peft_config

PEFT_PARTS = ("bert", "t5")
"""Sub-folders of a PEFT folder: adapters of the text encoders."""


class _Role(NamedTuple):
    """What a tensor is to its module: part of a kind of change, by its name there, or of no one kind."""

    kind: type[Patch] | None
    name: str


_ALPHA, _BIAS, _WEIGHT = _Role(None, "alpha"), _Role(None, "bias"), _Role(SetWeight, "value")
_MAGNITUDE, _PEFT_MAGNITUDE = _Role(DoRA, "magnitude"), _Role(DoRA, "peft_magnitude")

# By the end of the tensor's name.
_ROLES = {
    "alpha": _ALPHA,
    "diff_b": _BIAS,
    "b_norm": _BIAS,
    **{end: _Role(kind, name) for kind in KINDS for end, name in kind.names.items()},
}
_LONGEST_NAME = 1000
_PLAIN = (".weight", ".bias")
_KEY = re.compile(
    r"(?P<module>.+?)[._](?P<role>" + "|".join(map(re.escape, sorted(_ROLES, key=len, reverse=True))) + ")"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?P<end>\.weight|\.bias)?"
)
_REFUSED = (
    (("lora_mid", "hada_t1", "hada_t2", "lokr_t2"), "Tucker factors, which are for convolutions"),
    (("oft_blocks", "oft_diag", ".oft_"), "OFT, which is not supported"),
    (("boft_",), "BOFT, which is not supported"),
    ((".a1.weight", ".b1.weight"), "GLoRA, which is not supported"),
    ((".q_layer.", ".p_layer.", ".lambda_layer"), "T-LoRA, which is not supported"),
    ((".on_input",), "IA3, which is not supported"),
    (("trainable_tokens_",), "rows of an embedding, which are not supported"),
)


@dataclass
class _Module:
    """The tensors of one module as the file has them."""

    roles: dict[_Role, Tensor] = field(default_factory=dict)
    up_bias: Tensor | None = None
    whole_bias: Tensor | None = None


def read(path: str | os.PathLike[str]) -> Adapter:
    """Read a LoRA: PEFT's folder, or a safetensors or torch file of any of the known layouts.

    PEFT (with or without its prefix, old and new spellings), kohya, ComfyUI, Tencent's own interface, and
    diffusers' names, whose q, k and v become rows of the fused projections. LoRA, DoRA, LoHa, LoKr, and
    plain differences of weights and biases. Modules that this model does not have stay in the adapter, as
    ``dit.`` and the file's own name, and are reported when it is applied.

    Where the strength comes from: ``.alpha`` in the file, else ``adapter_config.json`` beside it, else the
    file's metadata, else alpha is the rank (Tencent's interface: its square root).

    Raises:
        LoraError: if it is something else (it says what), or a kind of change that is not supported.
        WeightsError: if the file is missing or damaged.
    """
    path = hub.local(path, ("lora",))
    folders = _peft_folders(path) if path.is_dir() else []
    adapters = [] if folders and not (path / PEFT_CONFIG).is_file() else [_read_one(path)]
    adapters += [_read_one(folder, folder.name if folder.name in PEFT_PARTS else "") for folder in folders]
    first = adapters[0]
    modules = {key: patches for adapter in adapters for key, patches in adapter.modules.items()}
    name = path.stem if path.is_file() else path.name
    return Adapter(modules, name, first.format, first.metadata, (path,))


def _peft_folders(path: Path) -> list[Path]:
    """The adapters that lie in sub-folders: those of text encoders, or the one that peft gave a name.

    Raises :class:`LoraError` where it is not clear which is meant.
    """
    found = [path / part for part in PEFT_PARTS if (path / part / PEFT_CONFIG).is_file()]
    if found or (path / PEFT_CONFIG).is_file():
        return found
    named = sorted(file.parent for file in path.glob(f"*/{PEFT_CONFIG}"))
    if len(named) > 1:
        names = ", ".join(folder.name for folder in named[:8])
        raise LoraError(f"{path} holds {len(named)} adapters of peft; name one of the folders: {names}")
    return named


def from_tensors(
    tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None, name: str = "the LoRA"
) -> Adapter:
    """As :func:`read`, from a state dict in memory. Tensors are shared, not copied.

    Raises:
        LoraError: as :func:`read`.
    """
    source = MemorySource(tensors, path=name, metadata=metadata)
    return replace(_from_source(source, None), name=name)


def _read_one(path: Path, part: str = "") -> Adapter:
    if path.is_dir() and not has_weights(path):  # the folder of a model, or of nothing
        raise LoraError(_not_a_lora(open_model(path)))
    return _from_source(open_tensors(path), read_peft_config(path), part)


def _from_source(source: TensorSource, config: PeftConfig | None, part: str = "") -> Adapter:
    modules = _group(source, config is not None and config.whole)
    if not modules:
        raise LoraError(_not_a_lora(source))
    diffusers = is_diffusers(modules)
    layout = _layout(modules, source, diffusers)
    scaling = Scaling(config, source.metadata, layout == "tencent-gui")
    result: dict[str, list[Patch]] = {}
    known = 0
    for name, module in modules.items():
        place = locate(name, diffusers=diffusers)
        patch = _patch(module, name, scaling, source)
        if place is None:
            result.setdefault(f"{part or part_of(name)}.{name}", []).append(patch)
            continue
        known += 1
        if place.swap:
            patch = patch.swapped()
        if place.pieces > 1:
            patch = _on_rows(patch, place.piece)
        result.setdefault(place.module, []).append(patch)
    if not known:
        raise LoraError(_not_a_lora(source))
    return Adapter(result, source.path.stem, layout, dict(source.metadata))


def _on_rows(patch: Patch, index: int) -> Patch:
    tall = patch.shape[0] if patch.shape else len(patch.bias) if patch.bias is not None else 0
    return replace(patch, rows=(index * tall, (index + 1) * tall))


def _group(source: TensorSource, whole: bool = False) -> dict[str, _Module]:
    """The file's tensors by module; empty if none of them belongs to a LoRA.

    ``whole``: PEFT's configuration announces weights and biases that replace the base's.
    """
    for key in source:
        if len(key) > _LONGEST_NAME:
            raise LoraError(f"{source.path}: a tensor name of {len(key):,} characters; this is no LoRA")
    matches = {key: _KEY.fullmatch(key) for key in source}
    plain = dict.fromkeys(k for k, match in matches.items() if whole and not match and k.endswith(_PLAIN))
    _refuse(source, {key: match for key, match in matches.items() if key not in plain})
    modules: dict[str, _Module] = {}
    for key in plain:
        # Inside an adapted layer, peft's name of what it adapts stands between.
        name, _, kind = key.replace("modules_to_save.", "").rpartition(".")
        module = modules.setdefault(name.removesuffix(".base_layer"), _Module())
        if kind == "bias":
            module.whole_bias = _checked(source, key, _BIAS)
        else:
            module.roles[_WEIGHT] = _checked(source, key, _WEIGHT)
    for key, match in matches.items():
        if match is None:
            continue
        # Tencent's interface puts the alpha behind the weight's name.
        module = modules.setdefault(match["module"].removesuffix(".weight"), _Module())
        role = _ROLES[match["role"]]
        if match["end"] == ".bias" and role.name == "up":
            module.up_bias = _checked(source, key, _BIAS)
        elif role in module.roles:
            raise LoraError(f"{source.path}: {key} comes twice, under two spellings or for two adapters")
        else:
            module.roles[role] = _checked(source, key, role)
    return modules


def _checked(source: TensorSource, key: str, role: _Role) -> Tensor:
    """A tensor, after checking by its header that its shape and dtype suit its role."""
    shape, dtype = source.shape(key), source.dtype(key)
    count, is_alpha = math.prod(shape), role is _ALPHA
    # Differences and the lengths in a DoRA may be vectors; alphas need not be floating-point numbers.
    least = role.kind.dimensions if role.kind else 0 if is_alpha else 1
    if len(shape) < least or (count != 1 if is_alpha else count == 0):
        wanted = "one number" if is_alpha else f"{least} dimensions or more, and none empty"
        raise LoraError(f"{source.path}: {key} has the shape {tuple(shape)}; expected {wanted}")
    if dtype.is_complex or (not is_alpha and not dtype.is_floating_point):
        found = dtype_name(dtype)
        raise LoraError(f"{source.path}: {key} has dtype {found}; expected floating-point numbers")
    return source.get(key)


def _refuse(source: TensorSource, matches: Mapping[str, re.Match[str] | None]) -> None:
    if not any(matches.values()) and not any(
        word in key for key in source for words, _ in _REFUSED for word in words
    ):
        return
    for key, match in matches.items():
        for words, what in _REFUSED:
            if match is None and any(word in key for word in words):
                raise LoraError(f"{source.path}: {key} is of {what}")
    odd = [key for key, match in matches.items() if match is None]
    if odd and detect(source).kind != "lora":
        raise LoraError(_not_a_lora(source))
    if odd:
        raise LoraError(
            f"{source.path}: {len(odd)} of its {len(matches)} tensors are no part of a LoRA that is known"
            f" here, such as {odd[0]} (whole weights or biases are read if peft's adapter_config.json tells"
            " of them: modules_to_save, bias)"
        )


def _not_a_lora(source: TensorSource) -> str:
    kind = detect(source)
    names = {
        "lora": "a LoRA without a module of HunyuanDiT",
        "unknown": "no LoRA of a kind that is known here",
    }
    what = names.get(kind.kind, kind.name)
    advice = f"its first tensor is {next(iter(source), 'none')}" if kind.kind == "lora" else ""
    advice = advice or what_to_do(source, kind)
    return f"{source.path} is {what}; expected a LoRA for HunyuanDiT; {advice}"


def _layout(modules: Mapping[str, object], source: TensorSource, diffusers: bool) -> str:
    if any(name.startswith(("lora_unet_", "lora_te", "lora_transformer_", "lycoris_")) for name in modules):
        return "kohya"
    if any(
        name.startswith(("diffusion_model.", "model.diffusion_model.", "text_encoders.")) for name in modules
    ):
        return "comfy"
    if any(".lora.up." in key or ".lora.down." in key for key in source):
        return "tencent-gui"
    return "diffusers" if diffusers else "peft"


def _patch(module: _Module, name: str, scaling: Scaling, source: TensorSource) -> Patch:
    roles = dict(module.roles)
    alpha, bias = roles.pop(_ALPHA, None), roles.pop(_BIAS, None)
    magnitude, peft_magnitude = roles.pop(_MAGNITUDE, None), roles.pop(_PEFT_MAGNITUDE, None)
    patch = _of_kind(roles, name, source)
    patch = replace(patch, scale=patch.file_scale(scaling, own_name(name), alpha))
    if module.whole_bias is not None:
        bias = module.whole_bias
    elif module.up_bias is not None and bias is None:
        bias = module.up_bias.float() * patch.scale
    patch = replace(patch, bias=bias, bias_whole=module.whole_bias is not None)
    if magnitude is None and peft_magnitude is None:
        return patch
    if isinstance(patch, SetWeight):
        raise LoraError(f"{source.path}: {name} has whole weights and a magnitude, which do not go together")
    return _dora(patch, magnitude, peft_magnitude, f"{source.path}: {name}")


def _of_kind(roles: Mapping[_Role, Tensor], name: str, source: TensorSource) -> Patch:
    """The change of a weight that tensors make, at scale 1, if they belong together."""
    if not roles:
        return BiasOnly()
    kind = next(iter(roles)).kind
    patch = None
    if kind is not None and all(role.kind is kind for role in roles):
        patch = kind.from_file({role.name: tensor for role, tensor in roles.items()})
    if patch is None:
        shapes = ", ".join(f"{role.name} {tuple(tensor.shape)}" for role, tensor in roles.items())
        raise LoraError(f"{source.path}: the tensors of {name} do not belong together: {shapes}")
    return patch


def _dora(patch: Patch, magnitude: Tensor | None, peft_magnitude: Tensor | None, where: str) -> DoRA:
    """The patch as a DoRA. PEFT's magnitudes are of rows; of others the shape says which they are."""
    lengths, by_rows = (peft_magnitude, True) if magnitude is None else (magnitude, False)
    assert lengths is not None
    if patch.shape is None:
        return DoRA.over(patch, lengths)
    rows, columns = patch.shape
    count = lengths.numel()
    axis = 0 if by_rows or (lengths.shape[0] == rows and count == rows) else 1
    if count != (columns if axis else rows):
        raise LoraError(f"{where} has a magnitude of {count} values for {rows} x {columns}")
    return DoRA.over(patch, lengths, axis)
