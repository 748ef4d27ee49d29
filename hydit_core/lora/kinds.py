"""The kinds of changes that LoRA files make, one class each.

A new kind is a class here and its place in :data:`KINDS`. Reading, writing, merging and combining ask the
class how its tensors are named, what they amount to and how they change a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import LoraError
from .patch import Patch, upside_down
from .products import hadamard_norm, product_norm

if TYPE_CHECKING:
    from .scaling import Scaling

# Numbers in a layer; the largest matrices of DiT-g/2 and mT5-XL, tables aside, have 10 million.
_LARGEST = 2**27


@dataclass(frozen=True)
class LoRA(Patch):
    """The product of two factors: ``up`` (out, r) @ ``down`` (r, in)."""

    kind = "lora"
    label = "LoRA"
    names = {
        **dict.fromkeys(("lora_A", "lora_down", "lora.down", "lora_linear_layer.down"), "down"),
        **dict.fromkeys(("lora_B", "lora_up", "lora.up", "lora_linear_layer.up"), "up"),
        "lora_embedding_A": "A",
        "lora_embedding_B": "B",
    }
    row_tensors = ("up",)

    @classmethod
    def from_file(cls, tensors: dict[str, Tensor]) -> Patch | None:
        if tensors.keys() == {"A", "B"} and all(tensor.ndim == 2 for tensor in tensors.values()):
            # PEFT keeps the factors of an embedding's transpose.
            tensors = {"down": tensors["B"].T, "up": tensors["A"].T}
        if tensors.keys() != {"down", "up"}:
            return None
        down, up = tensors["down"], tensors["up"]
        return cls(tensors) if up.ndim >= 2 and up.shape[1] == down.shape[0] else None

    def file_tensors(self) -> dict[str, Tensor]:
        return {f"lora_{name}.weight": self.tensors[name] for name in ("up", "down")}

    def peft_tensors(self) -> dict[str, Tensor] | None:
        return {"lora_A.weight": self.tensors["down"], "lora_B.weight": self.tensors["up"]}

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensors["up"].shape[0], _columns(self.tensors["down"])

    @property
    def rank(self) -> int:
        return self.tensors["down"].shape[0]

    def delta(self) -> Tensor:
        return self.scale * (_matrix(self.tensors["up"]) @ _matrix(self.tensors["down"]))

    def norm(self) -> float:
        return abs(self.scale) * product_norm(_matrix(self.tensors["up"]), _matrix(self.tensors["down"]))

    def add_to(self, target: Tensor, strength: float) -> None:
        # Without the matrix of the change, of which a large layer would need two in memory.
        up, down = (_matrix(self.tensors[name]).to(target.device) for name in ("up", "down"))
        target.addmm_(up, down, alpha=strength * self.scale)

    def widened(self, rows: int) -> LoRA:
        """A change of some rows as one of all ``rows`` rows, which is zero elsewhere."""
        up = self.tensors["up"].detach().reshape(-1, self.rank)
        start, stop = self.span(rows)
        whole = up.new_zeros(rows, self.rank)
        whole[start:stop] = up
        return replace(self, tensors={"down": self.tensors["down"], "up": whole}, rows=None)


def _factor_names(prefix: str, *names: str) -> dict[str, str]:
    return {f"{prefix}{name}": name for name in names}


@dataclass(frozen=True)
class LoHa(Patch):
    """The elementwise product of two low-rank products: (``w1_a`` @ ``w1_b``) * (``w2_a`` @ ``w2_b``)."""

    kind = "loha"
    label = "LoHa"
    prefix = "hada_"
    names = _factor_names(prefix, "w1_a", "w1_b", "w2_a", "w2_b")
    row_tensors = ("w1_a", "w2_a")

    @classmethod
    def from_file(cls, tensors: dict[str, Tensor]) -> Patch | None:
        return cls(tensors) if _is_pair(tensors, "w1") and _is_pair(tensors, "w2") else None

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensors["w1_a"].shape[0], _columns(self.tensors["w1_b"])

    @property
    def rank(self) -> int:
        return self.tensors["w1_b"].shape[0]

    def delta(self) -> Tensor:
        _check_size(self.shape)
        one, two = (_matrix(self.tensors[f"{w}_a"]) @ _matrix(self.tensors[f"{w}_b"]) for w in ("w1", "w2"))
        return self.scale * (one * two)

    def norm(self) -> float:
        factors = (_matrix(self.tensors[name]) for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        return abs(self.scale) * hadamard_norm(*factors)


@dataclass(frozen=True)
class LoKr(Patch):
    """The Kronecker product of ``w1`` and ``w2``, each a matrix or two factors, ``w1_a`` @ ``w1_b``."""

    kind = "lokr"
    label = "LoKr"
    prefix = "lokr_"
    names = _factor_names(prefix, "w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")

    @classmethod
    def from_file(cls, tensors: dict[str, Tensor]) -> Patch | None:
        for name in ("w1", "w2"):
            pair = f"{name}_a" in tensors and f"{name}_b" in tensors
            if pair == (name in tensors) or (pair and not _is_pair(tensors, name)):
                return None
        return cls(tensors)

    def file_scale(self, scaling: Scaling, module: str, alpha: Tensor | None) -> float:
        if self.rank == 0 and scaling.config is not None:
            return scaling.config.without_factors(module)
        return super().file_scale(scaling, module, alpha)

    @property
    def shape(self) -> tuple[int, int]:
        one, two = self._shape("w1"), self._shape("w2")
        return one[0] * two[0], one[1] * two[1]

    @property
    def rank(self) -> int:
        return next((self.tensors[n].shape[0] for n in ("w1_b", "w2_b") if n in self.tensors), 0)

    def delta(self) -> Tensor:
        _check_size(self.shape)
        return self.scale * torch.kron(self._factor("w1"), self._factor("w2"))

    def norm(self) -> float:
        return abs(self.scale) * (self._norm("w1") * self._norm("w2"))

    def swapped(self) -> Patch:
        tensors = dict(self.tensors)
        first = "w1" if "w1" in tensors else "w1_a"
        if tensors[first].shape[0] == 1:  # the rows are those of the second factor
            first = "w2" if "w2" in tensors else "w2_a"
        if tensors[first].shape[0] % 2:
            whole = Diff({"diff": self.delta()}, 1.0, self.rows, self.bias, self.bias_whole)
            return whole.swapped()
        tensors[first] = upside_down(tensors[first])
        return replace(super().swapped(), tensors=tensors)

    def _factor(self, name: str) -> Tensor:
        if name in self.tensors:
            return _matrix(self.tensors[name])
        return _matrix(self.tensors[f"{name}_a"]) @ _matrix(self.tensors[f"{name}_b"])

    def _norm(self, name: str) -> float:
        if name in self.tensors:
            return float(_matrix(self.tensors[name]).double().norm())
        return product_norm(_matrix(self.tensors[f"{name}_a"]), _matrix(self.tensors[f"{name}_b"]))

    def _shape(self, name: str) -> tuple[int, int]:
        if name in self.tensors:
            return self.tensors[name].shape[0], _columns(self.tensors[name])
        return self.tensors[f"{name}_a"].shape[0], _columns(self.tensors[f"{name}_b"])


@dataclass(frozen=True)
class Diff(Patch):
    """A full difference: ``diff`` itself is added to the weight, which may be a vector (of a norm)."""

    kind = "diff"
    label = "full difference"
    names = {"diff": "diff", "w_norm": "diff"}
    dimensions = 1
    row_tensors = ("diff",)

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensors["diff"].shape[0], _columns(self.tensors["diff"])

    def delta(self) -> Tensor:
        return self.scale * _matrix(self.tensors["diff"])

    def norm(self) -> float:
        return abs(self.scale) * float(_matrix(self.tensors["diff"]).double().norm())


@dataclass(frozen=True)
class SetWeight(Patch):
    """A whole weight, ``value``, which replaces the base's."""

    kind = "set"
    label = "whole weights"
    names = {"set_weight": "value"}
    dimensions = 1
    comfy_only = True
    row_tensors = ("value",)

    def file_tensors(self) -> dict[str, Tensor]:
        return {"set_weight": self.tensors["value"]}

    @property
    def whole(self) -> bool:
        return True

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensors["value"].shape[0], _columns(self.tensors["value"])

    def delta(self) -> Tensor:
        raise LoraError("whole weights are no difference without the base's")

    def norm(self) -> float:
        return 0.0

    def add_to(self, target: Tensor, strength: float) -> None:
        target.lerp_(_matrix(self.tensors["value"]).to(target.device), strength)


