"""What a folder of pictures and captions gives a training: a text for people, and a sheet of thumbnails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from pydantic import ValidationError

from ..data.config import BucketConfig, DataConfig, SourceConfig
from ..data.dataset import TrainData, open_dataset
from ..data.summary import DataSummary
from ..data.thumbnails import thumbnails
from ..errors import ConfigError
from ..images import SIZE_MULTIPLE
from ..text.loading import load_tokenizers
from ..weights.bundle import Bundle, bundle
from ..weights.load import model_config
from .conditioning import caption_fits
from .quick.survey import survey
from .quick.wish import Wish

_EXAMPLE = 80


class DatasetReport(NamedTuple):
    """A dataset's text, one fact a line, and its sheet."""

    text: str
    sheet: Image.Image


def look_at(folder: Path, base: Path, resolution: int = 0) -> DatasetReport:
    """Look at the pictures of a folder, with its subfolders, and at their captions. Writes nothing.

    Args:
        base: the model that is to be trained, whose tokenizers count.
        resolution: side of the square that sizes are made around; 0: as ``base`` draws.

    Raises:
        ConfigError: no such resolution.
        DataError: there is no picture that can be read.
        WeightsError: the base lacks a tokenizer.
    """
    opened = bundle(base, only=("dit", "bert", "t5"), kinds=("dit",))
    side = resolution or _side(opened)
    several = survey(Wish(folder, model=base)).caption_lines
    data = open_dataset(_config(folder, side, several), seed=0, batch_size=1)
    lines = [
        *_counts(data.summary(), side, str(folder)),
        *_captions(data, opened),
    ]
    return DatasetReport("\n".join(lines), thumbnails(data.manifest))


def _side(opened: Bundle) -> int:
    """The side of the square that has as many pixels as the base's own pictures."""
    defaults = opened.info.defaults
    side = (defaults.width * defaults.height) ** 0.5
    return max(1, round(side / SIZE_MULTIPLE)) * SIZE_MULTIPLE


def _config(folder: Path, side: int, several: bool) -> DataConfig:
    try:
        return DataConfig(
            sources=(SourceConfig(path=folder, kind="folder", caption_lines=several),),
            resolution=side,
            buckets=BucketConfig(enabled=True, step=min(64, max(SIZE_MULTIPLE, side // 16 // 8 * 8))),
            on_unreadable="skip",
            allow_missing_captions=True,
        )
    except ValidationError as error:
        raise ConfigError(f"resolution {side}: {error.errors()[0]['msg']}") from None


def _counts(found: DataSummary, side: int, folder: str) -> Iterator[str]:
    """What is there and at which sizes it would be trained; files by their names below the folder."""

    def named(lines: list[str]) -> Iterator[str]:
        return (f"  {line.replace(folder, '').lstrip('/')}" for line in lines)

    yield f"{found.pictures} pictures"
    if found.skipped:
        yield f"cannot be read, so left out: {found.skipped}"
        yield from named(found.skipped_shown)
    if found.missing_captions:
        yield f"without a caption: {found.missing_captions} (red frames)"
        yield from named(found.missing_shown)
    yield from found.passed_over
    yield f"sizes around {side}x{side}:"
    yield from (f"  {size}: {count}" for size, count in found.buckets.items())
    if found.enlarged:
        yield f"smaller than their size, so enlarged: {found.enlarged}"


def _captions(data: TrainData, opened: Bundle) -> Iterator[str]:
    """How many captions there are, how long they are, and what of them the encoders do not see."""
    assert opened.dit is not None  # it was opened as one
    dit = model_config(opened.dit, opened.kind)
    tokenizers = load_tokenizers(opened, text_len=dit.text_len, t5_len=dit.t5_len)
    captions = [caption for caption in data.captions() if caption]
    yield f"captions: {len(captions)}, of {len(set(captions))} texts"
    for fit in caption_fits(captions, tokenizers):
        yield f"  {fit.encoder}: up to {fit.longest} of {fit.limit} tokens"
        if fit.cut:
            yield f"  {fit.encoder} cuts {fit.cut}, for example of: {fit.example[:_EXAMPLE]!r}"
        if fit.unknown:
            yield f"  {fit.encoder} does not know words of {fit.unknown}"
