"""Fewer calls of a model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..hydit_core.diffusion.forecast import FORECASTS, SAFE
from .schema import make_schema

_CUSTOM = "custom"


class HyDiTForecast(io.ComfyNode):
    """Any MODEL, of which some calls are replaced by forecasts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="HyDiTForecast",
            display_name="HunyuanDiT Forecast",
            category="HunyuanDiT/sampling",
            description=(
                "Saves time: some of the sampler's calls of the model are replaced by forecasts from the "
                "calls before, where these can be trusted. Shows after a run how many calls were real. Works "
                "with any MODEL and any sampler."
            ),
            search_aliases=["hydit", "hunyuan", "fast", "speed", "cache", "easycache", "teacache", "skip"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="Any MODEL, with its LoRAs and patches. Goes before the sampler."
                ),
                io.Combo.Input(
                    "preset",
                    options=["safe", "fast", "off", _CUSTOM],
                    default="safe",
                    tooltip="safe: hardly any difference to be seen. fast: fewer calls, some details change. "
                    "off: every call is real. custom: the tolerance below.",
                ),
                io.Float.Input(
                    "tolerance",
                    default=SAFE,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    round=False,
                    tooltip="Only with custom: how far a single forecast may move the latents, in their "
                    f"standard deviations. 0: off; {FORECASTS['safe']:g}: as safe; {FORECASTS['fast']:g}: as "
                    "fast.",
                ),
            ],
            outputs=[io.Model.Output("MODEL", tooltip="For a sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, preset: str, tolerance: float) -> io.NodeOutput:
        from .host.forecast import with_forecast

        chosen = tolerance if preset == _CUSTOM else FORECASTS[preset]
        return io.NodeOutput(with_forecast(model, chosen, cls.hidden.unique_id))
