"""The kinds of adapters that are trained, one class each: ``lora.kind`` names them.

A kind says what it trains in a layer, how that begins, which change of :mod:`..lora.kinds` it is in a file,
and what of such a change it continues from.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..lora.kinds import DoRA, LoHa, LoKr, LoRA
from ..lora.patch import Patch
from ..quiet import quiet_imports
from ..weights.frozen import dense
from ..weights.unread import present
from .adapter_layers import AdaptedLinear, LoHaLinear, LoKrLinear
from .lora_section import LoraSection

Shapes = dict[str, tuple[int, ...]]
_NAME = "default"  # of the one adapter, inside peft's layers


class Plan(NamedTuple):
    """What one layer gets."""

    rows: int
    columns: int
    rank: int
    strength: float


class TrainedKind(ABC):
    """One kind. The names of what it trains are those of the checkpoints, behind the layer's name."""

    patch: ClassVar[type[Patch]]
    """What it is in a file."""

    def __init__(self, config: LoraSection) -> None:
        self.config = config

    def scale(self, plan: Plan) -> float:
        """The factor on the change of a layer."""
        return plan.strength

    @abstractmethod
    def shapes(self, plan: Plan) -> Shapes:
        """What is trained in a layer."""

    @abstractmethod
    def inject(self, network: nn.Module, plans: Mapping[str, Plan]) -> None:
        """Put layers over those of these names; their values come from :meth:`start`."""

    @abstractmethod
    def parameters(self, layer: Any) -> dict[str, nn.Parameter]:
        """What is trained in a layer of :meth:`inject`."""

    @abstractmethod
    def start(self, layer: Any, generator: torch.Generator) -> None:
        """The first values, with which the layer computes what the base does."""

    @abstractmethod
    def to_patch(self, values: Mapping[str, Tensor], plan: Plan) -> Patch:
        """The change that these values are."""

    @abstractmethod
    def continued(self, patch: Patch, plan: Plan) -> dict[str, Tensor]:
        """The values that continue a change of :attr:`patch`'s class.

        Smaller than :meth:`shapes` in the dimension of the rank where its own is smaller: what is beyond
        begins as in a new run. Raises :class:`ConfigError`, without the file's name.
        """


class _LoRA(TrainedKind):
    """peft's layers."""

    patch = LoRA

    def shapes(self, plan: Plan) -> Shapes:
        found: Shapes = {"lora_A": (plan.rank, plan.columns), "lora_B": (plan.rows, plan.rank)}
        return {**found, "magnitude": (plan.rows,)} if self.config.dora else found

    def inject(self, network: nn.Module, plans: Mapping[str, Plan]) -> None:
        with quiet_imports():
            from peft import LoraConfig, inject_adapter_in_model

        rank = Counter(plan.rank for plan in plans.values()).most_common(1)[0][0]
        settings = LoraConfig(
            r=rank,
            lora_dropout=self.config.dropout,
            use_dora=self.config.dora,
            target_modules=list(plans),
            rank_pattern={
                f"^{re.escape(name)}": plan.rank for name, plan in plans.items() if plan.rank != rank
            },
        )
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(settings, network, adapter_name=_NAME)
        for name, plan in plans.items():
            layer: Any = network.get_submodule(name)
            layer.scaling[_NAME] = plan.strength

    def parameters(self, layer: Any) -> dict[str, nn.Parameter]:
        found = {"lora_A": layer.lora_A[_NAME].weight, "lora_B": layer.lora_B[_NAME].weight}
        if _NAME in layer.lora_magnitude_vector:
            found["magnitude"] = layer.lora_magnitude_vector[_NAME].weight
        return found

    @torch.no_grad()
    def start(self, layer: Any, generator: torch.Generator) -> None:
        """As in Hu et al. 2021: A random, B zero; DoRA starts at the lengths of the base's weights."""
        base, down, up = layer.base_layer, layer.lora_A[_NAME], layer.lora_B[_NAME]
        device = down.weight.device
        bound = 1 / math.sqrt(down.in_features)
        if device.type != "meta":
            start = torch.empty(down.weight.shape).uniform_(-bound, bound, generator=generator)
            down.weight = nn.Parameter(start.to(device))
        up.weight = nn.Parameter(torch.zeros(up.weight.shape, device=device))
        if _NAME in layer.lora_magnitude_vector:
            weight = dense(present(base.weight), torch.float32)
            magnitude = layer.lora_magnitude_vector[_NAME]
            magnitude.weight = nn.Parameter(torch.linalg.norm(weight, dim=1))

    def to_patch(self, values: Mapping[str, Tensor], plan: Plan) -> Patch:
        patch = LoRA({"down": values["lora_A"], "up": values["lora_B"]}, plan.strength)
        return patch if "magnitude" not in values else DoRA.over(patch, values["magnitude"])

    def continued(self, patch: Patch, plan: Plan) -> dict[str, Tensor]:
        dora = isinstance(patch, DoRA)
        if dora != self.config.dora:
            raise ConfigError(
                f"is {'a' if dora else 'no'} DoRA: set lora.dora = {str(not self.config.dora).lower()}"
            )
        values = {
            "lora_A": patch.tensors["down"],
            "lora_B": patch.tensors["up"].float() * (patch.scale / plan.strength),
        }
        if isinstance(patch, DoRA):
            values["magnitude"] = patch.magnitude.flatten()
        return values


class _OwnLayers(TrainedKind):
    """What LoHa and LoKr share: names are those of the files, ``hada_w1_a``."""

    layer: ClassVar[type[AdaptedLinear]]

    def inject(self, network: nn.Module, plans: Mapping[str, Plan]) -> None:
        for name, plan in plans.items():
            parent, _, last = name.rpartition(".")
            base: Any = network.get_submodule(name)
            shapes: Any = {key.removeprefix(self.patch.prefix): s for key, s in self.shapes(plan).items()}
            layer = self.layer(base, shapes, self.scale(plan), rank_dropout=self.config.rank_dropout)
            setattr(network.get_submodule(parent), last, layer)

    def parameters(self, layer: Any) -> dict[str, nn.Parameter]:
        return {f"{self.patch.prefix}{name}": value for name, value in layer.factors.items()}

    def to_patch(self, values: Mapping[str, Tensor], plan: Plan) -> Patch:
        tensors = {name.removeprefix(self.patch.prefix): value for name, value in values.items()}
        return self.patch(tensors, self.scale(plan))


class _LoHa(_OwnLayers):
    patch, layer = LoHa, LoHaLinear

    def shapes(self, plan: Plan) -> Shapes:
        tall, wide = (plan.rows, plan.rank), (plan.rank, plan.columns)
        return {"hada_w1_a": tall, "hada_w1_b": wide, "hada_w2_a": tall, "hada_w2_b": wide}

    @torch.no_grad()
    def start(self, layer: Any, generator: torch.Generator) -> None:
        """As lycoris-lora starts it: normal values, of which those in w2_a are 0."""
        for name, deviation in (("w1_a", 0.1), ("w1_b", 1.0), ("w2_b", 1.0)):
            _fill(layer.factors[name], lambda t, d=deviation: t.normal_(std=d, generator=generator))

    def continued(self, patch: Patch, plan: Plan) -> dict[str, Tensor]:
        given = {name: tensor.float() for name, tensor in patch.tensors.items()}
        given["w2_a"] = given["w2_a"] * (patch.scale / self.scale(plan))
        # A rank beyond its own would change the product by what it begins with in one of the two.
        for name in ("w1_a", "w2_a"):
            given[name] = _widened(given[name], plan.rank, 1)
        return {f"hada_{name}": tensor for name, tensor in given.items()}


class _LoKr(_OwnLayers):
    patch, layer = LoKr, LoKrLinear

    def scale(self, plan: Plan) -> float:
        """1 where both matrices are whole, as everywhere: alpha and rank mean nothing there."""
        shapes = self.shapes(plan)
        return 1.0 if "lokr_w1" in shapes and "lokr_w2" in shapes else plan.strength

    def shapes(self, plan: Plan) -> Shapes:
        config = self.config
        (left, below), (above, right) = (
            divided(plan.rows, config.factor),
            divided(plan.columns, config.factor),
        )
        found = self._matrix("lokr_w1", left, above, None if not config.decompose_both else plan.rank)
        return {**found, **self._matrix("lokr_w2", below, right, plan.rank)}

    def _matrix(self, name: str, rows: int, columns: int, rank: int | None) -> Shapes:
        """As lycoris-lora: a matrix is whole unless two of this rank have fewer rows and columns."""
        if rank is None or self.config.full_matrix or rank >= max(rows, columns) / 2:
            return {name: (rows, columns)}
        return {f"{name}_a": (rows, rank), f"{name}_b": (rank, columns)}

    @torch.no_grad()
    def start(self, layer: Any, generator: torch.Generator) -> None:
        """As lycoris-lora starts it: Kaiming's uniform values, and zeros in the last factor."""
        for name in ("w1", "w1_a", "w1_b", "w2_a"):
            if name in layer.factors:
                bound = 1 / math.sqrt(layer.factors[name].shape[1])
                _fill(layer.factors[name], lambda t, b=bound: t.uniform_(-b, b, generator=generator))

    def continued(self, patch: Patch, plan: Plan) -> dict[str, Tensor]:
        given = {name: tensor.float() for name, tensor in patch.tensors.items()}
        wanted = {name.removeprefix("lokr_") for name in self.shapes(plan)}
        for name, key in (("w1", "decompose_both = false"), ("w2", "full_matrix = true")):
            if name in given and name not in wanted:
                raise ConfigError(f"has its {name} whole: set lora.{key}, or a higher rank")
            if name not in given and name in wanted:
                given[name] = given.pop(f"{name}_a") @ given.pop(f"{name}_b")
            elif name not in wanted:
                given[f"{name}_b"] = _widened(given[f"{name}_b"], plan.rank, 0)
        self._check_factor(given, plan)
        last = "w2" if "w2" in given else "w2_b"
        given[last] = given[last] * (patch.scale / self.scale(plan))
        return {f"lokr_{name}": tensor for name, tensor in given.items()}

    def _check_factor(self, given: Mapping[str, Tensor], plan: Plan) -> None:
        """Raise where the file divides a layer of this size in another way."""
        sides = (given.get("w1", given.get("w1_a")), given.get("w1", given.get("w1_b")))
        left = (sides[0].shape[0], sides[1].shape[1])  # type: ignore[union-attr]
        ours = (divided(plan.rows, self.config.factor)[0], divided(plan.columns, self.config.factor)[0])
        if left == ours:
            return
        fits = [n for n in (-1, *left) if left == (divided(plan.rows, n)[0], divided(plan.columns, n)[0])]
        advice = f"set lora.factor = {fits[0]}" if fits else "no lora.factor divides them so"
        raise ConfigError(
            f"has left matrices of {left[0]} x {left[1]} where this run (lora.factor = {self.config.factor}) "
            f"has {ours[0]} x {ours[1]}: {advice}"
        )


KINDS: Mapping[str, type[TrainedKind]] = {"lora": _LoRA, "loha": _LoHa, "lokr": _LoKr}


def divided(size: int, factor: int) -> tuple[int, int]:
    """``size`` as a product of two, the smaller first, as lycoris-lora divides the sides of a layer.

    ``factor`` is one of them; where it divides nothing, or is -1, the largest divisor up to it and to the
    root of ``size``.
    """
    if factor > 0 and size % factor == 0:
        small, large = sorted((factor, size // factor))
        return small, large
    most = size if factor < 0 else factor
    small = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0 and n <= most)
    return small, size // small


def _fill(parameter: nn.Parameter, draw: Any) -> None:
    if parameter.device.type != "meta":
        parameter.copy_(draw(torch.empty(parameter.shape)))


def _widened(tensor: Tensor, rank: int, axis: int) -> Tensor:
    """With zeros for the ranks that it lacks."""
    lacking = rank - tensor.shape[axis]
    if lacking <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = lacking
    return torch.cat([tensor, tensor.new_zeros(shape)], axis)
