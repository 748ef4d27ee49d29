"""What was found in the data, for people (``--dry-run``) and for logs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .rows import Rows


@dataclass(frozen=True)
class DataSummary:
    """Counts of a run's data. ``buckets`` maps "WxH" to the number of training pictures."""

    pictures: int
    train: int
    samples_per_epoch: int
    prior: int
    """Samples per epoch that show prior pictures."""
    prior_left_out: int
    """Prior pictures of sizes that got no place in an epoch."""
    masks: int
    """Pictures with a mask of their own, in a file."""
    image_prompts: int
    """Pictures with a prompt picture of their own, in a file."""
    validation: int
    prior_validation: int
    """Pictures held out to see what is forgotten."""
    sources: dict[str, int]
    buckets: dict[str, int]
    steps_per_epoch: int
    captions: int
    caption_bytes: tuple[int, int, int]
    """Shortest, median and longest caption in bytes of UTF-8."""
    missing_captions: int
    missing_shown: list[str]
    skipped: int
    skipped_shown: list[str]
    passed_over: list[str]
    """What folders hold that is not used: pictures of other formats, captions without a picture."""
    too_small: int
    enlarged: int
    """Pictures smaller than their training size."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The summary as text, one fact per line."""
        short, middle, long = self.caption_bytes
        forgotten = f", {self.prior_validation} to see what is forgotten" if self.prior_validation else ""
        lines = [
            f"pictures: {self.pictures} ({self.train} to train, {self.validation} for validation{forgotten})",
            *(f"  from {name}: {count}" for name, count in self.sources.items()),
            f"samples per epoch: {self.samples_per_epoch}, in {self.steps_per_epoch} batches",
            *([f"  of prior pictures: {self.prior}"] if self.prior else []),
            *([f"masks: {self.masks}"] if self.masks else []),
            *([f"prompt pictures: {self.image_prompts}"] if self.image_prompts else []),
            f"captions: {self.captions}, of {short} to {long} bytes (median {middle})",
            "sizes:",
            *(f"  {size}: {count}" for size, count in self.buckets.items()),
        ]
        if self.enlarged:
            lines.append(f"smaller than their training size, so enlarged: {self.enlarged}")
        if self.prior_left_out:
            lines.append(f"left out, prior pictures of sizes too rare for the share: {self.prior_left_out}")
        if self.too_small:
            lines.append(f"left out, below min_side: {self.too_small}")
        if self.skipped:
            lines += [f"left out, unreadable: {self.skipped}", *(f"  {name}" for name in self.skipped_shown)]
        lines += self.passed_over
        if self.missing_captions:
            lines += [
                f"without a caption: {self.missing_captions}",
                *(f"  {name}" for name in self.missing_shown),
            ]
        return lines


def summarize(data: Rows) -> DataSummary:
    """Count what a dataset holds."""
    manifest, findings, config = data.manifest, data.findings, data.config
    lengths = manifest.captions.lengths()
    layout = data.layout
    train = layout.train_rows
    shown = np.concatenate([layout.own, data.samples.prior_rows()])
    counts = np.bincount(layout.bucket_of_row[train], minlength=len(data.sizes))
    targets = np.array(data.sizes)[layout.bucket_of_row]
    per_source = np.bincount(manifest.sources, minlength=len(config.sources))
    return DataSummary(
        pictures=len(manifest),
        train=len(train),
        samples_per_epoch=len(data.samples),
        prior=data.samples.prior,
        prior_left_out=len(np.setdiff1d(train, shown)),
        masks=sum("mask" in manifest.extra(row) for row in range(len(manifest))),
        image_prompts=sum("image_prompt" in manifest.extra(row) for row in range(len(manifest))),
        validation=len(layout.validation),
        prior_validation=len(layout.prior_validation),
        sources={str(s.path): int(n) for s, n in zip(config.sources, per_source, strict=True)},
        buckets={f"{w}x{h}": int(n) for (w, h), n in zip(data.sizes, counts, strict=True) if n},
        steps_per_epoch=data.steps_per_epoch,
        captions=len(lengths),
        caption_bytes=(int(lengths.min()), int(np.median(lengths)), int(lengths.max())),
        missing_captions=findings.missing_captions.count,
        missing_shown=findings.missing_captions.shown,
        skipped=findings.unreadable.count,
        skipped_shown=findings.unreadable.shown,
        passed_over=findings.passed_over.lines(),
        too_small=findings.too_small,
        enlarged=int(((manifest.widths < targets[:, 0]) | (manifest.heights < targets[:, 1])).sum()),
    )
