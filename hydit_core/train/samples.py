"""Sample pictures during training, as one sheet a step."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn

from ..control import ControlInput
from ..image_prompts.run import ImagePrompt
from ..images import load_picture
from ..new_files import write_new
from ..offload.placement import Placement
from ..pipeline import Pipeline
from ..presets import RunSettings, choose_settings
from ..text.features import TextFeatures
from .sections import SamplesSection

if TYPE_CHECKING:
    from ..data.control_images import ControlImages
    from .networks import ModelParts


class _StoredText:
    """Takes the place of the text encoders: reads their features from disk."""

    def __init__(self, stored: Callable[[str], TextFeatures]) -> None:
        self.stored = stored

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        return TextFeatures.cat([self.stored(prompt) for prompt in prompts])


def sample_texts(settings: SamplesSection, parts: ModelParts) -> set[str]:
    """All texts that :func:`draw_samples` needs features of."""
    if not settings.every:
        return set()
    chosen = choose_settings(parts.info.defaults, None, **settings.given())
    return {*settings.prompts, *([chosen.negative] if chosen.cfg > 1 else [])}


def draw_samples(
    parts: ModelParts,
    settings: SamplesSection,
    device: torch.device,
    control: ControlImages | None = None,
) -> bytes:
    """Draw every prompt with the weights as they are now; returns the sheet, a PNG file.

    With ``control``, each picture has its control picture to its left; with an IP-Adapter, its prompt
    picture. The VAE, the text encoders and the image encoder, which cached data do without, are on ``device``
    for as long as they are needed.
    """
    text: Any = parts.text if parts.stored_text is None else _StoredText(parts.stored_text)
    borrowed = [net for net in (parts.vae, text, parts.image_encoder) if isinstance(net, nn.Module)]
    homes = [next(net.parameters()).device for net in borrowed]
    for net in borrowed:
        net.to(device)
    networks = [net for net in (parts.dit, parts.controlnet, parts.ip_adapter) if net is not None]
    training = [net.training for net in networks]
    for net in networks:
        net.eval()
    try:
        placement = Placement()
        placement.device = device  # parts of a DiT that is split may be elsewhere
        pipeline = Pipeline(parts.dit, text, parts.vae, parts.info, placement=placement)
        chosen = pipeline.settings(**settings.given())
        run = RunSettings(chosen, settings.seed, forecast=settings.forecast)
        size, images = (chosen.width, chosen.height), []
        if parts.controlnet is not None and control is not None:
            for prompt, path in _paired(settings.prompts, settings.control_images):
                hint = control.from_file(path, size)
                steer = [ControlInput(parts.controlnet, hint)]
                drawn = pipeline.pictures([prompt], run, controls=steer)
                images += [contact_sheet([hint, picture.image], 2) for picture in drawn]
        elif parts.ip_adapter is not None and parts.image_encoder is not None:
            for prompt, path in _paired(settings.prompts, settings.image_prompts):
                shown = load_picture(path)
                given = [ImagePrompt(parts.ip_adapter, parts.image_encoder, shown)]
                drawn = pipeline.pictures([prompt], run, images=given)
                # As the encoder sees it: squeezed, not cropped.
                images += [contact_sheet([shown.resize(size), picture.image], 2) for picture in drawn]
        else:
            images = [picture.image for picture in pipeline.pictures(settings.prompts, run)]
    finally:
        for net, mode in zip(networks, training, strict=True):
            net.train(mode)
        for net, home in zip(borrowed, homes, strict=True):
            net.to(home)
    file = io.BytesIO()
    contact_sheet(images).save(file, format="PNG")
    return file.getvalue()


def write_sheet(sheet: bytes, folder: Path, step: int) -> Path:
    """The file ``step_00001000.png`` of a sheet."""
    # A run that goes on from an earlier checkpoint comes to the same step again.
    return write_new(folder / f"step_{step:08d}.png", sheet, keep_same=True)


def _paired(prompts: Sequence[str], paths: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Each prompt with its picture; one picture serves all."""
    return ((prompt, paths[index % len(paths)]) for index, prompt in enumerate(prompts))


def contact_sheet(images: list[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures of one size in rows, about as many rows as columns."""
    columns = columns or max(1, round(len(images) ** 0.5 + 0.49))
    rows = -(-len(images) // columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet
