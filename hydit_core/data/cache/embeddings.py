"""Embeddings of prompt pictures, computed once and kept on disk under the hash of picture and encoder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...dtypes import dtype_of
from ...errors import DataError
from ...images import load_picture
from ..prompt_images import PromptImages
from ..rows import Rows
from .entries import PictureEntries
from .fingerprints import PictureHashes, Progress, file_hash, module_hash
from .latents import cache_folder
from .store import content_key

if TYPE_CHECKING:  # it brings transformers
    from ...image_prompts.encoder import ImageEncoder


class EmbeddingCache(PictureEntries):
    """The cached embeddings of a dataset's prompt pictures, in all their views, under one encoder.

    Opening it hashes the pictures that changed since the last time and encodes nothing;
    :func:`build_embedding_cache` adds what is missing. ``rows`` limits it to some of the pictures.
    Raises :class:`DataError` for a picture that cannot be read, unless such are to be skipped.
    """

    def __init__(
        self,
        data: Rows,
        encoder: ImageEncoder,
        prompts: PromptImages,
        folder: Path,
        *,
        rows: Iterable[int] | None = None,
    ) -> None:
        config = data.config
        own = content_key(module_hash(encoder), str(encoder.config))
        kept = folder / f"images-{own[:16]}"
        super().__init__(kept, dtype_of(config.cache.dtype), len(data.manifest), config.image_prompt.views)
        self._recipe = (own, prompts.recipe, str(self.dtype))
        hashes = PictureHashes(folder, rank=data.rank)
        held_out = set(data.layout.held_out.tolist())
        for row in range(len(data.manifest)) if rows is None else rows:
            try:
                digest = hashes.of(prompts.file(data.manifest, row))
            except DataError:
                if config.on_unreadable == "error":
                    raise
                continue  # no key: get() will say that it is absent
            for view in range(1 if row in held_out else config.image_prompt.views):
                self._keys[row, view] = self.key(digest, view)
        hashes.save()

    def key(self, digest: str, view: int) -> str:
        """The store key of a view of a file with SHA-256 ``digest``."""
        return content_key(*self._recipe, digest, str(view))

    def matches(self, row: int, digest: str) -> bool:
        """Whether ``digest`` is still the picture that ``row`` was opened with."""
        return bool(self._keys[row, 0] == self.key(digest, 0).encode())

    def get(self, row: int, view: int) -> torch.Tensor:
        """(embed_dim,) float32. Raises DataError if it is not there."""
        return self._entry(row, view)


def build_embedding_cache(
    data: Rows, encoder: ImageEncoder, prompts: PromptImages, progress: Progress | None = None
) -> None:
    """Encode the views that are not on disk yet, or are damaged, and write them; resumable.

    With several ranks each does its share. ``progress`` gets (pictures done, pictures to encode).

    Raises:
        ConfigError: the cache would lie inside a picture folder.
        DataError: a picture is unreadable, unless such are to be skipped, or was changed meanwhile; the disk
            is full; the encoder's output is not finite.
    """
    share = range(data.rank, len(data.manifest), data.order.world_size)
    cache = EmbeddingCache(data, encoder, prompts, cache_folder(data.config), rows=share)
    cache.verify()
    missing = cache.missing()
    rows = np.flatnonzero(missing.any(axis=1)).tolist()
    cache.store.clean()
    try:
        for done, row in enumerate(rows, 1):
            _add(data, encoder, prompts, cache, row, np.flatnonzero(missing[row]).tolist())
            if progress is not None:
                progress(done, len(rows))
    finally:
        cache.store.flush()


def _add(
    data: Rows,
    encoder: ImageEncoder,
    prompts: PromptImages,
    cache: EmbeddingCache,
    row: int,
    views: list[int],
) -> None:
    """Encode a row's views together; nothing if its picture is unreadable and to be skipped."""
    file = prompts.file(data.manifest, row)
    try:
        content = file.read()
        picture = load_picture(content, prompts.alpha_color, name=str(file))
    except DataError:
        if data.config.on_unreadable == "error":
            raise
        return
    if not cache.matches(row, file_hash(content)):
        raise DataError(f"{file} was changed while the cache was being built; run it again")
    with torch.no_grad():
        embeddings = encoder(torch.stack([prompts.make(file, view, loaded=picture) for view in views]))
    if not embeddings.isfinite().all():
        raise DataError(f"the image encoder's output is not finite for {file}; set run.precision = 'fp32'")
    for view, embedding in zip(views, embeddings, strict=True):
        cache.put(row, view, embedding)
