"""Sample pictures during training, as one sheet a step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

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
        given = settings.model_dump(exclude={"every", "prompts", "seed"})
        pictures = pipeline.pictures(settings.prompts, pipeline.settings(**given), seed=settings.seed)
        images = [picture.image for picture in pictures]
    finally:
        parts.dit.train(training)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.png"
    contact_sheet(images).save(path)
    return path


def contact_sheet(images: list[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures of one size in rows, about as many rows as columns."""
    columns = columns or max(1, round(len(images) ** 0.5 + 0.49))
    rows = -(-len(images) // columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet
