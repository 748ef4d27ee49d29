"""What a run needs of the machine and of its networks, checked before anything is written or trained.

The dry run and the training ask the same questions, first: what one accepts the other does not refuse.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from PIL import Image

from ..data.cache.latents import cache_folder, require_outside_sources
from ..data.control_images import require_maker
from ..diffusion.schedule import Schedule
from ..errors import ConfigError
from ..facts import ModelInfo
from ..loading import misfits
from ..model.config import DiTConfig
from ..presets import check_settings, choose_settings
from ..quiet import quiet_imports
from ..text.encoders import TextEncoders
from ..vae import VAE
from .config import TrainConfig
from .distributed import find_device
from .model_section import TextScratch
from .objectives.table import objective_of
from .optimizers import check_optimizer_here
from .sections import SamplesSection


def check_machine(config: TrainConfig) -> None:
    """Raise :class:`ConfigError` for what this machine lacks: a device, a library, a place to write."""
    find_device(config.run.device)
    require_outside_sources(config.run.output_dir, config.data, "the run")
    _require_writable(config.run.output_dir, "run.output_dir")
    if config.data.cache.latents or config.data.cache.text:
        _require_writable(cache_folder(config.data), "data.cache.dir")
    check_optimizer_here(config.optimizer)
    objective_of(config).check_machine(config)
    if config.data.control is not None:
        require_maker(config.data.control)
        for path in config.samples.control_images if config.samples.every else ():
            _require_picture(path, "samples.control_images")
    for path in config.samples.image_prompts if config.samples.every else ():
        _require_picture(path, "samples.image_prompts")


def _require_writable(folder: Path, key: str) -> None:
    """As far as that can be told without writing."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"{key}: cannot write to {folder}: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: cannot write to {folder}: no permission to write to {place}")


def _require_picture(path: Path, key: str) -> None:
    try:
        with Image.open(path):
            pass
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{key}: cannot read {path}: {error}") from error


def check_parts(config: TrainConfig, dit: DiTConfig, text: TextEncoders, vae: VAE, info: ModelInfo) -> None:
    """Raise :class:`ConfigError` for networks that do not fit each other or the configuration.

    ``info`` is that of the file that will be written.
    """
    for part, what in misfits(dit, text, vae):
        raise ConfigError(f"model.{part}: {what}")
    if config.objective.vlb and dit.out_channels != 2 * dit.in_channels:
        raise ConfigError(
            f"objective.vlb: the DiT has {dit.out_channels} output channels, the variational bound needs "
            f"{2 * dit.in_channels} (prediction and variance): set objective.vlb = false"
        )
    if config.samples.every:
        _check_samples(config.samples, info, vae.downscale)


def check_text_options(fresh: TextScratch) -> None:
    """Raise :class:`ConfigError` for options of fresh text encoders that transformers does not know."""
    with quiet_imports():
        from transformers import BertConfig, MT5Config

    for name, table, config in (("bert", fresh.bert, BertConfig()), ("t5", fresh.t5, MT5Config())):
        known = list(config.to_dict())
        for key in table:
            if not hasattr(config, key):
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(f"model.text_encoders.{name}.{key}: unknown key{hint}")


def _check_samples(samples: SamplesSection, info: ModelInfo, downscale: int) -> None:
    try:
        chosen = choose_settings(info.defaults, None, **samples.given())
        check_settings(chosen, downscale, info)
        Schedule(info.diffusion).timesteps(chosen.spacing, chosen.steps)
    except ConfigError as error:
        raise ConfigError(f"samples: {error}") from None
