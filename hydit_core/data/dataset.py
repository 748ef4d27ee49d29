"""From a data configuration to batches: :func:`open_dataset` and :class:`TrainData`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import DataError
from ..images import Geometry, Size, to_tensor
from .cache.embeddings import EmbeddingCache
from .cache.latents import LatentCache
from .config import DataConfig
from .gathering import gather
from .order import uniform
from .prompt_images import PromptImages
from .rows import Rows
from .summary import DataSummary, summarize
from .workers import chosen_workers


@dataclass(frozen=True)
class Batch:
    """What one rank trains on in one step: B samples of one size.

    Either ``pixels`` (B, 3, H, W) float32 in [-1, 1] or, from a latent cache, ``moments``
    (B, 2 C, H/8, W/8): the mean and log variance of the VAE's posterior, unscaled. Where the
    configuration asks for control pictures, ``control`` holds them in the same form.

    ``original_sizes`` and ``crops`` are (B, 2) integers: width, height of the picture before
    resizing, and left, top of the crop after it; the size condition of v1.1 is made of them.
    ``positions`` (B,) are the samples' places in the global batch, for random draws that do not
    depend on the rank (:func:`sample_generator`). ``weights`` (B,) is what each sample's loss counts: 1,
    what is configured for a prior sample, 0 for one that only fills a validation batch. ``mask``
    (B, 1, H/8, W/8), where masks are configured, is what each place of a sample counts. Where prompt
    pictures are used, either ``prompts`` (B, 3, S, S) are they as the image encoder takes them, or, from a
    cache, ``embeddings`` (B, embed_dim) what it gave. ``skipped`` names pictures that could not be decoded
    and were replaced.
    """

    step: int
    keys: list[str]
    captions: list[str]
    size: Size
    original_sizes: torch.Tensor
    crops: torch.Tensor
    positions: torch.Tensor
    weights: torch.Tensor
    pixels: torch.Tensor | None = None
    moments: torch.Tensor | None = None
    control: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    prompts: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on ``device``."""
        moved: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, torch.Tensor):
                moved[f.name] = value.to(device, non_blocking=non_blocking)
        return replace(self, **moved)


@dataclass(frozen=True)
class _Values:
    """A picture as pixels or moments, and in the same form its control picture; its mask; its prompt picture
    as the image encoder takes it, or what that gave.
    """

    picture: torch.Tensor
    control: torch.Tensor | None
    mask: torch.Tensor | None
    prompt: torch.Tensor | None = None


@dataclass(frozen=True)
class _Draw:
    """The random numbers of a sample, each in [0, 1) but for ``flip`` and ``view``."""

    crop: float = 0.5
    flip: bool = False
    caption: float = 0.0
    view: int = 0


@dataclass(frozen=True)
class _Sample:
    """One prepared sample of a batch."""

    row: int
    caption: str
    geometry: Geometry
    values: _Values
    skipped: tuple[str, ...] = ()


class _NoneReadable(Exception):
    """No picture of a bucket can be read: their keys, and what was wrong with the first."""

    def __init__(self, keys: list[str], reason: str) -> None:
        super().__init__(reason)
        self.keys = keys


def open_dataset(
    config: DataConfig, *, seed: int, batch_size: int, world_size: int = 1, rank: int = 0
) -> TrainData:
    """Gather the pictures and captions of a run. Reads picture headers, writes nothing.

    ``batch_size`` is per rank. Raises :class:`DataError` as :func:`gather` does.
    """
    manifest, findings = gather(config)
    return TrainData(
        config, manifest, findings, seed=seed, batch_size=batch_size, world_size=world_size, rank=rank
    )


