"""Outputs of frozen text encoders, kept on disk under the hash of text and encoders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...errors import ConfigError, DataError
from ..config import DataConfig
from ..rows import Rows
from .fingerprints import Progress, module_hash
from .latents import cache_folder
from .store import TensorStore, content_key

if TYPE_CHECKING:
    from ...text.encoders import TextEncoders
    from ...text.features import TextFeatures

_PARTS = ("bert", "bert_mask", "t5", "t5_mask")


class TextCache:
    """Features of single texts, bit-equal to what the encoders give.

    Raises :class:`ConfigError` if a weight of the encoders is trainable: what is on disk would stay
    as it was while the encoders change.
    """

    def __init__(self, config: DataConfig, encoders: TextEncoders, folder: Path | None = None) -> None:
        if any(parameter.requires_grad for parameter in encoders.parameters()):
            raise ConfigError(
                "data.cache.text = true keeps the outputs of the text encoders, but they are to be trained; "
                "freeze the encoders, or set data.cache.text = false"
            )
        self.encoders = encoders
        tokenizers = encoders.tokenizers
        self._recipe = content_key(
            "text 1",
            module_hash(encoders),
            str(encoders.info()),
            tokenizers.vocab,
            tokenizers.spiece_model,
            f"{tokenizers.text_len} {tokenizers.t5_len}",
        )
        self.store = TensorStore(cache_folder(config, folder) / f"text-{self._recipe[:16]}")

    def keys(self, text: str) -> list[str]:
        """The store keys of a text's four tensors."""
        return [content_key(self._recipe, part, text) for part in _PARTS]

    def __call__(self, text: str) -> TextFeatures:
        """Features of one text, batch dimension 1, on the CPU; encoded now if they are not on disk.

        Raises :class:`DataError` if the encoders, whose weights have been given back, would be needed for it.
        """
        from ...text.features import TextFeatures

        keys = self.keys(text)
        if self.store.contains(keys).all():
            return TextFeatures(*(self.store.get(key)[None] for key in keys))
        if self.encoders.device.type == "meta":
            raise DataError(f"the text cache {self.store.folder} has no features of {text!r}")
        return self.encoders.encode(text).to("cpu")

    def add(self, text: str) -> None:
        """Encode a text and put it into the store."""
        for key, tensor in zip(self.keys(text), self.encoders.encode(text), strict=True):
            self.store.put(key, tensor[0])


def build_text_cache(
    data: Rows,
    encoders: TextEncoders,
    progress: Progress | None = None,
    *,
    folder: Path | None = None,
    others: Iterable[str] = (),
) -> TextCache:
    """Encode all captions of a dataset, the empty one and ``others`` that are not on disk yet.

    Each text is encoded alone, as in training, so that its features do not depend on its neighbors.
    With several ranks each does its share. Resumable like the latent cache, and gives the cache.
    """
    cache = TextCache(data.config, encoders, folder)
    texts = sorted({"", *data.captions(), *others})[data.rank :: data.order.world_size]
    cache.store.verify(key for text in texts for key in cache.keys(text))
    todo = [text for text in texts if not cache.store.contains(cache.keys(text)).all()]
    cache.store.clean()
    try:
        with torch.no_grad():
            for done, text in enumerate(todo, 1):
                cache.add(text)
                if progress is not None:
                    progress(done, len(todo))
    finally:
        cache.store.flush()
    return cache
