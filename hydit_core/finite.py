"""Finding where the first value that is not finite comes from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

DTYPE_ADVICE = (
    "try dtype bfloat16 or float32, and make sure that the weights are those of a finished training"
)


def is_finite(values: Any) -> bool:
    """False for a tensor that holds an infinity or NaN, and for a sequence or mapping with such a tensor."""
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, tuple | list):
        return all(is_finite(value) for value in values)
    return not isinstance(values, Tensor) or bool(torch.isfinite(values).all())


def why_not_finite(step: int, x: Tensor, network: nn.Module, run: Callable[[], Any], dtype: Any) -> str:
    """One sentence that says why a step's denoised latents are not finite, and what to do about it.

    Args:
        step: counted from 1.
        x: the noisy latents that the step began with.
        network: the DiT, which computes in ``dtype``.
        run: computes the denoised latents from ``x`` again.
    """
    if not is_finite(x):
        origin = "it was given" if step == 1 else "the sampler made"
        advice = "encode the picture again" if step == 1 else "use another sampler or more steps"
        return f"step {step} begins with latents that are not finite, which {origin}; {advice}"
    place = first_overflow(network, run)
    if place is None:
        return (
            f"step {step}: guidance turned the DiT's values, which are finite, into values that are not; "
            "lower cfg, or remove what changes guidance (Perp-Neg divides by zero when its prompts are equal)"
        )
    return f"step {step}: the DiT's values are not finite in {dtype}, {place}; {DTYPE_ADVICE}"


def first_overflow(network: nn.Module, run: Callable[[], Any]) -> str | None:
    """Say where in ``network`` values first cease to be finite while ``run()`` calls it.

    "in its input context", "first in blocks.3.mlp.fc2", "outside its layers"; None if its output is finite.
    """
    places: list[str] = []

    def check_input(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        named = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        if not places:
            places.extend(f"in its input {name}" for name, value in named.items() if not is_finite(value))

    def check_output(place: str) -> Callable[..., None]:
        def check(module: nn.Module, args: Any, output: Any) -> None:
            if not places and not is_finite(output):
                places.append(place)

        return check

    hooks = [network.register_forward_pre_hook(check_input, with_kwargs=True)]
    hooks += [
        module.register_forward_hook(check_output(f"first in {name}" if name else "outside its layers"))
        for name, module in network.named_modules()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return places[0] if places else None