@dataclass(frozen=True)
class BiasOnly(Patch):
    """A change of the bias alone."""

    kind = "bias"
    label = "bias"

    @property
    def shape(self) -> None:
        return None

    def delta(self) -> Tensor:
        raise LoraError("a change of the bias alone has no matrix")

    def norm(self) -> float:
        return 0.0


@dataclass(frozen=True)
class DoRA(Patch):
    """Another kind of change, after which each row or column gets a length of its own.

    At strength 1 the weight W becomes m * (W + delta) / ||W + delta||.

    Attributes:
        magnitude: m, one number for each output row (axis 0) or input column (axis 1).
        axis: which of them.
        form: the kind of change that ``tensors`` make up.
    """

    magnitude: Tensor = field(kw_only=True)
    axis: int = field(default=0, kw_only=True)
    form: type[Patch] = field(default=LoRA, kw_only=True)

    kind = "dora"
    label = "DoRA"
    names = {"dora_scale": "magnitude", "lora_magnitude_vector": "peft_magnitude"}
    dimensions = 1

    @classmethod
    def over(cls, plain: Patch, magnitude: Tensor, axis: int = 0) -> DoRA:
        """The DoRA of a change."""
        common = (plain.tensors, plain.scale, plain.rows, plain.bias, plain.bias_whole)
        return cls(*common, magnitude=magnitude, axis=axis, form=type(plain))

    def file_tensors(self) -> dict[str, Tensor]:
        magnitude = self.magnitude.reshape((1, -1) if self.axis else (-1, 1))
        return {**self.plain.file_tensors(), "dora_scale": magnitude}

    def peft_tensors(self) -> dict[str, Tensor] | None:
        plain = self.plain.peft_tensors()
        if plain is None or self.axis:
            return None
        return {**plain, "lora_magnitude_vector": self.magnitude.flatten()}

    @property
    def plain(self) -> Patch:
        return self.form(self.tensors, self.scale, self.rows, self.bias, self.bias_whole)

    @property
    def whole(self) -> bool:
        return self.plain.whole

    @property
    def needs_base(self) -> str:
        return super().needs_base or "is a DoRA"

    @property
    def shape(self) -> tuple[int, int] | None:
        return self.plain.shape

    @property
    def rank(self) -> int:
        return self.plain.rank

    def delta(self) -> Tensor:
        return self.plain.delta()

    def norm(self) -> float:
        return self.plain.norm()

    def add_to(self, target: Tensor, strength: float) -> None:
        whole = self.delta().to(target.device).add_(target)
        norm = torch.linalg.vector_norm(whole, dim=1 - self.axis, keepdim=True)
        magnitude = self.magnitude.detach().to(target).reshape(norm.shape)
        # A row of zeros has no direction to scale.
        whole.mul_(magnitude / norm.clamp_min(torch.finfo(torch.float32).tiny))
        target.lerp_(whole, strength)

    def swapped(self) -> Patch:
        magnitude = self.magnitude if self.axis else upside_down(self.magnitude)
        return DoRA.over(self.plain.swapped(), magnitude, self.axis)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Patch:
        return DoRA.over(self.plain.mapped(function), function(self.magnitude), self.axis)

    def all_tensors(self) -> list[Tensor]:
        return [*super().all_tensors(), self.magnitude]


KINDS: tuple[type[Patch], ...] = (LoRA, LoHa, LoKr, Diff, SetWeight, DoRA)
"""Every kind that a file's tensors can be of."""


def _is_pair(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Whether two factors are there and fit each other."""
    one, two = tensors.get(f"{name}_a"), tensors.get(f"{name}_b")
    return one is not None and two is not None and one.shape[1] == two.shape[0]


def _check_size(shape: tuple[int, int]) -> None:
    if math.prod(shape) > _LARGEST:
        rows, columns = shape
        raise LoraError(f"its factors stand for {rows:,} x {columns:,}, which is larger than any layer")


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.detach().float().reshape(tensor.shape[0], -1)


def _columns(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:])
