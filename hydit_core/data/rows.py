"""Which pictures a run has: their sizes, what is held out, and in which order they come."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..errors import DataError
from .buckets import assign_buckets, bucket_sizes
from .config import DataConfig
from .control_images import ControlImages
from .manifest import Findings, Manifest, validation_rows
from .mask_images import MaskImages
from .order import BatchOrder, hash_int
from .prior import Samples


class Rows:
    """The pictures of a run, by the number of their row in ``manifest``.

    ``bucket_of_row`` (rows,) says at which of ``sizes`` a picture is trained, ``train_rows`` and
    ``validation`` what it is for, ``samples`` how often an epoch shows it, and ``order`` when.

    Raises :class:`DataError` if nothing is left to be learned.
    """

    def __init__(
        self,
        config: DataConfig,
        manifest: Manifest,
        findings: Findings,
        *,
        seed: int,
        batch_size: int,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        self.config = config
        self.manifest = manifest
        self.findings = findings
        self.seed = seed
        self.rank = rank
        self.sizes = bucket_sizes(config)
        self.bucket_of_row = assign_buckets(manifest.widths, manifest.heights, self.sizes)
        self.is_prior = prior = np.array([source.prior for source in config.sources])[manifest.sources]
        if prior.all():
            raise DataError("all pictures that are left are prior ones: none shows what is to be learned")
        held_out = validation_rows(manifest, config.validation, ~prior)
        repeats = np.array([source.repeats for source in config.sources])[manifest.sources]
        own, others = (np.flatnonzero(~held_out & which) for which in (~prior, prior))
        self.train_rows = np.concatenate([own, others])
        self.samples = Samples(
            np.repeat(own, repeats[own]),
            np.repeat(others, repeats[others]),
            self.bucket_of_row,
            config.prior.share,
        )
        self.validation = np.flatnonzero(held_out)
        self.order = BatchOrder(
            self.samples.buckets,
            batch_size,
            world_size,
            seed,
            areas=[w * h for w, h in self.sizes],
        )
        self.control = (
            None if config.control is None else ControlImages(config.control, alpha_color=config.alpha_color)
        )
        self.masks = None if config.mask is None else MaskImages(config.mask)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every picture to be learned has been shown (as often as its source is repeated)."""
        return self.order.steps_per_epoch

    def fingerprint(self) -> str:
        """Changes with anything that changes which sample a step sees, for a check on resuming."""
        total = hash_int(self.seed, self.order.global_batch, str(self.sizes), str(self.config.flip))
        if self.control is not None:
            total = hash_int(total, self.control.recipe)
        for record, bucket in zip(self.manifest, self.bucket_of_row, strict=True):
            total = hash_int(total, record.key, *record.captions, int(bucket))
        total = hash_int(total, *np.bincount(self.samples.rows))
        if len(self.samples) > len(self.samples.rows):
            total = hash_int(total, len(self.samples), *self.samples.prior_rows())
        return f"{total:016x}"

    def captions(self) -> Iterator[str]:
        """Every caption of every picture, with repetitions."""
        return (self.manifest.captions[i] for i in range(len(self.manifest.captions)))
