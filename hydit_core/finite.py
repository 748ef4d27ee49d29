"""Finding where the first value that is not finite comes from."""

from __future__ import annotations

import contextlib
import inspect
import sys
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


class FiniteWatch:
    """Looks whether each step's values are finite, without a wait for the device between the steps.

    A GPU's host queues a step long before it is computed. So the answer about one step is fetched while the
    next is queued, and an error comes one step late; elsewhere at once.

    Args:
        blame: makes the error from what :meth:`look` was given about the step.
    """

    def __init__(self, blame: Callable[[Any], Exception]) -> None:
        self._blame = blame
        self._asked: tuple[Tensor, Any, Any] | None = None

    def look(self, values: Tensor, about: Any) -> None:
        """Raise what ``blame`` makes of the step before, or of this one, if it is known already."""
        self.settle()
        answer = torch.isfinite(values).all()
        if answer.device.type == "cuda":
            self._asked = (*_fetched(answer), about)
        elif not answer:
            raise self._blame(about)

    def settle(self) -> None:
        """Wait for the last answer; raise what ``blame`` makes of it."""
        if self._asked is not None:
            answer, arrived, about = self._asked
            self._asked = None
            arrived.synchronize()
            if not answer:
                raise self._blame(about)


def _fetched(answer: Tensor) -> tuple[Tensor, Any]:
    """A copy on the host, and the event after which it can be read."""
    here = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(answer, non_blocking=True)
    return here, torch.cuda.current_stream(answer.device).record_event()


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
    # Only layers that run as they are written can be watched; importing the compiler takes a second.
    compiled = "torch._dynamo" in sys.modules
    try:
        with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return places[0] if places else None
