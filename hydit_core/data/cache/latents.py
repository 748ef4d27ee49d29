"""Latents that are encoded once and kept on disk, under the hash of everything they depend on.

A cached picture has one crop, the center, and with ``flip`` a second, flipped entry; its control picture
has entries of its own. What is kept are the VAE's moments (mean and log variance), so each step can still
sample the posterior.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...dtypes import dtype_of
from ...errors import ConfigError, DataError
from ...images import Geometry, Size, to_tensor
from ..config import DataConfig
from ..rows import Rows
from ..sources import source_kind
from ..workers import chosen_workers
from .entries import PictureEntries
from .fingerprints import PictureHashes, Progress, file_hash, module_hash
from .store import content_key

if TYPE_CHECKING:
    from ...vae import VAE

Entries = dict[int, torch.Tensor]
"""Pixels (3, H, W) by :func:`_entry`."""

_RECIPE = "latents 1: cover, LANCZOS, center crop"
"""Part of every key; change it with anything that changes how a file becomes pixels."""


def cache_folder(config: DataConfig, default: Path | None = None) -> Path:
    """Where a run's caches lie: as configured, else ``default``, else the user's cache folder.

    Raises :class:`ConfigError` if that is inside a folder of training pictures.
    """
    folder = config.cache.dir or default or user_cache_folder()
    require_outside_sources(folder, config, "the cache")
    return folder


def user_cache_folder() -> Path:
    """The platform's folder for caches, of this project. Raises :class:`ConfigError` if there is none."""
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "hydit"
    except RuntimeError as error:  # a user without a home
        raise ConfigError("there is no home folder for caches: set data.cache.dir") from error


def require_outside_sources(folder: Path, config: DataConfig, what: str) -> None:
    """Raise :class:`ConfigError` if ``folder`` lies inside a picture folder.

    What a run writes there, sample pictures above all, the next run would take for training pictures.
    """
    place = folder.expanduser().resolve()
    for source in config.sources:
        pictures = source.path.resolve()
        if source_kind(source) == "folder" and place.is_relative_to(pictures):
            raise ConfigError(
                f"{what} would be written to {folder}, inside the picture folder {source.path}; "
                "choose a place outside it"
            )


class LatentCache(PictureEntries):
    """The cached moments of a dataset's pictures under one VAE.

    Opening it hashes the pictures that changed since the last time and encodes nothing;
    :func:`build_latent_cache` adds what is missing. ``rows`` limits it to some of the pictures.
    Raises :class:`DataError` for a picture that cannot be read, unless such are to be skipped.
    """

    def __init__(self, data: Rows, vae: VAE, folder: Path, *, rows: Iterable[int] | None = None) -> None:
        config = data.config
        vae_hash = module_hash(vae)
        kept = folder / f"latents-{vae_hash[:16]}"
        super().__init__(kept, dtype_of(config.cache.dtype), len(data.manifest), 4)
        self._recipe = (_RECIPE, vae_hash, config.alpha_color, str(self.dtype).removeprefix("torch."))
        self._control_recipe = "" if data.control is None else data.control.recipe
        flips = np.full(len(data.manifest), config.flip > 0)
        flips[data.layout.held_out] = False
        hashes = PictureHashes(folder, rank=data.rank)
        for row in range(len(flips)) if rows is None else rows:
            try:
                self._keys[row] = self._row_keys(data, row, bool(flips[row]), hashes)
            except DataError:
                if config.on_unreadable == "error":
                    raise
                continue  # no key: get() will say that it is absent
        hashes.save()

    def _row_keys(self, data: Rows, row: int, flip: bool, hashes: PictureHashes) -> list[str]:
        """The store keys of a row's entries, empty for those that are not wanted; see :func:`_entry`."""
        size = data.sizes[data.bucket(row)]
        digests = [hashes.of(data.manifest.picture(row))]
        if data.control is not None:
            digests.append(hashes.of(data.control.file(data.manifest, row)))
        keys = [""] * 4
        for control, digest in enumerate(digests):
            for flipped in range(1 + flip):
                key = self.key(digest, size, bool(flipped), control=bool(control))
                keys[_entry(bool(flipped), bool(control))] = key
        return keys

    def key(self, digest: str, size: Size, flip: bool, *, control: bool = False) -> str:
        """The store key of what a file with SHA-256 ``digest`` becomes, cropped to ``size``."""
        made = (self._control_recipe,) if control else ()
        return content_key(*self._recipe, digest, f"{size[0]}x{size[1]}", "flip" if flip else "", *made)

    def matches(self, row: int, digest: str, size: Size) -> bool:
        """Whether ``digest`` is still the picture that ``row`` was opened with."""
        return self._keys[row, 0] == self.key(digest, size, False).encode()

    def get(self, row: int, flip: bool, *, control: bool = False) -> torch.Tensor:
        """(2 C, h, w) float32, of the picture or its control. Raises DataError if it is not there."""
        return self._entry(row, _entry(flip, control))


def _entry(flip: bool, control: bool) -> int:
    """The number of a row's entry: picture, flipped picture, control picture, flipped control picture."""
    return flip + 2 * control


