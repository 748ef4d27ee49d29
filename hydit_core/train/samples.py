"""Sample pictures during training, as one sheet a step."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from ..config import SamplingDefaults
from ..pipeline import Pipeline
from .config import SamplesSection

if TYPE_CHECKING:
    from .parts import ModelParts


def draw_samples(
    parts: ModelParts, settings: SamplesSection, folder: Path, step: int, device: torch.device
) -> Path:
    """Draw every prompt with the weights as they are now; returns the sheet ``step_00001000.png``."""
    parts.vae.to(device)
    parts.text.to(device)
    training = parts.dit.training
    parts.dit.eval()
    try:
        pipeline = Pipeline(parts.dit, parts.text, parts.vae, parts.info)
        pictures = pipeline.pictures(settings.prompts, sampling(settings, parts), seed=settings.seed)
        images = [picture.image for picture in pictures]
    finally:
        parts.dit.train(training)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.png"
    contact_sheet(images).save(path)
    return path


def sampling(settings: SamplesSection, parts: ModelParts) -> SamplingDefaults:
    """The run's sample settings over the model's own recommendation."""
    own = parts.info.defaults
    return dataclasses.replace(
        own,
        steps=settings.steps,
        cfg=settings.cfg,
        sampler=settings.sampler,
        spacing=settings.spacing,
        negative=settings.negative,
        width=settings.width or own.width,
        height=settings.height or own.height,
    )


def contact_sheet(images: list[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures of one size in rows, about as many rows as columns."""
    columns = columns or max(1, round(len(images) ** 0.5 + 0.49))
    rows = -(-len(images) // columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet
