"""The networks of a run, together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..facts import ModelInfo
from ..model.controlnet import ControlNet
from ..model.dit import DiT
from ..model.ip_adapter import IPAdapter
from ..text.features import TextFeatures
from ..weights import unread
from ..weights.save import save_checkpoint
from ..weights.source import MemorySource, TensorSource, cast

if TYPE_CHECKING:  # they bring transformers, which a configuration is checked without
    from ..image_prompts.encoder import ImageEncoder
    from ..text.encoders import TextEncoders
    from ..vae import VAE

AnyNetwork = TypeVar("AnyNetwork", DiT, IPAdapter)


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
    deferred: bool = False
    """What is trained and its base are without content, see :mod:`hydit_core.weights.unread`."""
    split: bool = False
    """Processes will hold parts of what is trained: it stays on the host until it is split."""
    whole: Callable[[Tensor], Tensor] | None = None
    """What stands for a tensor in an exported file, in a run: an average, a copy, a whole of parts."""

    def read(self) -> None:
        """All of what is :attr:`deferred`."""
        for network in (self.dit, self.text, self.controlnet, self.ip_adapter):
            if network is not None:
                unread.read(network)
        self.deferred = False

    def content(self, network: nn.Module) -> TensorSource:
        """The tensors of a network, for a file; in a run, each is what is exported of it when it is read."""
        if self.whole is None:
            return MemorySource(network.state_dict())
        return _Exported(network.state_dict(keep_vars=True), self.whole)

    def save(self, path: Path, *, dtype: torch.dtype, all_in_one: bool, extra: dict[str, str]) -> None:
        """Write the DiT, or everything in one file."""
        if not all_in_one:
            save_checkpoint(path, dit=self.content(self.dit), info=self.info, dtype=dtype, metadata=extra)
            return
        save_checkpoint(
            path,
            dit=self.content(self.dit),
            **self.text.state_parts()
            | {"bert": self.content(self.text.bert), "t5": self.content(self.text.t5)},
            vae=self.vae.checkpoint_tensors(),
            info=self.info,
            dtype=dtype,
            metadata=extra,
        )


def new_network(
    cls: Callable[..., AnyNetwork], shape: Any, seed: int, deferred: bool, **options: Any
) -> AnyNetwork:
    """A network of this ``shape`` with first values that are a function of ``seed``.

    ``deferred``: they are drawn when they are needed.
    """
    network = cls(shape, device="meta" if deferred else None, **options)
    if deferred:
        unread.fresh(network, seed)
    else:
        network.initialize(torch.Generator().manual_seed(seed))
    return network


class _Exported(MemorySource):
    """Tensors that have others in their places when they are read."""

    def __init__(self, tensors: Mapping[str, Tensor], whole: Callable[[Tensor], Tensor]) -> None:
        super().__init__(tensors)
        self._whole = whole

    def get(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        return cast(self._whole(self._tensors[key]).detach(), dtype)
