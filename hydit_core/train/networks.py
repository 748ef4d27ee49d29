"""The networks of a run, together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..facts import ModelInfo
from ..model.controlnet import ControlNet
from ..model.dit import DiT
from ..model.ip_adapter import IPAdapter
from ..text.features import TextFeatures
from ..weights.save import save_checkpoint

if TYPE_CHECKING:  # they bring transformers, which a configuration is checked without
    from ..image_prompts.encoder import ImageEncoder
    from ..text.encoders import TextEncoders
    from ..vae import VAE


@dataclass
class ModelParts:
    """What is trained and what it needs; ``info`` describes the file that comes out.

    With ``stored_text``, which reads one text's features from disk, the encoders may be without weights.
    """

    dit: DiT
    text: TextEncoders
    vae: VAE
    info: ModelInfo
    controlnet: ControlNet | None = None
    ip_adapter: IPAdapter | None = None
    image_encoder: ImageEncoder | None = None
    stored_text: Callable[[str], TextFeatures] | None = None

    def save(self, path: Path, *, dtype: torch.dtype, all_in_one: bool, extra: dict[str, str]) -> None:
        """Write the DiT, or everything in one file."""
        if not all_in_one:
            save_checkpoint(path, dit=self.dit.state_dict(), info=self.info, dtype=dtype, metadata=extra)
            return
        save_checkpoint(
            path,
            dit=self.dit.state_dict(),
            **self.text.state_parts(),
            vae=self.vae.checkpoint_tensors(),
            info=self.info,
            dtype=dtype,
            metadata=extra,
        )
