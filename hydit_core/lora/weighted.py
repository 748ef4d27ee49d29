"""Works strengths and block weights into a LoRA itself, for when there is no model to apply it to."""

from __future__ import annotations

from dataclasses import replace

from ..errors import ConfigError, LoraError
from .adapter import Adapter
from .blocks import BlockWeights, check_strength, depth_of
from .combined import combined_metadata, recipe_entry
from .patch import Patch
from .summary import known_depth


def weighted(adapter: Adapter, strength: float, weights: BlockWeights, depth: int | None = None) -> Adapter:
    """A LoRA that has the same effect at strength 1 as this one with a strength and block weights.

    Args:
        depth: see :func:`factors`.

    Raises:
        LoraError: a DoRA at another strength than 1.
        ConfigError: see :func:`factors`.
    """
    shares = factors(adapter, strength, weights, depth)
    modules = {
        module: [_scaled(patch, shares[module], adapter.name) for patch in patches]
        for module, patches in adapter.modules.items()
    }
    metadata = combined_metadata([(adapter, strength)], [recipe_entry(adapter, strength, weights)])
    return replace(adapter, modules=modules, metadata=metadata)


def factors(
    adapter: Adapter, strength: float, weights: BlockWeights, depth: int | None = None
) -> dict[str, float]:
    """By module: the strength times the weight of its block.

    Args:
        depth: how many blocks the model has. Default: as many as a list has numbers, or as the known model
            has whose dimensions these are. Only curves need it.

    Raises:
        ConfigError: the strength is not finite, the weights are not for so many blocks, the LoRA
            is for more, or a curve has no depth.
    """
    check_strength(strength, adapter.name)
    if depth is None:
        depth = told_depth(adapter, weights)
    if depth is None:
        raise ConfigError(
            f"block weights {weights}: {adapter.name} fits no known model, so give the number of blocks of "
            "yours (--blocks), or a number for each block"
        )
    blocks = depth_of(adapter.modules)
    if blocks > depth:
        raise ConfigError(
            f"{depth} blocks to weight, but {adapter.name} is for a model with {blocks} or more"
        )
    return {module: strength * weights.of(module, depth) for module in adapter.modules}


def told_depth(adapter: Adapter, weights: BlockWeights) -> int | None:
    """The number of blocks to weight, if the weights and the LoRA tell; None if they don't."""
    blocks = depth_of(adapter.modules)
    if blocks and weights.weights.values:
        return len(weights.weights.values)
    if not blocks or weights.weights.curve == "uniform":
        return blocks
    return known_depth(adapter)


def _scaled(patch: Patch, factor: float, name: str) -> Patch:
    if factor == 1:
        return patch
    if patch.needs_base:
        raise LoraError(
            f"{name} {patch.needs_base}, into which no strength but 1 can be worked: leave it at 1 here, and "
            "set it where the LoRA is loaded"
        )
    return patch.scaled(factor)
