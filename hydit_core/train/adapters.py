"""LoRA layers in a DiT and its text encoders: where they go, what is trained, reading and writing.

peft provides the layers. Names here are those of the files: ``dit.blocks.0.attn1.Wqkv``,
``bert.encoder.layer.0.attention.self.query``, ``t5.encoder.block.0.layer.0.SelfAttention.q``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from ..data.order import hash_int
from ..data.section import AnyDtypeName, Section
from ..errors import ConfigError, LoraError
from ..lora.adapter import Adapter
from ..lora.fuse import fused
from ..lora.kinds import DoRA, LoRA
from ..lora.patch import Patch
from ..quiet import quiet_imports
from ..weights.frozen import dense
from .model_section import ConfigPath
from .optim import matches

if TYPE_CHECKING:
    from ..text.encoders import TextEncoders

AnyModule = TypeVar("AnyModule", bound=nn.Module)

TARGETS = ("attention", "attention+mlp", "all-linear")


class LoraSection(Section):
    """The table ``lora`` of the configuration."""

    rank: int = Field(default=16, gt=0, le=8192, description="rank of the two matrices of each layer")
    alpha: float | None = Field(
        default=None, gt=0, le=1e6, description="the strength is alpha / rank; unset: the rank, so strength 1"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the adapters' inputs")
    rslora: bool = Field(default=False, description="take alpha / sqrt(rank) as the strength instead")
    dora: bool = Field(default=False, description="DoRA: train the norm of each output's weights separately")
    targets: str | tuple[str, ...] = Field(
        default="attention", description="which linear layers get adapters"
    )
    train_bert: bool = Field(default=False, description="adapters in BERT too")
    train_t5: bool = Field(default=False, description="adapters in mT5 too")
    init_from: ConfigPath | None = Field(
        default=None, description="a LoRA or DoRA to continue from, in any format, of at most this rank"
    )
    base_precision: Annotated[Literal["fp32", "bf16", "fp16", "fp8", "int8", "nf4"] | None, AnyDtypeName] = (
        Field(default=None, description="how the frozen DiT's matrices are stored; unset: run.precision")
    )
    trigger: str = Field(
        default="", description="words in the captions that call up the LoRA, for the exported files"
    )

    @field_validator("targets")
    @classmethod
    def _known_targets(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(targets, str) and targets not in TARGETS:
            raise ValueError(f"use one of {', '.join(TARGETS)}, or a list of patterns such as ['Wqkv']")
        if not targets:
            raise ValueError("an empty list: nothing would be trained")
        return targets

    @property
    def trains_text(self) -> bool:
        return self.train_bert or self.train_t5


_NAME = "default"  # of the one adapter, inside peft's layers

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


def find_targets(parts: Mapping[str, nn.Module], config: LoraSection) -> dict[str, nn.Linear]:
    """The linear layers that get adapters, by full name.

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
    found: dict[str, list[str]] = {
        pattern: [name for name in linear if name.endswith(f".{pattern}") or matches(pattern, name)]
        for pattern in config.targets
    }
    idle = [pattern for pattern, names in found.items() if not names]
    if idle:
        some = ", ".join(list(linear)[:: max(1, len(linear) // 4)][:4])
        raise ConfigError(
            f"lora.targets: no linear layer fits {', '.join(map(repr, idle))}; names look like: {some}"
        )
    chosen = {name for names in found.values() for name in names}
    for part in parts:
        if not any(name.startswith(f"{part}.") for name in chosen):
            raise ConfigError(
                f"lora.targets: none of the patterns fits a layer of {part}; add one, or set "
                f"lora.train_{part} = false"
            )
    return {name: layer for name, layer in linear.items() if name in chosen}


def parameter_shapes(targets: Mapping[str, nn.Linear], config: LoraSection) -> dict[str, Tensor]:
    """What would be trained, by name, as tensors without content."""
    shapes = {}
    for name, layer in targets.items():
        shapes[f"{name}.lora_A"] = torch.empty(config.rank, layer.in_features, device="meta")
        shapes[f"{name}.lora_B"] = torch.empty(layer.out_features, config.rank, device="meta")
        if config.dora:
            shapes[f"{name}.magnitude"] = torch.empty(layer.out_features, device="meta")
    return shapes


def scale_of(config: LoraSection) -> float:
    """The factor on the product of the two matrices."""
    return (config.alpha or config.rank) / (math.sqrt(config.rank) if config.rslora else config.rank)


def inject(parts: Mapping[str, nn.Module], config: LoraSection, *, seed: int) -> None:
    """Put adapters, in float32, over the target layers of ``parts``; they change nothing yet.

    A layer's first values are a function of ``seed`` and of its name.
    """
    with quiet_imports():
        from peft import LoraConfig, inject_adapter_in_model

    targets = find_targets(parts, config)
    for part, network in parts.items():
        names = [name.partition(".")[2] for name in targets if name.startswith(f"{part}.")]
        settings = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha or config.rank,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            use_rslora=config.rslora,
            use_dora=config.dora,
            target_modules=names,
        )
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(settings, network, adapter_name=_NAME)
    for name, layer in adapted_layers(parts):
        generator = torch.Generator().manual_seed(hash_int(seed, "lora", name) >> 1)
        _start(layer, generator)


@torch.no_grad()
def _start(layer: Any, generator: torch.Generator) -> None:
    """As in Hu et al. 2021: A random, B zero; DoRA starts at the lengths of the base's weights."""
    base, down, up = layer.base_layer, layer.lora_A[_NAME], layer.lora_B[_NAME]
    device = base.weight.device
    bound = 1 / math.sqrt(down.in_features)
    if device.type != "meta":
        start = torch.empty(down.weight.shape).uniform_(-bound, bound, generator=generator)
        down.weight = nn.Parameter(start.to(device))
    up.weight = nn.Parameter(torch.zeros(up.weight.shape, device=device))
    if _NAME in layer.lora_magnitude_vector:
        weight = dense(base.weight, torch.float32)
        magnitude = layer.lora_magnitude_vector[_NAME]
        magnitude.weight = nn.Parameter(torch.linalg.norm(weight, dim=1))


def adapted_layers(parts: Mapping[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    """Full name and peft's layer of everything that has an adapter."""
    for part, network in parts.items():
        for name, module in network.named_modules():
            if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
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


def adapter_parameters(parts: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    found: dict[str, nn.Parameter] = {}
    for name, layer in adapted_layers(parts):
        found[f"{name}.lora_A"] = layer.lora_A[_NAME].weight
        found[f"{name}.lora_B"] = layer.lora_B[_NAME].weight
        if _NAME in layer.lora_magnitude_vector:
            found[f"{name}.magnitude"] = layer.lora_magnitude_vector[_NAME].weight
    return found


def to_adapter(
    parts: Mapping[str, nn.Module],
    config: LoraSection,
    metadata: Mapping[str, str],
    whole: Callable[[Tensor], Tensor] | None = None,
) -> Adapter:
    """The adapters as they are now; tensors are shared, not copied, unless ``whole`` has to gather them."""
    parameters: Mapping[str, Tensor] = adapter_parameters(parts)
    if whole is not None:
        parameters = {name: whole(parameter) for name, parameter in parameters.items()}
    scale = scale_of(config)
    modules = {name: [_patch(name, parameters, scale)] for name, _ in adapted_layers(parts)}
    return Adapter(modules, format="peft", metadata=dict(metadata))


def _patch(name: str, parameters: Mapping[str, Tensor], scale: float) -> Patch:
    down, up = parameters[f"{name}.lora_A"].detach(), parameters[f"{name}.lora_B"].detach()
    patch = LoRA({"down": down, "up": up}, scale)
    magnitude = parameters.get(f"{name}.magnitude")
    return patch if magnitude is None else DoRA.over(patch, magnitude.detach())


@torch.no_grad()
def load_adapter(parts: Mapping[str, nn.Module], config: LoraSection, adapter: Adapter, where: str) -> None:
    """Continue from ``adapter``. Layers that it lacks, and ranks beyond its own, begin as in a new run.

    Raises:
        ConfigError: as :func:`starting_values` does.
    """
    parameters = adapter_parameters(parts)
    for name, value in starting_values(parameters, config, adapter, where).items():
        parameters[name][tuple(slice(size) for size in value.shape)] = value.to(parameters[name].device)


def starting_values(
    parameters: Mapping[str, Tensor], config: LoraSection, adapter: Adapter, where: str
) -> dict[str, Tensor]:
    """The values, by name, that ``parameters`` (see :func:`adapter_parameters`) take to continue ``adapter``.

    Its slices of a fused projection become one LoRA of all of it, whose rank is the sum of theirs. A smaller
    rank than the run's gives the first of its rows (``lora_A``) and columns (``lora_B``).

    Raises:
        ConfigError: it changes layers that this run does not train, or is of another kind or a higher rank.
    """
    foreign = [name for name in adapter.modules if f"{name}.lora_A" not in parameters]
    if foreign:
        raise ConfigError(
            f"lora.init_from: {where} changes {len(foreign)} layers that this run does not train "
            f"({', '.join(foreign[:3])}): widen lora.targets, lora.train_bert or lora.train_t5"
        )
    values: dict[str, Tensor] = {}
    for name, patches in adapter.modules.items():
        patch = _continued(patches, parameters[f"{name}.lora_B"].shape[0], name, where)
        dora = isinstance(patch, DoRA)
        if dora != config.dora:
            raise ConfigError(
                f"lora.init_from: {where} is {'a' if dora else 'no'} DoRA: "
                f"set lora.dora = {str(not config.dora).lower()}"
            )
        values[f"{name}.lora_A"] = patch.tensors["down"]
        values[f"{name}.lora_B"] = patch.tensors["up"].float() * (patch.scale / scale_of(config))
        if isinstance(patch, DoRA):
            values[f"{name}.magnitude"] = patch.magnitude.flatten()
    _check_fit(values, parameters, config, where)
    return values


def _check_fit(
    values: Mapping[str, Tensor], parameters: Mapping[str, Tensor], config: LoraSection, where: str
) -> None:
    rank = max(value.shape[0] for name, value in values.items() if name.endswith(".lora_A"))
    if rank > config.rank:
        raise ConfigError(
            f"lora.init_from: {where} has modules of rank {rank}, this run trains {config.rank}: "
            f"set lora.rank = {rank} or more"
        )
    for name, value in values.items():
        size, ours = list(value.shape), list(parameters[name].shape)
        if len(size) == 2:  # the factors' own dimension is the rank
            del size[name.endswith(".lora_B")], ours[name.endswith(".lora_B")]
        if size != ours:
            raise ConfigError(
                f"lora.init_from: {where} is for a model of other dimensions: {name} is "
                f"{tuple(value.shape)}, this run trains {tuple(parameters[name].shape)}"
            )


def _continued(patches: Sequence[Patch], rows: int, name: str, where: str) -> Patch:
    """Changes of a layer of ``rows`` rows as one LoRA or DoRA. Raises :class:`ConfigError` for others."""
    try:
        patch = fused(patches, rows, where=name)
    except LoraError as error:
        raise ConfigError(f"lora.init_from: {where}: {error}") from None
    if patch.bias is not None or patch.peft_tensors() is None:
        raise ConfigError(
            f"lora.init_from: {where} is not a plain LoRA at {name}; merge it into the base instead "
            "(python -m hydit_core.lora merge)"
        )
    return patch
