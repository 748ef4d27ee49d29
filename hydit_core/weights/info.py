"""What a file says about itself: in its metadata, by a scheduler beside it, and by its name."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from ..errors import ConfigError, WeightsError
from ..facts import METADATA_KEY, ModelInfo
from ..untrusted import read_json
from .detect import FileKind
from .source import TensorSource

_SCHEDULER = Path("scheduler") / "scheduler_config.json"
_PREDICTIONS = {"v_prediction": "v"}
# Options of which this library supports only these values.
_SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "thresholding": False,
    "clip_sample": False,
}
_VARIANT = re.compile(r"(?<![a-z])(ema|module|distill)(?:ed)?(?![a-z])")
_DISTILLED_STEPS = 25
"""Tencent's model card, for the Distill weights."""


def model_info(source: TensorSource, kind: FileKind) -> ModelInfo:
    """What the file says about itself, completed by a diffusers scheduler beside it and by its name."""
    info = ModelInfo.from_metadata(source.metadata, version=kind.version)
    if METADATA_KEY in source.metadata:
        return info
    info = _with_scheduler(info, source.path)
    # A torch file's own key takes precedence over Tencent's file names (pytorch_model_ema.pt).
    text = f"{source.metadata.get('hydit.load_key', '')} {source.path.name}"
    variant = _VARIANT.search(text.lower())
    name = variant.group(1) if variant else ""
    # A pipeline says it only in the name of its folder.
    if not name and re.search(r"(?<![a-z])distill(ed)?(?![a-z])", "/".join(source.path.parts[-4:]).lower()):
        name = "distill"
    if name == "distill":
        info = replace(info, defaults=replace(info.defaults, steps=_DISTILLED_STEPS))
    return replace(info, variant=name)


def _with_scheduler(info: ModelInfo, path: Path) -> ModelInfo:
    """Take the steps, betas and prediction type of a diffusers pipeline's scheduler.

    Raises:
        WeightsError: this library does not have that schedule.
    """
    folder = path if path.is_dir() else path.parent
    config = next(
        (file for base in (folder, folder.parent) if (file := base / _SCHEDULER).is_file()),
        None,
    )
    if config is None:
        return info
    values = read_json(config)
    for name, usual in _SCHEDULE.items():
        if (found := values.get(name, usual)) != usual:
            raise WeightsError(
                f"{config}: {name} is {found!r}; this library has {usual!r} alone, so pictures would be "
                "wrong. If the weights were trained with that after all, correct the file"
            )
    if "Flow" in str(values.get("_class_name")):
        raise WeightsError(f"{config} is of {values['_class_name']}; HunyuanDiT has a schedule of betas")
    prediction = values.get("prediction_type", "v_prediction")
    numbers = ("num_train_timesteps", "beta_start", "beta_end")
    changes = {name: values[name] for name in numbers if name in values}
    try:
        diffusion = replace(info.diffusion, **changes, prediction=_PREDICTIONS.get(prediction, prediction))
        return replace(info, diffusion=diffusion)
    except (ConfigError, TypeError) as error:
        raise WeightsError(f"{config} is not a scheduler configuration of diffusers: {error}") from error
