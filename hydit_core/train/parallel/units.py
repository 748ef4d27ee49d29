"""What of a model is gathered at once where processes hold parts of it."""

from __future__ import annotations

from torch import Tensor, nn


def units(module: nn.Module) -> list[nn.Module]:
    """The blocks of each network, which stand in lists; what is left belongs to ``module`` itself.

    A list of plain layers, such as a ControlNet's projections, is left: to gather each by itself would take
    too long.
    """
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList) and all(any(True for _ in one.children()) for one in child):
            found += child
        else:
            found += units(child)
    return found


def gathered_bytes(module: nn.Module) -> int:
    """What is whole for a moment in the middle of a step, in the dtypes that ``module`` has.

    A block and the next one, the gradients of a block, those once more in float32 on their way to the
    processes that keep their parts, and the same of what is in no block.
    """
    blocks = units(module)
    in_blocks = {id(p) for block in blocks for p in block.parameters()}
    rest = [p for p in module.parameters() if id(p) not in in_blocks]
    largest = max((list(block.parameters()) for block in blocks), key=_bytes, default=[])
    return 2 * _bytes(largest) + _gradient_bytes(largest) + _bytes(rest) + _gradient_bytes(rest)


def part_size(shape: tuple[int, ...], ranks: int) -> int:
    """How many values the first of ``ranks`` processes holds of a tensor, which is split by rows."""
    rows, *rest = shape
    size = -(-rows // ranks)
    for length in rest:
        size *= length
    return size


def _bytes(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _gradient_bytes(parameters: list[nn.Parameter]) -> int:
    trained: list[Tensor] = [p for p in parameters if p.requires_grad]
    return sum(p.numel() * (p.element_size() + 4) for p in trained)
