"""CLIP's image encoder, as transformers implements it: from pictures to embeddings of length 1."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import HyditError, WeightsError
from ..finite import DTYPE_ADVICE
from ..quiet import quiet_imports
from ..weights import hub
from ..weights.detect import detect
from ..weights.files import has_weights, open_tensors
from ..weights.load import assign_weights, compute_dtype
from ..weights.vision_layout import VisionConfig, find_vision, vision_config, vision_view
from .pixels import encoder_pixels

with quiet_imports():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

_NAMES = ("clip_img_encoder.pt", "clip_img_encoder", "image_encoder", "image_encoder.safetensors")
_ADVICE = "give one, such as clip_img_encoder.pt beside Tencent's ipa.pt"


class ImageEncoder(nn.Module):
    """An image encoder with its preparation of pictures. Construction does not initialize the weights."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.model = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=config.width,
                intermediate_size=config.mlp_hidden,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                patch_size=config.patch,
                image_size=config.size,
                hidden_act=config.activation,
                projection_dim=config.embed_dim,
            )
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights are stored in."""
        return self.model.visual_projection.weight.dtype

    def pixels(self, image: Image.Image) -> Tensor:
        """A picture as the encoder sees it, (3, size, size) float32: squeezed into a square, not cropped."""
        return encoder_pixels(image, self.config.size)

    def forward(self, pixels: Tensor) -> Tensor:
        """``pixels`` (B, 3, size, size) from :meth:`pixels` -> (B, embed_dim), float32, of length 1."""
        weight = self.model.visual_projection.weight
        embeddings = self.model(pixels.to(weight.device, weight.dtype)).image_embeds.float()
        return nn.functional.normalize(embeddings, dim=-1)

    @torch.no_grad()
    def embed(self, image: Image.Image) -> Tensor:
        """(1, embed_dim) of a picture. Raises :class:`HyditError` where values overflow."""
        embedding: Tensor = self(self.pixels(image)[None])
        if not embedding.isfinite().all():
            raise HyditError(f"the image encoder's output is not finite in {self.dtype}; {DTYPE_ADVICE}")
        return embedding


def load_image_encoder(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> ImageEncoder:
    """Load a CLIP image encoder, frozen and in eval mode.

    Args:
        path: Tencent's ``clip_img_encoder.pt``, a vision tower of transformers as a file or folder, or any
            file with one of them inside, such as a whole CLIP; or one of these as
            ``hub:ORG/NAME[@REVISION]/INSIDE``.
        dtype: of the weights; by default the file's own.

    Raises:
        WeightsError: there is none, or it lacks tensors or has others.
    """
    path = hub.local(path, ("vision",))
    source = open_tensors(path)
    kind = find_vision(source.keys())
    if kind is None:
        raise WeightsError(f"{path} is {detect(source).name}; expected a CLIP image encoder; {_ADVICE}")
    view = vision_view(source, kind)
    config = vision_config(view, kind.layout)
    with torch.device("meta"):
        encoder = ImageEncoder(config)
    assign_weights(encoder.model, view, dtype=dtype or compute_dtype(view), device=device)
    # Not in the state dict: it has to be created again, outside the meta device.
    embeddings: Any = encoder.model.vision_model.embeddings
    positions = torch.arange(embeddings.num_positions, device=device).expand(1, -1)
    embeddings.register_buffer("position_ids", positions, persistent=False)
    return encoder.requires_grad_(False).eval()


def encoder_beside(adapter: str | os.PathLike[str]) -> Path:
    """Where the image encoder of an IP-Adapter's file is: in it, or beside it under a published name.

    Beside a file on the hub it is ``clip_img_encoder.pt``, which is downloaded.

    Raises:
        WeightsError: it is nowhere there.
    """
    path = hub.local(adapter, ("ip_adapter",))
    if find_vision(open_tensors(path).keys()):
        return path
    if name := hub.name(adapter):
        there = hub.parse(name)
        beside = PurePosixPath(there.inside).with_name(_NAMES[0]) if there.inside else _NAMES[0]
        return hub.local(str(there._replace(inside=str(beside))), ("vision",))
    folder = path if path.is_dir() else path.parent
    for place in (folder / name for folder in (folder, folder.parent) for name in _NAMES):
        if place.is_file() or has_weights(place):
            return place
        if (inner := place / _NAMES[0]).is_file():
            return inner
    raise WeightsError(
        f"{path} has no image encoder, neither inside nor beside it ({', '.join(_NAMES)}); {_ADVICE}"
    )
