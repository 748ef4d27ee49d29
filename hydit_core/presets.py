"""The settings that were published for each release, by name; and what settings can be."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from .diffusion.samplers import DEFAULT_SPACING, SAMPLERS
from .diffusion.schedule import SPACINGS
from .errors import ConfigError
from .facts import SamplingDefaults

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


def choose_settings(defaults: SamplingDefaults, preset: str | None = None, **given: Any) -> SamplingDefaults:
    """``defaults`` (a model's own), or a preset's settings, with those of ``given`` that are not None.

    Another sampler that is chosen without a spacing brings its own (``DEFAULT_SPACING`` of the samplers).
    Raises ConfigError for an unknown preset; the values are not checked, see :func:`check_settings`.
    """
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}: use one of {', '.join(PRESETS)}")
    base = PRESETS[preset] if preset is not None else defaults
    chosen = {name: value for name, value in given.items() if value is not None}
    if chosen.get("sampler", base.sampler) != base.sampler and "spacing" not in chosen:
        chosen["spacing"] = DEFAULT_SPACING.get(chosen["sampler"], base.spacing)
    return dataclasses.replace(base, **chosen)


def size_advice(best: SamplingDefaults, width: int, height: int) -> str | None:
    """What to tell about a picture's size in pixels that is far from the one that the model was made for."""
    ratio = width * height / (best.width * best.height)
    if 1 / 3 < ratio < 3:
        return None
    return (
        f"{width}x{height} is far {'below' if ratio < 1 else 'above'} the size that this model was made for "
        f"({best.width}x{best.height}): expect a poor picture"
    )


def check_settings(settings: SamplingDefaults, multiple: int) -> None:
    """Raise ConfigError for a setting that cannot be sampled with."""
    if settings.sampler not in SAMPLERS:
        raise ConfigError(f"unknown sampler {settings.sampler!r}: use one of {', '.join(SAMPLERS)}")
    if settings.spacing not in SPACINGS:
        raise ConfigError(f"unknown spacing {settings.spacing!r}: use one of {', '.join(SPACINGS)}")
    width, height = settings.width, settings.height
    if width < multiple or height < multiple or width % multiple or height % multiple:
        near = "x".join(str(max(multiple, round(side / multiple) * multiple)) for side in (width, height))
        raise ConfigError(
            f"size {width}x{height}: width and height must be multiples of {multiple}; try {near}"
        )
    if not 1 <= settings.cfg < math.inf:
        raise ConfigError(f"cfg {settings.cfg:g}: use 1 (no guidance) or more")
    if not 0 <= settings.guidance_rescale <= 1:
        raise ConfigError(f"guidance rescale {settings.guidance_rescale:g}: use 0 (off) to 1")


def check_seed(seed: int, batch: int) -> None:
    """Raise ConfigError unless ``seed`` and those counted up from it fit the generator's 64 bits."""
    last = 2**64 - batch
    if not 0 <= seed <= last:
        raise ConfigError(f"seed {seed}: use a number from 0 to {last}")
