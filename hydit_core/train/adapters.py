"""Adapters in a DiT and its text encoders: where they go, what is trained, reading and writing.

Names here are those of the files: ``dit.blocks.0.attn1.Wqkv``, ``bert.encoder.layer.0.attention.self.query``,
``t5.encoder.block.0.layer.0.SelfAttention.q``. What is trained in a layer is in :mod:`.adapter_kinds`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..data.order import hash_int
from ..errors import ConfigError, LoraError
from ..lora.adapter import Adapter
from ..lora.fuse import fused
from ..lora.patch import Patch
from ..weights.unread import values_of
from .adapter_kinds import KINDS, Plan, TrainedKind
from .lora_section import LoraSection
from .optim import matches

if TYPE_CHECKING:
    from ..text.encoders import TextEncoders

AnyModule = TypeVar("AnyModule", bound=nn.Module)


# Suffixes, those of the DiT as in the published runs (Tencent/HunyuanDiT): pooler.q_proj is one of them.
_ATTENTION = {
    "dit": ("Wqkv", "q_proj", "kv_proj", "out_proj"),
    "bert": ("query", "key", "value", "attention.output.dense"),
    "t5": ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o"),
}
_MLP = {
    "dit": ("mlp.fc1", "mlp.fc2"),
    "bert": ("intermediate.dense", "output.dense"),
    "t5": ("wi_0", "wi_1", "wi", "wo"),
}


def adapted_parts(config: LoraSection, dit: nn.Module, text: TextEncoders) -> dict[str, nn.Module]:
    """The networks that get adapters."""
    wanted = {"dit": True, "bert": config.train_bert, "t5": config.train_t5}
    networks: dict[str, nn.Module] = {"dit": dit, "bert": text.bert, "t5": text.t5}
    return {part: networks[part] for part, use in wanted.items() if use}


def find_targets(
    parts: Mapping[str, nn.Module], config: LoraSection, *, partial: bool = False
) -> dict[str, nn.Linear]:
    """The linear layers that get adapters, by full name.

    ``partial``: not all parts are there, so that a pattern may fit none of their layers.

    A pattern is a suffix of whole words (``Wqkv``, ``mlp.fc1``), a glob over the full name
    (``dit.blocks.3.*``) or, after ``re:``, a regular expression.

    Raises:
        ConfigError: a pattern that fits no linear layer, or a part that none of them fits.
    """
    linear = {
        f"{part}.{name}": module
        for part, network in parts.items()
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
    }
    if config.targets == "all-linear":
        return linear
    if isinstance(config.targets, str):
        with_mlp = config.targets == "attention+mlp"
        suffixes = {part: _ATTENTION[part] + (_MLP[part] if with_mlp else ()) for part in parts}
        return {
            name: layer
            for name, layer in linear.items()
            if any(name.endswith(f".{suffix}") for suffix in suffixes[name.partition(".")[0]])
        }
    found = _fitting("targets", config.targets, linear, partial=partial)
    chosen = {name for names in found.values() for name in names}
    for part in parts:
        if not any(name.startswith(f"{part}.") for name in chosen) and not partial:
            raise ConfigError(
                f"lora.targets: none of the patterns fits a layer of {part}; add one, or set "
                f"lora.train_{part} = false"
            )
    return {name: layer for name, layer in linear.items() if name in chosen}


def _fitting(
    key: str, patterns: Iterable[str], layers: Iterable[str], *, partial: bool
) -> dict[str, list[str]]:
    """The layers that each pattern fits. Raises :class:`ConfigError` if one fits none, unless ``partial``."""
    layers = list(layers)
    found = {
        pattern: [name for name in layers if name.endswith(f".{pattern}") or matches(pattern, name)]
        for pattern in patterns
    }
    idle = [pattern for pattern, names in found.items() if not names]
    if idle and not partial:
        some = ", ".join(layers[:: max(1, len(layers) // 4)][:4])
        raise ConfigError(
            f"lora.{key}: no linear layer fits {', '.join(map(repr, idle))}; names look like: {some}"
        )
    return found


def _by_pattern(
    key: str, values: Mapping[str, float], layers: Iterable[str], *, partial: bool
) -> dict[str, Any]:
    """The value of each layer that a pattern fits; the first counts."""
    found = _fitting(key, values, layers, partial=partial)
    return {name: values[pattern] for pattern in reversed(found) for name in found[pattern]}


def make_plans(targets: Mapping[str, Any], config: LoraSection, *, partial: bool = False) -> dict[str, Plan]:
    """What each of the layers gets, by full name; ``partial`` as in :func:`find_targets`.

    Raises:
        ConfigError: a pattern of ``rank_pattern`` or ``alpha_pattern`` that fits no layer.
    """
    ranks = _by_pattern("rank_pattern", config.rank_pattern, targets, partial=partial)
    alphas = _by_pattern("alpha_pattern", config.alpha_pattern, targets, partial=partial)
    plans = {}
    for name, layer in targets.items():
        rank = ranks.get(name, config.rank)
        strength = config.strength(rank, alphas.get(name, config.alpha))
        plans[name] = Plan(layer.out_features, layer.in_features, rank, strength)
    return plans


def kind_of(config: LoraSection) -> TrainedKind:
    """The kind of adapters that a configuration asks for."""
    return KINDS[config.kind](config)


def parameter_shapes(targets: Mapping[str, nn.Linear], config: LoraSection) -> dict[str, Tensor]:
    """What would be trained, by name, as tensors without content."""
    kind = kind_of(config)
    return {
        f"{name}.{key}": torch.empty(shape, device="meta")
        for name, plan in make_plans(targets, config).items()
        for key, shape in kind.shapes(plan).items()
    }


def inject(parts: Mapping[str, nn.Module], config: LoraSection, *, seed: int, partial: bool = False) -> None:
    """Put adapters, in float32, over the target layers of ``parts``; they change nothing yet.

    A layer's first values are a function of ``seed`` and of its name. ``partial`` as in :func:`find_targets`.
    """
    kind = kind_of(config)
    plans = make_plans(find_targets(parts, config, partial=partial), config, partial=partial)
    for part, network in parts.items():
        own = {name.partition(".")[2]: p for name, p in plans.items() if name.startswith(f"{part}.")}
        kind.inject(network, own)
    for name, layer in adapted_layers(parts):
        if values_of(layer.base_layer.weight) is not None:
            _give_memory(layer)
        generator = torch.Generator().manual_seed(hash_int(seed, "lora", name) >> 1)
        kind.start(layer, generator)


@torch.no_grad()
def _give_memory(layer: nn.Module) -> None:
    """What is trained over a base that is read later is small, and begins with zeros."""
    for name, module in layer.named_children():
        if name != "base_layer":
            for parameter in module.to_empty(device="cpu").parameters():
                parameter.zero_()


def adapted_layers(parts: Mapping[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    """Full name and layer of everything that has an adapter."""
    for part, network in parts.items():
        for name, module in network.named_modules():
            if hasattr(module, "base_layer") and hasattr(module, "_disable_adapters"):
                yield f"{part}.{name}", module


@contextlib.contextmanager
def without_adapters(network: AnyModule) -> Iterator[AnyModule]:
    """``network`` as it was before :func:`inject`, for as long as the context lasts."""
    layers = [layer for _, layer in adapted_layers({"": network})]
    try:
        for layer in layers:
            # peft's own switch would also freeze the adapters, and train all of them afterwards.
            layer._disable_adapters = True
        yield network
    finally:
        for layer in layers:
            layer._disable_adapters = False


def adapter_parameters(parts: Mapping[str, nn.Module], config: LoraSection) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    kind = kind_of(config)
    return {
        f"{name}.{key}": parameter
        for name, layer in adapted_layers(parts)
        for key, parameter in kind.parameters(layer).items()
    }


def adapter_scales(parts: Mapping[str, nn.Module], config: LoraSection) -> dict[str, float]:
    """The factor on the change of each layer that has an adapter, if ``config`` were its configuration."""
    kind, targets = kind_of(config), {name: layer.base_layer for name, layer in adapted_layers(parts)}
    plans = make_plans(targets, config, partial=True)
    return {name: kind.scale(plan) for name, plan in plans.items()}


def to_adapter(
    parts: Mapping[str, nn.Module],
    config: LoraSection,
    metadata: Mapping[str, str],
    whole: Callable[[Tensor], Tensor] | None = None,
) -> Adapter:
    """The adapters as they are now; tensors are shared, not copied, unless ``whole`` has to gather them."""
    kind, layers = kind_of(config), dict(adapted_layers(parts))
    plans = make_plans({name: layer.base_layer for name, layer in layers.items()}, config)
    modules: dict[str, list[Patch]] = {}
    for name, layer in layers.items():
        values = {
            key: (parameter if whole is None else whole(parameter)).detach()
            for key, parameter in kind.parameters(layer).items()
        }
        modules[name] = [kind.to_patch(values, plans[name])]
    return Adapter(modules, format="peft", metadata=dict(metadata))


@torch.no_grad()
def load_adapter(parts: Mapping[str, nn.Module], config: LoraSection, adapter: Adapter, where: str) -> None:
    """Continue from ``adapter``. Layers that it lacks, and ranks beyond its own, begin as in a new run.

    Raises:
        ConfigError: as :func:`starting_values` does.
    """
    parameters = adapter_parameters(parts, config)
    targets = {name: layer.base_layer for name, layer in adapted_layers(parts)}
    for name, value in starting_values(targets, config, adapter, where).items():
        parameters[name][tuple(slice(size) for size in value.shape)] = value.to(parameters[name].device)


def starting_values(
    targets: Mapping[str, nn.Linear], config: LoraSection, adapter: Adapter, where: str
) -> dict[str, Tensor]:
    """The values, by name, that adapters on the layers ``targets`` take to continue ``adapter``.

    Its slices of a fused projection become one LoRA of all of it, whose rank is the sum of theirs. A smaller
    rank than the run's gives the first of its rows and columns.

    Raises:
        ConfigError: it changes layers that this run does not train, or is of another kind or a higher rank.
    """
    foreign = [name for name in adapter.modules if name not in targets]
    if foreign:
        raise ConfigError(
            f"lora.init_from: {where} changes {len(foreign)} layers that this run does not train "
            f"({', '.join(foreign[:3])}): widen lora.targets, lora.train_bert or lora.train_t5"
        )
    kind, plans = kind_of(config), make_plans(targets, config)
    values: dict[str, Tensor] = {}
    for name, patches in adapter.modules.items():
        plan = plans[name]
        patch = _continued(patches, plan, config, f"lora.init_from: {where}", name)
        try:
            given = kind.continued(patch, plan)
        except ConfigError as error:
            raise ConfigError(f"lora.init_from: {where} {error}") from None
        _check_rank(given, kind.shapes(plan), f"lora.init_from: {where}")
        values |= {f"{name}.{key}": value for key, value in given.items()}
    return values


_RANK_AXES = {"A": 0, "B": 1, "a": 1, "b": 0}
"""The dimension that is the rank, by the last letter of what is trained: ``lora_A``, ``hada_w1_a``."""


def _check_rank(given: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    for key, value in given.items():
        axis = _RANK_AXES.get(key[-1])
        if axis is not None and value.shape[axis] > shapes[key][axis]:
            raise ConfigError(
                f"{what} has modules of rank {value.shape[axis]}, this run trains {shapes[key][axis]}: set "
                f"lora.rank = {value.shape[axis]} or more"
            )


def _continued(patches: Sequence[Patch], plan: Plan, config: LoraSection, what: str, name: str) -> Patch:
    """Changes of a layer as one of the run's kind, or a DoRA. Raises :class:`ConfigError` for others."""
    try:
        patch = fused(patches, plan.rows, where=name)
    except LoraError as error:
        raise ConfigError(f"{what}: {error}") from None
    known = {kind.patch: key for key, kind in KINDS.items()}
    own = known.get(type(patch.plain))
    if patch.bias is not None or own is None or (patch is not patch.plain and patch.peft_tensors() is None):
        raise ConfigError(
            f"{what} is not a plain LoRA, LoHa or LoKr at {name}; merge it into the base instead "
            "(python -m hydit_core.lora merge)"
        )
    if own != config.kind:
        raise ConfigError(f"{what} is a {patch.plain.label}: set lora.kind = {own!r}")
    if patch.shape != (plan.rows, plan.columns):
        raise ConfigError(
            f"{what} is for a model of other dimensions: {name} is {patch.shape}, this run trains "
            f"{(plan.rows, plan.columns)}"
        )
    return patch
