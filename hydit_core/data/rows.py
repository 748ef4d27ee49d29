"""Which pictures a run has: their sizes, what is held out, and in which order they come."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .buckets import bucket_sizes
from .config import DataConfig
from .control_images import ControlImages
from .gathering import Findings
from .layout import Layout
from .manifest import Manifest
from .mapped import MappedManifest
from .mask_images import MaskImages
from .order import BatchOrder, hash_int
from .prior import Samples
from .prompt_images import PromptImages
from .streams import StreamOrder, Streams


class Rows:
    """The pictures of a run, by the number of their row in ``manifest``.

    ``layout`` says at which of ``sizes`` a picture is trained and what it is for, ``samples`` what an epoch
    shows, and ``order`` when.

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
        layout: Layout | None = None,
    ) -> None:
        self.config = config
        self.manifest = manifest
        self.findings = findings
        self.seed = seed
        self.rank = rank
        self.sizes = bucket_sizes(config)
        self.layout = layout or Layout.of(config, manifest, self.sizes)
        self.samples = Samples(self.layout, config.prior.share)
        areas = [w * h for w, h in self.sizes]
        self.streams = Streams.of(config, manifest)
        self.order = (
            BatchOrder(self.samples.counts, batch_size, world_size, seed, areas=areas)
            if self.streams is None
            else StreamOrder(self.streams, self.samples, batch_size, world_size, seed, areas=areas)
        )
        self.control = (
            None if config.control is None else ControlImages(config.control, alpha_color=config.alpha_color)
        )
        self.masks = None if config.mask is None else MaskImages(config.mask)
        self.prompts: PromptImages | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every picture to be learned has been shown (as often as its source is repeated)."""
        return self.order.steps_per_epoch

    def fingerprint(self, global_batch: int | None = None) -> str:
        """Changes with anything that changes which sample a step sees, for a check on resuming.

        ``global_batch`` asks for that of the same data in batches of another size.
        """
        together = self.order.global_batch if global_batch is None else global_batch
        total = hash_int(self.seed, together, str(self.sizes), str(self.config.flip))
        if self.control is not None:
            total = hash_int(total, self.control.recipe)
        if self.streams is not None:
            total = hash_int(total, self.streams.recipe)
        if self.prompts is not None:
            total = hash_int(total, self.prompts.recipe)
        if isinstance(self.manifest, MappedManifest):
            shown = [(source.repeats, source.prior, source.validation) for source in self.config.sources]
            told = (str(shown), str(self.config.prior.share), str(self.config.validation))
            return f"{hash_int(total, self.manifest.digest, *told):016x}"
        for record, bucket in zip(self.manifest, self.layout.bucket_of_row, strict=True):
            total = hash_int(total, record.key, *record.captions, int(bucket))
        total = hash_int(total, *np.bincount(self.layout.own))
        if self.samples.prior:
            total = hash_int(total, len(self.samples), *self.samples.prior_rows())
        return f"{total:016x}"

    def bucket(self, row: int) -> int:
        """The number of the size at which a picture is trained."""
        return int(self.layout.bucket_of_row[row])

    def is_prior(self, row: int) -> bool:
        """Whether a picture shows what the base already knows."""
        return self.config.sources[self.manifest.source(row)].prior

    def captions(self) -> Iterator[str]:
        """Every caption of every picture, with repetitions."""
        return (self.manifest.captions[i] for i in range(len(self.manifest.captions)))
