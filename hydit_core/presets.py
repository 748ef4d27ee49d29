"""The settings of a run: those that were published for each release, what was chosen, and checks."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, TypedDict

from .diffusion.forecast import tolerance_of
from .diffusion.samplers import DEFAULT_SPACING, SAMPLERS
from .errors import ConfigError
from .facts import SPACINGS, ModelInfo, SamplingDefaults
from .images import Size

PRESETS: dict[str, SamplingDefaults] = {
    # Tencent/HunyuanDiT's sample_t2i.py: DDPM, 100 steps, guidance 6, its own negative prompt.
    "v1.0": SamplingDefaults(steps=100),
    "v1.1": SamplingDefaults(steps=100),
    "v1.2": SamplingDefaults(steps=100),
    # The distilled checkpoints were published for 25 steps.
    "distilled": SamplingDefaults(steps=25),
    # HunyuanDiTPipeline's defaults: its negative prompt is empty.
    "diffusers": SamplingDefaults(steps=50, cfg=5.0, negative=""),
}


TILE_MULTIPLE, TILE_LEAST = 16, 32
"""Pixels: whole patches, of which a few give a picture."""


class SamplingChoices(TypedDict, total=False):
    """Settings that override a model's own or a preset's; None leaves those.

    ``width`` and ``height`` are pixels, multiples of 8; ``cfg`` is the guidance scale, 1 (off) and up;
    ``guidance_rescale`` is 0 (off) to 1; for ``sampler``, ``spacing`` and ``steps`` see ``SAMPLERS`` and
    :meth:`~.diffusion.schedule.Schedule.timesteps`.
    """

    width: int | None
    height: int | None
    steps: int | None
    cfg: float | None
    guidance_rescale: float | None
    sampler: str | None
    spacing: str | None


class RunChoices(TypedDict, total=False):
    """The fields of :class:`RunSettings` besides ``sampling``."""

    seed: int
    batch: int
    strength: float
    eta: float | None
    forecast: str | float
    cfg_end: float
    tile: Size | None


@dataclass(frozen=True)
class RunSettings:
    """All settings of one run of pictures, except the prompts.

    Attributes:
        sampling: sampler, size, guidance and negative prompt.
        seed: of the first picture of each prompt; the others' are consecutive.
        batch: pictures per prompt.
        strength: how far to depart from the picture that the run starts from, above 0, up to 1.
        eta: noise of the ddim sampler, 0 to 1; None for the sampler's default.
        forecast: which calls of the network to replace by forecasts: ``off``, ``safe``, ``fast`` or a
            tolerance, see :class:`~.diffusion.forecast.Forecaster`.
        cfg_end: the share of the steps, from the first on, that are guided, above 0, up to 1 (all).
        tile: (width, height) in pixels of the tiles that a larger picture is drawn in; None draws it whole.

    Raises:
        ConfigError: a value is out of range, or another sampler is given an ``eta``.
    """

    sampling: SamplingDefaults
    seed: int = 0
    batch: int = 1
    strength: float = 1.0
    eta: float | None = None
    forecast: str | float = "off"
    cfg_end: float = 1.0
    tile: Size | None = None

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ConfigError(f"batch {self.batch}: use 1 or more")
        if self.eta is not None and self.sampling.sampler != "ddim":
            raise ConfigError(f"eta belongs to the ddim sampler; {self.sampling.sampler} has none")
        check_seed(self.seed, self.batch)
        tolerance_of(self.forecast)
        check_cfg_end(self.cfg_end)
        if self.tile is not None:
            check_tile(self.tile)

    @property
    def seeds(self) -> list[int]:
        """One for each picture of a prompt."""
        return [self.seed + i for i in range(self.batch)]


def choose_settings(defaults: SamplingDefaults, preset: str | None = None, **given: Any) -> SamplingDefaults:
    """``defaults`` (a model's own), or a preset's settings, with those of ``given`` that are not None.

    A sampler that is given without a spacing brings its own (``DEFAULT_SPACING`` of the samplers).
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
    """A warning for a size in pixels that is far from the one that the model was made for, else None."""
    ratio = width * height / (best.width * best.height)
    if 1 / 3 < ratio < 3:
        return None
    return (
        f"{width}x{height} is far {'below' if ratio < 1 else 'above'} the size that this model was made for "
        f"({best.width}x{best.height}): expect a poor picture"
    )


def distilled_advice(info: ModelInfo, settings: SamplingDefaults) -> list[str]:
    """Warnings for settings that a model distilled to few steps is not made for."""
    if not info.folded_cfg or settings.cfg == 1:
        return []
    return [
        f"this model was distilled with a guidance of {info.folded_cfg:g}, which is in every step: cfg "
        f"{settings.cfg:g} comes on top of it; use 1"
    ]


def check_sampler(info: ModelInfo, sampler: str) -> None:
    """Raise ConfigError for a sampler that cannot draw with a model distilled to few steps."""
    if info.folded_cfg and sampler == "ddpm":
        raise ConfigError(
            "sampler ddpm: this model is distilled to few steps, its variances are not trained; use "
            f"{'lcm' if info.defaults.sampler == 'ddpm' else info.defaults.sampler}"
        )


def check_settings(settings: SamplingDefaults, multiple: int, info: ModelInfo | None = None) -> None:
    """Raise ConfigError for a setting that sampling, with the model of ``info``, cannot use."""
    if info is not None:
        check_sampler(info, settings.sampler)
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


def check_cfg_end(end: float) -> None:
    """Raise ConfigError unless ``end`` is a share of the steps to guide."""
    if not 0 < end <= 1:
        raise ConfigError(
            f"cfg end {end:g}: use a number above 0 up to 1 (all steps are guided); --cfg 1 guides none"
        )


def check_tile(tile: Size) -> None:
    """Raise ConfigError unless ``tile`` (width, height) is a size that tiles can have."""
    if any(side < TILE_LEAST or side % TILE_MULTIPLE for side in tile):
        raise ConfigError(
            f"tiles of {tile[0]}x{tile[1]}: width and height must be multiples of {TILE_MULTIPLE}, "
            f"{TILE_LEAST} or more"
        )


def check_seed(seed: int, batch: int) -> None:
    """Raise ConfigError unless ``seed`` and the ``batch - 1`` seeds after it fit the generator's 64 bits."""
    last = 2**64 - batch
    if not 0 <= seed <= last:
        raise ConfigError(f"seed {seed}: use a number from 0 to {last}")
