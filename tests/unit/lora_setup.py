"""Short runs that train a LoRA, and the losses of their objective."""

from __future__ import annotations

from pathlib import Path

import torch
from train_setup import SHORT_RUN, write_run

from hydit_core.train.config import load_config
from hydit_core.train.draws import TrainingDraws
from hydit_core.train.launch import open_data
from hydit_core.train.objectives.table import make_objective
from hydit_core.train.parts import build


def write_lora_run(folder: Path, model: Path) -> Path:
    """The configuration of a LoRA for the model in ``model``."""
    write_run(folder)
    path = folder / "lora.toml"
    path.write_text(
        f"""
[model]
init_from = "{model.as_posix()}"
[data]
sources = [{{ path = "pictures" }}]
resolution = 64
validation = 2
[objective]
kind = "lora"
timesteps = "stratified"
[lora]
rank = 3
alpha = 6
[optimizer]
lr = 1e-2
{SHORT_RUN}[checkpoint]
export_dtype = "fp32"
metadata = {{ "modelspec.title" = "a style" }}
""",
        encoding="utf-8",
    )
    return path


def objective_of(config: Path, *overrides: str):
    settings = load_config(config, list(overrides))
    return make_objective(settings, build(settings), torch.device("cpu"))


def losses(objective, config: Path) -> torch.Tensor:
    settings = load_config(config)
    batch = open_data(settings).batch(0)
    draws = TrainingDraws(settings.objective, 0, 2)(0, [0, 1], objective.latent_shape(batch))
    torch.manual_seed(5)
    return objective.module(**objective.inputs(batch, draws)).loss


def shake(objective) -> None:
    """Give B and the magnitudes values, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in objective.parameters().items():
            if not name.endswith("lora_A"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