def open_latent_cache(data: Rows, vae: VAE, *, folder: Path | None = None) -> LatentCache:
    """The cache of all pictures, for ``data.use_latents``; encodes nothing."""
    return LatentCache(data, vae, cache_folder(data.config, folder))


def build_latent_cache(
    data: Rows,
    vae: VAE,
    progress: Progress | None = None,
    *,
    folder: Path | None = None,
    batch_size: int = 4,
) -> None:
    """Encode the pictures that have no latents on disk yet, or damaged ones, and write them.

    With several ranks each does its share; let all finish before :func:`open_latent_cache`. However many
    there are, the same pictures are encoded together, so that entries are the same bytes.
    Interrupted at any moment, it goes on next time after the last shard written. ``folder`` is used
    unless the configuration names a place. ``progress`` gets (pictures done, pictures to encode).

    Raises:
        ConfigError: if the cache would lie inside a picture folder.
        DataError: for an unreadable picture, unless such are to be skipped; if the disk is full; or
            if the VAE's output is not finite.
    """
    batches = _share(data, batch_size)
    share = np.sort(np.concatenate([*batches, np.empty(0, dtype=np.int64)]))
    cache = LatentCache(data, vae, cache_folder(data.config, folder), rows=share.tolist())
    cache.verify()
    missing = cache.missing()
    rows = np.flatnonzero(missing.any(axis=1))
    lacking = [batch[missing[batch].any(axis=1)] for batch in batches]
    cache.store.clean()
    done = 0
    try:
        for batch in _decoded(data, cache, missing, [batch for batch in lacking if len(batch)]):
            wanted = [(row, entry, pixels) for row, entries in batch for entry, pixels in entries.items()]
            made = []
            for start in range(0, len(wanted), batch_size):
                part = wanted[start : start + batch_size]
                pixels = torch.stack([pixels for _, _, pixels in part])
                for (row, entry, _), moments in zip(part, _encode(vae, pixels, cache.dtype), strict=True):
                    made.append((row, entry, moments))
            cache.put_all(made)  # no shard ends within a batch: who goes on after it encodes whole ones
            done += len(batch)
            if progress is not None:
                progress(done, len(rows))
    finally:
        cache.store.flush()


def _encode(vae: VAE, pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad():
        moments = vae.encode_moments(pixels).to(dtype)
    if not torch.isfinite(moments).all():
        raise DataError(
            f"the VAE's output is not finite for a batch of {pixels.shape[-1]}x{pixels.shape[-2]} pictures; "
            "load the VAE as float32 (the original SDXL VAE overflows in float16), or set cache.dtype"
        )
    return moments


def _share(data: Rows, batch_size: int) -> list[np.ndarray]:
    """This process's share of the batches, of pictures of one size each, that all rows make."""
    batches: list[np.ndarray] = []
    before, world = 0, data.order.world_size
    for bucket in np.unique(data.layout.bucket_of_row):
        members = np.flatnonzero(data.layout.bucket_of_row == bucket)
        starts = range(0, len(members), batch_size)
        batches += [members[i : i + batch_size] for i in starts[(data.rank - before) % world :: world]]
        before += len(starts)
    return batches


def _decoded(
    data: Rows, cache: LatentCache, missing: np.ndarray, batches: list[np.ndarray]
) -> Iterator[list[tuple[int, Entries]]]:
    """Batches of (row, what it lacks); the next one is decoded while one is encoded."""
    with ThreadPoolExecutor(max_workers=max(1, chosen_workers(data.config))) as pool:
        ahead: deque[list[Future[Entries | None]]] = deque()
        for number in range(len(batches) + 1):
            if number < len(batches):
                ahead.append(
                    [pool.submit(_pixels, data, cache, int(row), missing[row]) for row in batches[number]]
                )
            if number:
                results = [future.result() for future in ahead.popleft()]
                yield [
                    (int(r), p) for r, p in zip(batches[number - 1], results, strict=True) if p is not None
                ]


def _pixels(data: Rows, cache: LatentCache, row: int, missing: np.ndarray) -> Entries | None:
    """What a row lacks, or None if it is unreadable and to be skipped."""
    file, size = data.manifest.picture(row), data.sizes[data.bucket(row)]
    entries: Entries = {}
    try:
        picture, content = data.manifest.load(row, data.config.alpha_color)
        for flip in (False, True):
            geometry = Geometry.cover(picture.size, size, flip=flip)
            plain, control = (_entry(flip, kind) for kind in (False, True))
            if not (missing[plain] or missing[control]):
                continue
            cropped = geometry.apply(picture)
            if missing[plain]:
                entries[plain] = to_tensor(cropped)
            if missing[control]:
                assert data.control is not None
                control_file = data.control.file(data.manifest, row)
                entries[control] = to_tensor(data.control.make(cropped, geometry, control_file))
    except DataError:
        if data.config.on_unreadable == "error":
            raise
        return None
    if not cache.matches(row, file_hash(content), size):
        raise DataError(f"{file} was changed while the cache was being built; run it again")
    return entries
