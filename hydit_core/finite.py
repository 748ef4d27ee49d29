"""Where the first value that is not finite comes from."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

DTYPE_ADVICE = (
    "try dtype bfloat16 or float32, and make sure that the weights are those of a finished training"
)


def is_finite(values: Any) -> bool:
    """False for a tensor with an infinity or NaN in it, or a sequence with such a tensor."""
    if isinstance(values, tuple | list):
        return all(is_finite(value) for value in values)
    return not isinstance(values, Tensor) or bool(torch.isfinite(values).all())


def first_overflow(network: nn.Module, run: Callable[[], Any]) -> str:
    """Where in ``network`` values first cease to be finite while ``run()`` calls it, in words.

    "in its input context", "first in blocks.3.mlp.fc2", or "outside its layers".
    """
    places: list[str] = []

    def check_input(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        named = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        if not places:
            places.extend(f"in its input {name}" for name, value in named.items() if not is_finite(value))

    def check_output(name: str) -> Callable[..., None]:
        def check(module: nn.Module, args: Any, output: Any) -> None:
            if not places and not is_finite(output):
                places.append(f"first in {name}")

        return check

    hooks = [network.register_forward_pre_hook(check_input, with_kwargs=True)]
    hooks += [m.register_forward_hook(check_output(name)) for name, m in network.named_modules() if name]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return places[0] if places else "outside its layers"
