"""The settings that were published for each release, by name."""

from __future__ import annotations

from .config import SamplingDefaults

PRESETS: dict[str, SamplingDefaults] = {
    # Tencent/HunyuanDiT's sample_t2i.py: DDPM, 100 steps, guidance 6, its own negative prompt.
    "v1.0": SamplingDefaults(steps=100),
    "v1.1": SamplingDefaults(steps=100),
    "v1.2": SamplingDefaults(steps=100),
    # The distilled checkpoints are advertised with 25 steps.
    "distilled": SamplingDefaults(steps=25),
    # HunyuanDiTPipeline's defaults: its negative prompt is empty.
    "diffusers": SamplingDefaults(steps=50, cfg=5.0, negative=""),
}
