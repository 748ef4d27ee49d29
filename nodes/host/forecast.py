"""hydit_core's forecasts in ComfyUI's sampling, for any MODEL and any sampler."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import comfy.model_patcher
import comfy.patcher_extension
from server import PromptServer
from torch import Tensor

from ...hydit_core.diffusion.forecast import Forecaster

log = logging.getLogger(__name__)

KEY = "hydit_forecast"
_TYPES = comfy.patcher_extension.WrappersMP
_CACHES = ("easycache",)
"""Where in transformer_options ComfyUI's own caches (EasyCache, LazyCache) stand."""


def with_forecast(model: Any, tolerance: float, node_id: str | None = None) -> Any:
    """A clone of a MODEL whose calls are replaced by forecasts; tolerance 0: a clone without any.

    Each run of a sampler makes a :class:`Forecaster` of its own, which sees the guided result, so that
    guidance, ControlNets, LoRAs and hooks go with it. What a run took is logged and, if ``node_id`` is
    given, told to that node on the page. A forecast that the MODEL already has is replaced.
    """
    model = model.clone()
    model.remove_wrappers_with_key(_TYPES.OUTER_SAMPLE, KEY)
    if tolerance > 0:
        run = functools.partial(_run, tolerance, node_id)
        model.add_wrapper_with_key(_TYPES.OUTER_SAMPLE, KEY, run)
    return model


def _run(tolerance: float, node_id: str | None, executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around one run: ``outer_sample(noise, latent_image, sampler, sigmas, ...)`` of a guider."""
    guider = executor.class_obj
    sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
    forecaster = Forecaster(_call, sigmas, tolerance)

    def predict(
        following: Any,
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> Tensor:
        return forecaster(x, timestep, following=following, model_options=model_options or {}, seed=seed)

    before = guider.model_options
    guider.model_options = comfy.model_patcher.create_model_options_clone(before)
    comfy.patcher_extension.add_wrapper_with_key(
        _TYPES.PREDICT_NOISE, KEY, predict, guider.model_options, is_model_options=True
    )
    try:
        return executor(*args, **kwargs)
    finally:
        cache = _cache(guider.model_options)
        guider.model_options = before
        _tell(node_id, report(forecaster.real, forecaster.calls, cache))


def _call(x: Tensor, timestep: Tensor, *, following: Callable[..., Tensor], **rest: Any) -> Tensor:
    return following(x, timestep, rest["model_options"], rest["seed"])


def _cache(model_options: dict[str, Any]) -> str | None:
    """The name of a cache of ComfyUI's that is on the same MODEL."""
    options = model_options.get("transformer_options", {})
    return next((str(getattr(options[key], "name", key)) for key in _CACHES if key in options), None)


def report(real: int, calls: int, cache: str | None) -> str:
    """What the node says of a run."""
    lines = [f"{real} of {calls} calls of the model were real"]
    if cache is not None:
        lines.append(f"{cache} is on this model too and left out some of those: use one of the two")
    return "\n".join(lines)


def _tell(node_id: str | None, said: str) -> None:
    """Log it, and give it to the node, which ran before the sampler did."""
    log.info("HyDiTForecast: %s", said.replace("\n", "; "))
    server = getattr(PromptServer, "instance", None)
    if node_id is None or server is None or server.client_id is None:
        return
    message = {
        "node": node_id,
        "display_node": node_id,
        "output": {"hydit_forecast": [said]},
        "prompt_id": getattr(server, "last_prompt_id", None),
    }
    server.send_sync("executed", message, server.client_id)
