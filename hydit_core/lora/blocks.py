"""A weight for each block of the DiT, which multiplies the strength of a LoRA."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from ..layer_weights import LayerWeights
from .scaling import LARGEST

# As in names.py: a number with more digits is no block's, and nothing gets its size from it.
_BLOCK = re.compile(r"dit\.blocks\.(0|[1-9][0-9]{0,3})\.")


@dataclass(frozen=True)
class BlockWeights:
    """Weights of a model's blocks: a curve, or a list with one number for each block (40 in DiT-g/2)."""

    weights: LayerWeights = field(default_factory=LayerWeights)

    @classmethod
    def parse(
        cls, source: str | float | Sequence[float] | LayerWeights | BlockWeights | None
    ) -> BlockWeights:
        """As :meth:`LayerWeights.parse`; None is 1 everywhere. Raises :class:`ConfigError`."""
        if isinstance(source, BlockWeights):
            return source
        return cls() if source is None else cls(LayerWeights.parse(source))

    def of(self, module: str, depth: int) -> float:
        """The weight of a module such as ``dit.blocks.3.attn1.Wqkv`` in a model of ``depth`` blocks.

        Modules outside the blocks (the pooler, the embedders, the text encoders) weigh 1.

        Raises :class:`ConfigError` when a list has another length than the model has blocks.
        """
        match = _BLOCK.match(module)
        if match is None:
            return 1.0
        given = len(self.weights.values)
        if given not in (0, depth):
            raise ConfigError(
                f"{given} block weights for a model with {depth} blocks: give {depth} numbers, one for all, "
                "or the name of a curve"
            )
        return self.weights.resolve(depth)[int(match.group(1))]

    def __str__(self) -> str:
        """Text that :meth:`parse` reads back."""
        return str(self.weights)


def depth_of(names: Iterable[str]) -> int:
    """How many blocks a DiT has, from the names of its modules or tensors (``dit.blocks.39.norm1`` ...)."""
    return max((int(match.group(1)) + 1 for name in names if (match := _BLOCK.match(name))), default=0)


def check_strength(strength: float, name: str) -> None:
    """Raises :class:`ConfigError` when a LoRA's strength is not finite, or beyond all use."""
    if not abs(strength) <= LARGEST:
        raise ConfigError(f"strength {strength} of {name}: use a finite number, such as 0.8")


def each_weights(block_weights: Any, count: int) -> list[BlockWeights]:
    """Block weights for each of ``count`` LoRAs: a list with one of each, or the same for all.

    Raises :class:`ConfigError` when :meth:`BlockWeights.parse` does.
    """
    if isinstance(block_weights, list) and any(isinstance(one, BlockWeights) for one in block_weights):
        return block_weights
    return [BlockWeights.parse(block_weights)] * count
