"""The one form that every LoRA file is read into, and what it does to a weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LoraError
from ..weights.source import cast
from .products import hadamard_norm, product_norm

__all__ = [
    "PARTIAL_HELP",
    "PARTS",
    "PART_NAMES",
    "Adapter",
    "LoraError",
    "Match",
    "Patch",
    "changed",
    "changed_bias",
    "module_shapes",
]

PARTS = ("dit", "bert", "t5")
"""What can be adapted; the first word of a module's key."""

PART_NAMES = {"dit": "the DiT", "bert": "BERT", "t5": "mT5"}
"""Those, for people."""

PARTIAL_HELP = "accept a LoRA of which more than a tenth is for layers that the model does not have"
"""Of the option, wherever a command has it."""

# Numbers of a layer; the widest matrices of DiT-g/2 and mT5-XL that are no tables have 10 million.
_LARGEST = 2**27

_KIND_NAMES = {
    "lora": "LoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "diff": "full difference",
    "set": "whole weights",
}


@dataclass(frozen=True)
class Patch:
    """A change of one weight, or of some of its rows, at strength 1.

    A weight with more than two dimensions counts as a matrix: its first dimension by all others.

    Attributes:
        kind: ``lora``: ``down`` (r, in), ``up`` (out, r); ``loha``: ``w1_a`` and ``w2_a`` (out, r), ``w1_b``
            and ``w2_b`` (r, in); ``lokr``: ``w1`` or its factors ``w1_a``, ``w1_b``, likewise ``w2``;
            ``diff``: ``diff``, the change itself; ``set``: ``value``, which takes the weight's place. A
            change of the bias alone has no tensors.
        scale: the true scale, alpha / r (rank-stabilized: alpha / sqrt(r)).
        rows: which rows of a fused projection it is for; None: all.
        magnitude: DoRA's m: the norm that each output row (axis 0) or input column (axis 1) gets.
        bias: is added to the bias.
        bias_whole: it takes the bias's place instead.
    """

    kind: str
    tensors: dict[str, Tensor]
    scale: float = 1.0
    rows: tuple[int, int] | None = None
    magnitude: Tensor | None = None
    magnitude_axis: int = 0
    bias: Tensor | None = None
    bias_whole: bool = False

    @property
    def whole(self) -> bool:
        """Whether something takes the base's place, so that what changes depends on the base."""
        return self.kind == "set" or self.bias_whole

    @property
    def shape(self) -> tuple[int, int] | None:
        """Rows and columns of what it is added to; None if it changes the bias alone."""
        t = self.tensors
        if not t:
            return None
        if self.kind == "lora":
            return t["up"].shape[0], _columns(t["down"])
        if self.kind == "loha":
            return t["w1_a"].shape[0], _columns(t["w1_b"])
        if self.kind == "lokr":
            one, two = _factor_shape(t, "w1"), _factor_shape(t, "w2")
            return one[0] * two[0], one[1] * two[1]
        value = t["value" if self.kind == "set" else "diff"]
        return value.shape[0], _columns(value)

    @property
    def rank(self) -> int:
        """The number r of its factors; 0 without factors (a full difference)."""
        for name in ("down", "w1_b", "w2_b"):
            if name in self.tensors:
                return self.tensors[name].shape[0]
        return 0

    @property
    def alpha(self) -> float:
        """What files hold: scale * r; 0 without factors."""
        return self.scale * self.rank

    def delta(self) -> Tensor:
        """The change as a float32 matrix (rows, in), without the magnitude.

        Raises:
            LoraError: for a change of the bias alone, for whole weights, and for a product that is larger
                than any layer.
        """
        t = self.tensors
        if self.shape is None:
            raise LoraError("a change of the bias alone has no matrix")
        if self.kind == "set":
            raise LoraError("whole weights are no difference without the base's")
        if self.kind in ("loha", "lokr") and math.prod(self.shape) > _LARGEST:
            rows, columns = self.shape
            raise LoraError(f"its factors stand for {rows:,} x {columns:,}, which is larger than any layer")
        if self.kind == "lora":
            return self.scale * (_matrix(t["up"]) @ _matrix(t["down"]))
        if self.kind == "loha":
            one, two = (_matrix(t[f"{w}_a"]) @ _matrix(t[f"{w}_b"]) for w in ("w1", "w2"))
            return self.scale * (one * two)
        if self.kind == "lokr":
            return self.scale * torch.kron(_factor(t, "w1"), _factor(t, "w2"))
        return self.scale * _matrix(t["diff"])

    def norm(self) -> float:
        """The Frobenius norm of :meth:`delta`, without making that matrix; 0 where there is none."""
        t = {name: _matrix(tensor) for name, tensor in self.tensors.items()}
        if not t or self.kind == "set":
            return 0.0
        if self.kind == "lora":
            norm = product_norm(t["up"], t["down"])
        elif self.kind == "loha":
            norm = hadamard_norm(t["w1_a"], t["w1_b"], t["w2_a"], t["w2_b"])
        elif self.kind == "lokr":
            norm = _factor_norm(t, "w1") * _factor_norm(t, "w2")
        else:
            norm = float(t["diff"].double().norm())
        return abs(self.scale) * norm

    def not_finite(self) -> int:
        """How many of its numbers, its scale among them, are infinite or NaN."""
        parts = [*self.tensors.values(), *(t for t in (self.magnitude, self.bias) if t is not None)]
        wrong = sum(tensor.numel() - int(tensor.float().isfinite().sum()) for tensor in parts)
        return wrong + (not math.isfinite(self.scale))


