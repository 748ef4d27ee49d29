"""What a LoRA does to a layer, whatever the kind: the common ground of the classes in :mod:`~.kinds`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from .scaling import Scaling


@dataclass(frozen=True)
class Patch(ABC):
    """A change of one layer at strength 1: of its weight, or some rows of it, and of its bias.

    A weight with more than two dimensions counts as a matrix: its first dimension by all the others.

    Attributes:
        tensors: what the change of the weight is made of, by the names that its class gives; empty if only
            the bias changes.
        scale: the true scale, alpha / r (rank-stabilized: alpha / sqrt(r)).
        rows: the rows of a fused projection that it changes; None: all of them.
        bias: is added to the bias.
        bias_whole: ``bias`` replaces the bias instead.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0
    rows: tuple[int, int] | None = None
    bias: Tensor | None = None
    bias_whole: bool = False

    kind: ClassVar[str]
    """Its name in messages."""
    label: ClassVar[str]
    """Its name in descriptions."""
    names: ClassVar[Mapping[str, str]] = {}
    """Its tensors in ``tensors``, by what files call them behind the module's name."""
    prefix: ClassVar[str] = ""
    """What kohya, LyCORIS and ComfyUI put before those names."""
    dimensions: ClassVar[int] = 2
    """The least that its tensors have in a file."""
    comfy_only: ClassVar[bool] = False
    """Whether only ComfyUI's format has a name for it."""
    row_tensors: ClassVar[tuple[str, ...]] = ()
    """The tensors whose rows are rows of the weight."""

    @classmethod
    def from_file(cls, tensors: dict[str, Tensor]) -> Patch | None:
        """The change that a file's tensors make, by their names in ``tensors``; None if they don't fit."""
        return cls(tensors)

    def file_scale(self, scaling: Scaling, module: str, alpha: Tensor | None) -> float:
        """The scale that a file gives it, on a module of this name with this ``.alpha``."""
        return scaling.of(module, self.rank, alpha)

    def file_tensors(self) -> dict[str, Tensor]:
        """The change of the weight as kohya, LyCORIS and ComfyUI spell it, without alpha."""
        return {f"{self.prefix}{name}": tensor for name, tensor in self.tensors.items()}

    def peft_tensors(self) -> dict[str, Tensor] | None:
        """The change of the weight as PEFT's LoRA spells it; None if PEFT has no such LoRA."""
        return None

    @property
    def plain(self) -> Patch:
        """The change that a DoRA normalizes; of all others itself."""
        return self

    @property
    def whole(self) -> bool:
        """Whether part of it replaces what the base has, so that the change depends on the base."""
        return self.bias_whole

    @property
    def needs_base(self) -> str:
        """Why its effect depends on the weights it is applied to, as a verb phrase; empty if it doesn't."""
        return "has whole weights" if self.whole else ""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int] | None:
        """Rows and columns of the matrix that it is added to; None if only the bias changes."""

    @property
    def rank(self) -> int:
        """The rank r of its factors; 0 if it has none (a full difference)."""
        return 0

    @property
    def alpha(self) -> float:
        """The alpha that files hold, scale * r; 0 without factors."""
        return self.scale * self.rank

    def span(self, rows: int) -> tuple[int, int]:
        """The first row that it changes and the one after the last, in a weight with ``rows`` rows."""
        return self.rows or (0, rows)

    @abstractmethod
    def delta(self) -> Tensor:
        """The change as a float32 matrix (rows, in), without a DoRA's magnitude.

        Raises:
            LoraError: for a change of the bias alone, for whole weights, and for a product that is larger
                than any layer.
        """

    @abstractmethod
    def norm(self) -> float:
        """The Frobenius norm of :meth:`delta`, without computing that matrix; 0 where there is none."""

    def add_to(self, target: Tensor, strength: float) -> None:
        """Apply it to the rows that it changes, a float32 matrix (rows, in), in place."""
        target.add_(self.delta().to(target.device), alpha=strength)

    def swapped(self) -> Patch:
        """The same change for a weight whose upper and lower halves have traded places."""
        tensors = {n: upside_down(t) if n in self.row_tensors else t for n, t in self.tensors.items()}
        return replace(self, tensors=tensors, bias=None if self.bias is None else upside_down(self.bias))

    def scaled(self, factor: float) -> Patch:
        """What it does at strength ``factor``, for a change that does not depend on the base."""
        bias = None if self.bias is None else self.bias * factor
        return replace(self, scale=self.scale * factor, bias=bias)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Patch:
        """A copy in which each tensor, the bias included, is what ``function`` makes of it."""
        tensors = {name: function(tensor) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, bias=None if self.bias is None else function(self.bias))

    def all_tensors(self) -> list[Tensor]:
        """What :meth:`mapped` maps."""
        return [*self.tensors.values(), *([] if self.bias is None else [self.bias])]

    def not_finite(self) -> int:
        """How many of its numbers, the scale among them, are infinite or NaN."""
        wrong = sum(tensor.numel() - int(tensor.float().isfinite().sum()) for tensor in self.all_tensors())
        return wrong + (not math.isfinite(self.scale))


def upside_down(tensor: Tensor) -> Tensor:
    """A tensor whose upper and lower halves of rows have traded places."""
    return tensor.roll(len(tensor) // 2, 0)