class TrainData(Rows):
    """The training and validation batches of a run.

    :meth:`batch` is a pure function of the step: random crop, flip and choice of caption are hashed
    from (seed, step, position in the global batch). It can be pickled to worker processes.
    """

    _latents: LatentCache | None = None
    _embeddings: EmbeddingCache | None = None

    def use_latents(self, cache: LatentCache) -> None:
        """Take latents from a complete cache from now on, in place of pictures.

        Raises :class:`DataError` if pictures are not in it, unless unreadable ones are to be skipped.
        """
        cache.store.refresh()
        missing = int(cache.missing().any(axis=1).sum())
        if missing and (self.config.on_unreadable == "error" or missing == len(self.manifest)):
            raise DataError(
                f"the latent cache {cache.store.folder} lacks {missing} of {len(self.manifest)} pictures; "
                "run `python -m hydit_core.train cache CONFIG.toml` to complete it"
            )
        cache.load(self.config.cache.ram_mb << 20)
        self._latents = cache

    def use_prompts(self, prompts: PromptImages, cache: EmbeddingCache | None = None) -> None:
        """Give prompt pictures with every batch from now on, or what a complete ``cache`` holds of them.

        Raises :class:`DataError` if pictures are not in it, unless unreadable ones are to be skipped.
        """
        self.prompts = prompts
        if cache is None:
            return
        cache.store.refresh()
        if cache.missing().any() and self.config.on_unreadable == "error":
            raise DataError(
                f"the cache {cache.store.folder} lacks prompt pictures; run "
                "`python -m hydit_core.train cache CONFIG.toml` to complete it"
            )
        cache.load(self.config.cache.ram_mb << 20)
        self._embeddings = cache

    def summary(self) -> DataSummary:
        """Counts of what was found, for ``--dry-run`` and the log."""
        return summarize(self)

    def some_moments(
        self, encode: Callable[[torch.Tensor], torch.Tensor], count: int, side: int
    ) -> Iterator[torch.Tensor]:
        """Moments (2 C, h, w) of up to ``count`` training pictures from all over the list.

        From the latent cache where there is one; else ``encode`` gets pixels (3, H, W) of at most ``side``
        each way. Unreadable pictures are passed over. The same for every rank.
        """
        rows = self.layout.train_rows
        for row in rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]:
            try:
                if self._latents is not None:
                    yield self._latents.get(int(row), False)
                    continue
                picture, _ = self.manifest.load(int(row), self.config.alpha_color)
            except DataError:
                continue
            width, height = (min(side, edge) for edge in self.sizes[self.bucket(row)])
            yield encode(to_tensor(Geometry.cover(picture.size, (width, height)).apply(picture)))

    def batch(self, step: int) -> Batch:
        """This rank's samples of ``step``.

        Where no picture of its size can be read and such are to be skipped, pictures of the next size that
        is most alike. Raises :class:`DataError` for an unreadable picture otherwise, or if none is readable.
        """
        indices = self.order.samples(step)
        positions = self.order.positions(self.rank)
        epochs = self.order.passes(step)

        own = slice(positions.start, positions.stop)
        rows = partial(self._training_rows, indices[own], epochs[own])
        draws = [self._draw(step, position) for position in positions]
        bucket, samples = self._readable(self.order.bucket(step), rows, draws)
        weights = [self.config.prior.weight if self.is_prior(s.row) else 1.0 for s in samples]
        return self._collate(step, samples, self.sizes[bucket], positions, weights)

    def loader(self, start_step: int, end_step: int, workers: int | None = None) -> Iterator[Batch]:
        """Batches of the steps from ``start_step`` up to, not including, ``end_step``, in order.

        ``workers`` processes (default: as configured) prepare them ahead; the batches are the same
        for any number. Draws nothing from torch's global generator.
        """
        workers = chosen_workers(self.config) if workers is None else workers
        if workers == 0:
            yield from (self.batch(step) for step in range(start_step, end_step))
            return
        batches = torch.utils.data.DataLoader(
            _Steps(self),
            sampler=range(start_step, end_step),
            batch_size=None,
            num_workers=workers,
            generator=torch.Generator().manual_seed(0),
        )
        try:
            for batch in batches:
                if isinstance(batch, DataError):
                    raise batch
                yield batch
        except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
            # Torch's own word, or what reading from a process gives that ended in the middle of a tensor;
            # "Caught ..." is the error of a worker that lives.
            said = str(error).partition("\n")[0]
            if said.startswith("Caught ") or (
                isinstance(error, RuntimeError) and not said.startswith("DataLoader worker")
            ):
                raise
            raise DataError(
                f"a process that prepares pictures ended ({said or type(error).__name__}): it may have been "
                "killed for lack of memory; continue with fewer data.workers"
            ) from error

    def validation_batches(self, *, prior: bool = False) -> Iterator[Batch]:
        """This rank's share of the held-out pictures: no randomness, first caption, center crop.

        Every rank gets the same number of batches, all of ``batch_size``; what only fills them up, a batch's
        own pictures again, has weight 0. ``positions`` count through the whole validation set, and ``step``
        is -1. ``prior`` asks for the pictures that show what is forgotten instead.
        """
        held_out = self._held_out(prior)
        batch_size, world = self.order.batch_size, self.order.world_size
        batches: list[tuple[np.ndarray, list[float]]] = []
        buckets = self.layout.bucket_of_row[held_out]
        for bucket in np.unique(buckets):
            places = np.flatnonzero(buckets == bucket)
            for start in range(0, len(places), batch_size):
                real = places[start : start + batch_size]
                filled = np.resize(real, batch_size)
                batches.append((filled, [1.0] * len(real) + [0.0] * (batch_size - len(real))))
        while len(batches) % world:
            batches.append((batches[0][0], [0.0] * batch_size))
        for places, weights in batches[self.rank :: world]:
            rows = held_out[places]
            wanted = self.bucket(rows[0])
            bucket, samples = self._readable(
                wanted, partial(self._validation_rows, held_out, rows), [_Draw()] * len(rows)
            )
            counts = [bucket == wanted and not sample.skipped for sample in samples]
            weights = [weight * count for weight, count in zip(weights, counts, strict=True)]
            yield self._collate(-1, samples, self.sizes[bucket], places, weights)

    def validation_copies(self, *, prior: bool = False) -> int:
        """How often every batch of :meth:`validation_batches`, on all ranks, holds each of its pictures."""
        buckets = self.layout.bucket_of_row[self._held_out(prior)]
        batch_size = self.order.batch_size
        fullest = [min(batch_size, int(count)) for count in np.unique(buckets, return_counts=True)[1]]
        return batch_size // max(fullest, default=batch_size)

    def _held_out(self, prior: bool) -> np.ndarray:
        return self.layout.prior_validation if prior else self.layout.validation

    def _draw(self, step: int, position: int) -> _Draw:
        draw = (self.seed, step, position)
        crop = uniform(*draw, "crop") if self.config.random_crop else 0.5
        view = int(uniform(*draw, "view") * self.config.image_prompt.views)
        return _Draw(crop, uniform(*draw, "flip") < self.config.flip, uniform(*draw, "caption"), view)

    def _training_rows(
        self, indices: np.ndarray, epochs: np.ndarray, number: int, bucket: int
    ) -> Iterator[int]:
        """The row of one of the samples, then its stand-ins: those that follow it in the bucket, its own kind
        first. In another bucket than its own, all, beginning at a place that differs between samples.
        """
        index, epoch = int(indices[number]), int(epochs[number])
        members = self.order.bucket_members(bucket)
        own = self.samples.bucket(index) == bucket
        start = index - members.start if own else index

        def after() -> Iterator[int]:  # nearly always only its first is asked for
            return (members[(start + i) % len(members)] for i in range(len(members)))

        prior = self.samples.is_prior(index)
        if own and prior:
            yield from self.samples.prior_from(index, epoch)
        for kind in (prior, not prior):
            if not (own and prior and kind):
                yield from (self.samples.row(i, epoch) for i in after() if self.samples.is_prior(i) == kind)

    def _validation_rows(
        self, held_out: np.ndarray, rows: np.ndarray, number: int, bucket: int
    ) -> Iterator[int]:
        row = int(rows[number])
        alike = held_out[self.layout.bucket_of_row[held_out] == bucket]
        if row in alike:
            yield row
        yield from (int(other) for other in alike if other != row)

    def _readable(
        self, bucket: int, rows: Callable[[int, int], Iterable[int]], draws: Sequence[_Draw]
    ) -> tuple[int, list[_Sample]]:
        """A sample for each of ``draws``, all of one bucket: ``bucket``, or if none in it can be read, the
        next that is most alike. Every rank comes to the same, as every one tries all pictures.

        ``rows`` gives the row of a sample and its stand-ins in a bucket, by (number, bucket).
        """
        lost: list[str] = []
        reason = ""
        shapes = np.log([width / height for width, height in self.sizes])
        for other in np.argsort(np.abs(shapes - shapes[bucket]), kind="stable").tolist():
            try:
                samples = [self._first_readable(rows(i, other), other, d) for i, d in enumerate(draws)]
            except _NoneReadable as error:
                lost += error.keys
                reason = reason or str(error)
                continue
            samples[0] = replace(samples[0], skipped=(*lost, *samples[0].skipped))
            return other, samples
        raise DataError(f"none of {len(lost)} pictures can be read; the first: {reason}")

    def _first_readable(self, rows: Iterable[int], bucket: int, draw: _Draw) -> _Sample:
        """The first of ``rows`` that can be read; a second one is only tried if that is configured."""
        skipped: list[str] = []
        reason = ""
        for row in rows:
            try:
                geometry, values = self._picture(row, self.sizes[bucket], draw)
            except DataError as error:
                if self.config.on_unreadable == "error":
                    raise
                skipped.append(self.manifest.keys[row])
                reason = reason or str(error)
                continue
            which = int(draw.caption * self.manifest.caption_count(row))
            return _Sample(row, self.manifest.caption(row, which), geometry, values, tuple(skipped))
        raise _NoneReadable(skipped, reason)

    def _picture(self, row: int, size: Size, draw: _Draw) -> tuple[Geometry, _Values]:
        """How a picture is cropped, and what becomes of it and of what lies beside it."""
        cache, maker = self._latents, self.control
        if cache is not None:
            geometry = Geometry.cover(self.manifest.size(row), size, flip=draw.flip)
            moments = cache.get(row, draw.flip)
            control_moments = None if maker is None else cache.get(row, draw.flip, control=True)
            return geometry, _Values(
                moments, control_moments, self._mask(row, geometry), self._prompt(row, draw)
            )
        picture, content = self.manifest.load(row, self.config.alpha_color)
        prompt = self._prompt(row, draw, picture)
        geometry = Geometry.cover(picture.size, size, fraction=draw.crop, flip=draw.flip)
        picture = geometry.apply(picture)
        control = None
        if maker is not None:
            control = to_tensor(maker.make(picture, geometry, maker.file(self.manifest, row)))
        return geometry, _Values(to_tensor(picture), control, self._mask(row, geometry, content), prompt)

    def _mask(self, row: int, geometry: Geometry, content: bytes | None = None) -> torch.Tensor | None:
        return None if self.masks is None else self.masks.make(self.manifest, row, geometry, content)

    def _prompt(self, row: int, draw: _Draw, picture: Image.Image | None = None) -> torch.Tensor | None:
        """A row's prompt picture as the encoder takes it, or its embedding; ``picture`` is the row's own."""
        if self._embeddings is not None:
            return self._embeddings.get(row, draw.view)
        if self.prompts is None:
            return None
        file = self.prompts.file(self.manifest, row)
        own = picture if file == self.manifest.picture(row) else None
        return self.prompts.make(file, draw.view, loaded=own)

    def _collate(
        self, step: int, samples: list[_Sample], size: Size, positions: Any, weights: list[float]
    ) -> Batch:
        values = torch.stack([s.values.picture for s in samples])
        controls = [s.values.control for s in samples if s.values.control is not None]
        masks = [s.values.mask for s in samples if s.values.mask is not None]
        prompts = [s.values.prompt for s in samples if s.values.prompt is not None]
        seen = torch.stack(prompts) if prompts else None
        return Batch(
            step=step,
            keys=[self.manifest.keys[s.row] for s in samples],
            captions=[s.caption for s in samples],
            size=size,
            original_sizes=torch.tensor([s.geometry.original for s in samples]),
            crops=torch.tensor([(s.geometry.left, s.geometry.top) for s in samples]),
            positions=torch.tensor([int(p) for p in positions]),
            weights=torch.tensor(weights),
            pixels=values if self._latents is None else None,
            moments=values if self._latents is not None else None,
            control=torch.stack(controls) if controls else None,
            mask=torch.stack(masks) if masks else None,
            prompts=seen if self._embeddings is None else None,
            embeddings=seen if self._embeddings is not None else None,
            skipped=tuple(key for s in samples for key in s.skipped),
        )


class _Steps(torch.utils.data.Dataset["Batch | DataError"]):
    """Batches by step number, for torch's DataLoader.

    An error is handed over like a batch: raised in a worker, it would come out with its whole traceback as
    text.
    """

    def __init__(self, data: TrainData) -> None:
        self._data = data

    def __getitem__(self, step: int) -> Batch | DataError:
        try:
            return self._data.batch(step)
        except DataError as error:
            return error