@dataclass(frozen=True)
class Match:
    """Which modules of an adapter a model has; both in the adapter's order."""

    matched: list[str]
    unmatched: list[str]

    def __str__(self) -> str:
        text = f"{len(self.matched)} of {len(self.matched) + len(self.unmatched)} modules"
        return text + (f", not {_some(self.unmatched)}" if self.unmatched else "")


@dataclass
class Adapter:
    """A LoRA: the changes of each module, by its canonical name behind its part.

    Names: ``dit.blocks.0.attn1.Wqkv`` (Tencent's), ``bert.encoder.layer.0.attention.self.query`` and
    ``t5.encoder.block.0.layer.0.SelfAttention.q`` (transformers').

    Attributes:
        files: the files and folders that it was made from, which no output replaces.
    """

    modules: dict[str, list[Patch]]
    name: str = "LoRA"
    format: str = "peft"
    metadata: dict[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def parts(self) -> set[str]:
        """The parts it changes: ``dit``, ``bert``, ``t5``."""
        return {key.partition(".")[0] for key in self.modules}

    def part(self, part: str) -> dict[str, list[Patch]]:
        """The changes of one part, by module names without the part."""
        return {key[len(part) + 1 :]: p for key, p in self.modules.items() if key.startswith(part + ".")}

    def ranks(self) -> list[int]:
        """The ranks that occur, smallest first."""
        return sorted({patch.rank for patches in self.modules.values() for patch in patches if patch.rank})

    def require_finite(self) -> None:
        """Raise :class:`LoraError` if a number is infinite or NaN, naming the first such module."""
        for module, patches in self.modules.items():
            if count := sum(patch.not_finite() for patch in patches):
                raise LoraError(
                    f"{self.name}: {module} has {count:,} numbers that are not finite; it is damaged"
                )

    def trigger(self) -> str:
        """The words that call it up, from the metadata; empty if it says none."""
        for key in ("hydit.trigger", "modelspec.trigger_phrase"):
            if self.metadata.get(key):
                return self.metadata[key]
        return ""

    def describe(self) -> str:
        """One line that says what this is."""
        counts = [(len(self.part(part)), name) for part, name in PART_NAMES.items()]
        patches = [patch for own in self.modules.values() for patch in own]
        kinds = sorted({_KIND_NAMES[patch.kind] for patch in patches if patch.tensors})
        if any(patch.magnitude is not None for patch in patches):
            kinds.append("DoRA")
        where = [f"{count} of {name}" for count, name in counts if count]
        if where:
            word = "module" if where[0].startswith("1 ") else "modules"
            where[0] = where[0].replace(" ", f" {word} ", 1)
        ranks = ", ".join(map(str, self.ranks()))
        kind = f"{'+'.join(kinds) or 'bias'}{f' of rank {ranks}' if ranks else ''}"
        return f"{self.format} {kind}: {', '.join(where)}"

    def matched(self, shapes: Mapping[str, Sequence[int]]) -> Match:
        """Which modules are among ``shapes`` (see :func:`module_shapes`), whether they fit or not."""
        found = [key for key in self.modules if key in shapes]
        return Match(found, [key for key in self.modules if key not in shapes])

    def require(self, shapes: Mapping[str, Sequence[int]], *, base: str, partial: bool = False) -> Match:
        """As :meth:`matched`, but what cannot be applied is an error.

        Args:
            shapes: of the weights, by module key.
            base: what the weights are, for the message.
            partial: more than a tenth of the modules that it has for a part of the base may be missing there.

        Raises:
            LoraError: if no module matches, too few do, or one has another size.
        """
        match = self.matched(shapes)
        if not match.matched:
            raise LoraError(
                f"{self.name} ({self.describe()}) has nothing for {base}: none of its modules is there,"
                f" such as {_some(match.unmatched)}"
            )
        if not partial:
            self._check_share(match, {key.partition(".")[0] for key in shapes}, base)
        wrong = [text for key in match.matched if (text := self._misfit(key, shapes[key]))]
        if wrong:
            raise LoraError(
                f"{self.name} ({self.describe()}) is for a model of other dimensions than {base}:"
                f" {len(wrong)} of {len(match.matched)} modules do not fit, such as {wrong[0]}"
            )
        return match

    def _check_share(self, match: Match, parts: set[str], base: str) -> None:
        """Raise where a part that is there lacks too much of what this changes in it."""
        for part in PARTS:
            missing = [key for key in match.unmatched if key.startswith(f"{part}.")]
            addressed = len(missing) + sum(key.startswith(f"{part}.") for key in match.matched)
            if part in parts and len(missing) * 10 > addressed:
                raise LoraError(
                    f"{self.name} ({self.describe()}): {len(missing)} of its {addressed} modules for "
                    f"{PART_NAMES[part]} are not in {base}, such as {_some(missing)}; it seems to be of "
                    "another model. To use the rest of it: --partial, or partial on the node"
                )

    def _misfit(self, key: str, shape: Sequence[int]) -> str:
        out, columns = shape[0], math.prod(shape[1:])
        for patch in self.modules[key]:
            start, stop = patch.rows or (0, out)
            if patch.shape is not None and (stop > out or patch.shape != (stop - start, columns)):
                rows = f"rows {start} to {stop} of " if patch.rows else ""
                there = " x ".join(map(str, patch.shape))
                return f"{key}: {there} for {rows}a weight of {' x '.join(map(str, shape))}"
        return ""


def module_shapes(shapes: Mapping[str, Sequence[int]], part: str = "dit") -> dict[str, tuple[int, ...]]:
    """A state dict's shapes by an adapter's module keys: ``mlp_t5.0.weight`` becomes ``dit.mlp_t5.0``.

    Parameters outside of layers (``text_embedding_padding``) keep their names; biases have no key.
    """
    return {
        f"{part}.{name.removesuffix('.weight')}": tuple(shape)
        for name, shape in shapes.items()
        if not name.endswith(".bias")
    }


def changed(
    weight: Tensor, patches: Iterable[Patch], strength: float = 1.0, *, dtype: torch.dtype | None = None
) -> Tensor:
    """A weight with patches at a strength: W + s * delta, in float32, as a new tensor.

    With DoRA the full change is m * (W + delta) / ||W + delta|| - W, of which ``strength`` is taken. The
    result has the weight's device and shape, and its dtype unless another is given; ``weight`` is not
    written to. Several patches are applied one after another: a DoRA normalizes what those before it have
    left.
    """
    result = weight.detach().to(torch.float32, copy=True)
    matrix = result.view(result.shape[0], -1)
    for patch in patches:
        if patch.tensors:
            start, stop = patch.rows or (0, matrix.shape[0])
            _add(matrix[start:stop], patch, strength)
    return cast(result, dtype or weight.dtype)


def _add(target: Tensor, patch: Patch, strength: float) -> None:
    if patch.kind == "lora" and patch.magnitude is None:
        # Without the matrix of the change: large layers would need it twice in memory.
        up, down = (_matrix(patch.tensors[name]).to(target.device) for name in ("up", "down"))
        target.addmm_(up, down, alpha=strength * patch.scale)
        return
    if patch.kind == "set":
        target.lerp_(_matrix(patch.tensors["value"]).to(target.device), strength)
        return
    delta = patch.delta().to(target.device)
    if patch.magnitude is None:
        target.add_(delta, alpha=strength)
        return
    whole = delta.add_(target)
    axis = patch.magnitude_axis
    norm = torch.linalg.vector_norm(whole, dim=1 - axis, keepdim=True)
    magnitude = patch.magnitude.detach().to(target).reshape(norm.shape)
    # A row of zeros has no direction to scale.
    whole.mul_(magnitude / norm.clamp_min(torch.finfo(torch.float32).tiny))
    target.lerp_(whole, strength)


def changed_bias(bias: Tensor, patches: Iterable[Patch], strength: float = 1.0) -> Tensor:
    """A bias with what patches add to it at a strength, as a new tensor of the same dtype."""
    result = bias.detach().to(torch.float32, copy=True)
    for patch in patches:
        if patch.bias is not None:
            start, stop = patch.rows or (0, len(result))
            bias = patch.bias.detach().to(result).reshape(-1)
            change = bias - result[start:stop] if patch.bias_whole else bias
            result[start:stop] += strength * change
    return cast(result, bias.dtype)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.detach().float().reshape(tensor.shape[0], -1)


def _columns(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:])


def _factor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name in tensors:
        return _matrix(tensors[name])
    return _matrix(tensors[f"{name}_a"]) @ _matrix(tensors[f"{name}_b"])


def _factor_norm(tensors: Mapping[str, Tensor], name: str) -> float:
    if name in tensors:
        return float(tensors[name].double().norm())
    return product_norm(tensors[f"{name}_a"], tensors[f"{name}_b"])


def _factor_shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    if name in tensors:
        return tensors[name].shape[0], _columns(tensors[name])
    return tensors[f"{name}_a"].shape[0], _columns(tensors[f"{name}_b"])


def _some(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
