"""Blocks as compiled graphs: one for each of the two kinds, whatever the number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..errors import HyditError
from .trunk import Trunk

_MOST_GRAPHS = 64
"""torch gives up after 8, fewer than some runs have: one for each kind of block, with and without guidance,
times the image prompts that act together."""


def compile_blocks(net: Trunk, *, whole: bool = True, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the blocks of a DiT or ControlNet; a graph is made when the first of its kind runs.

    All blocks share the graphs, also with those of other networks, and weights may change or move between
    calls. Hooks on the blocks themselves stay outside. torch keeps what it has compiled on the disk, so that
    the next process starts warm. Calling it again changes nothing.

    Args:
        whole: raise an error where a graph would have to be split; False for blocks with layers of others in
            them, such as adapters. Weights of other classes, such as quantized ones, may split graphs anyway.
        backend: torch.compile's.
    """
    plain = all(type(parameter) is nn.Parameter for parameter in net.parameters())
    compiled = _compiled(net.block_class.forward, whole and plain, backend)
    for block in net.blocks:
        block.forward = MethodType(compiled, block)


def compile_networks(module: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the blocks of every DiT and ControlNet in a module for training, adapters included."""
    for net in module.modules():
        if isinstance(net, Trunk):
            compile_blocks(net, whole=False, backend=backend)


@cache
def _compiled(
    forward: Callable[..., Any], whole: bool, backend: str | Callable[..., Any]
) -> Callable[..., Any]:
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MOST_GRAPHS)
    run = torch.compile(forward, dynamic=True, fullgraph=whole, backend=backend)

    def compiled(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except Exception as error:
            if not _of_the_compiler(error):
                raise
            inner = getattr(error, "inner_exception", error)
            reason = (str(inner).strip() or type(inner).__name__).splitlines()[0]
            raise HyditError(
                f"torch cannot compile the blocks here ({reason}); it needs a C++ compiler for CPUs and "
                "Triton for GPUs. Leave --compile out to run without"
            ) from error

    return compiled


def _of_the_compiler(error: Exception) -> bool:
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
