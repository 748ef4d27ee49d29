"""What each picture of a run is for: at which size it is trained, in which order its bucket is numbered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..images import Size
from ..new_files import replacing
from .buckets import assign_buckets
from .config import DataConfig
from .manifest import Manifest, validation_rows


@dataclass(frozen=True)
class Layout:
    """Rows of a manifest, arranged for a run; arrays in memory or mapped from files.

    Attributes:
        bucket_of_row: (rows,) int16, the number of the size at which each picture is trained.
        own: rows that are to be learned, as often as an epoch shows them, bucket after bucket and ascending
            in each.
        own_ends: (sizes,) where each bucket ends in ``own``.
        prior, prior_ends: the same of rows that show what is known already.
        validation: rows that are held out, ascending.
        prior_validation: rows that are held out to see what is forgotten, ascending.
    """

    bucket_of_row: np.ndarray
    own: np.ndarray
    own_ends: np.ndarray
    prior: np.ndarray
    prior_ends: np.ndarray
    validation: np.ndarray
    prior_validation: np.ndarray
    folder: Path | None = None
    """Where the arrays are mapped from, if they are."""

    @staticmethod
    def of(config: DataConfig, manifest: Manifest, sizes: list[Size]) -> Layout:
        """Arrange all rows. Raises :class:`DataError` if nothing is left to be learned."""
        buckets = assign_buckets(manifest.widths, manifest.heights, sizes).astype(np.int16)
        sources = manifest.sources
        prior, apart = (
            np.array([getattr(source, name) for source in config.sources])[sources]
            for name in ("prior", "validation")
        )
        if (prior | apart).all():
            raise DataError(
                "all pictures that are left are prior ones or held out: none shows what is to be learned"
            )
        held_out = apart | validation_rows(manifest, config.validation, ~prior & ~apart)
        repeats = np.array([source.repeats for source in config.sources])[sources]

        def arranged(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            rows = rows[np.argsort(buckets[rows], kind="stable")]
            shown = np.repeat(rows, repeats[rows])
            return shown, np.cumsum(np.bincount(buckets[shown], minlength=len(sizes)))

        own, own_ends = arranged(np.flatnonzero(~held_out & ~prior))
        others, other_ends = arranged(np.flatnonzero(~held_out & prior))
        own_held_out, prior_held_out = (np.flatnonzero(held_out & kind) for kind in (~prior, prior))
        return Layout(buckets, own, own_ends, others, other_ends, own_held_out, prior_held_out)

    @property
    def train_rows(self) -> np.ndarray:
        """Rows that are trained, each once: those to be learned in ascending order, then prior ones."""
        return np.concatenate([np.unique(self.own), np.unique(self.prior)])

    @property
    def held_out(self) -> np.ndarray:
        """Rows that are not trained, whatever they are to show."""
        return np.concatenate([self.validation, self.prior_validation])

    def save(self, folder: Path) -> None:
        """Write the arrays into a new folder."""
        with replacing(folder, folder=True) as temporary:
            temporary.mkdir()
            for name in _ARRAYS:
                np.save(temporary / f"{name}.npy", getattr(self, name))

    @staticmethod
    def mapped(folder: Path) -> Layout:
        """What :meth:`save` wrote. Raises OSError, EOFError or ValueError if it is not whole."""
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        return Layout(**arrays, folder=folder)

    def __reduce__(self) -> Any:
        if self.folder is None:
            return super().__reduce__()
        return Layout.mapped, (self.folder,)  # a worker process maps it again


_ARRAYS = ("bucket_of_row", "own", "own_ends", "prior", "prior_ends", "validation", "prior_validation")
