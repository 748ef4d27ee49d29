"""What a training run says about its data: the ``[data]`` table of a configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ..images import MAX_SIDE, SIZE_MULTIPLE, Size, check_size, parse_size
from .section import AnyDtypeName, PlainPath, Section

_SOURCE_PATHS = ("path", "root", "control_dir", "mask_dir")


class SourceConfig(Section):
    """One place that pictures and captions come from.

    A folder holds pictures with a same-named ``.txt`` beside each. A JSONL, CSV, Parquet or Arrow file
    has one row per picture; relative picture paths start at ``root``, by default the folder of that
    file. Parquet and Arrow may hold the pictures themselves. ``index`` is Tencent's JSON over Arrow files.
    """

    path: PlainPath
    kind: Literal["auto", "folder", "jsonl", "csv", "arrow", "parquet", "index"] = "auto"
    root: PlainPath | None = None
    image_field: str | None = None
    """Column that holds the picture's path; by default the first known name that a row has."""
    caption_fields: tuple[str, ...] = ()
    """Columns that hold captions; by default every known name. Several captions are alternatives."""
    control_field: str | None = None
    """Column with the path of a control picture."""
    control_dir: PlainPath | None = None
    """Folder only: where the control pictures lie, named like the pictures; default: its ``control``."""
    mask_field: str | None = None
    """Column with the path of a mask; empty in a row: all of that picture counts."""
    mask_dir: PlainPath | None = None
    """Folder only: where the masks lie, named like the pictures; default: its ``mask``, if there is one."""
    caption_lines: bool = False
    """Folder only: every line of a ``.txt`` is one alternative caption, not the whole file one caption."""
    caption: str | None = None
    """The caption of this source's pictures that have none of their own."""
    repeats: Annotated[int, Field(ge=1, le=100_000)] = 1
    """How many times an epoch shows each of this source's pictures."""
    prior: bool = False
    """The pictures show what the base knows already and shall not forget, see :class:`PriorConfig`."""


class BucketConfig(Section):
    """Sizes for pictures of different shapes; a picture goes to the nearest aspect ratio.

    Without ``sizes`` the buckets are Tencent's: from the square base, one side grows and the other
    shrinks by ``step`` until ``max_side`` (default 2 x base) and ``min_side`` (default base / 2).
    """

    enabled: bool = False
    step: Annotated[int, Field(ge=SIZE_MULTIPLE, le=MAX_SIDE, multiple_of=SIZE_MULTIPLE)] = 64
    min_side: Annotated[int, Field(ge=SIZE_MULTIPLE, le=MAX_SIDE, multiple_of=SIZE_MULTIPLE)] | None = None
    max_side: Annotated[int, Field(ge=SIZE_MULTIPLE, le=MAX_SIDE, multiple_of=SIZE_MULTIPLE)] | None = None
    sizes: tuple[str, ...] = ()

    @field_validator("sizes")
    @classmethod
    def _valid_sizes(cls, sizes: tuple[str, ...]) -> tuple[str, ...]:
        for text in sizes:
            check_size(parse_size(text))
        return sizes

    @model_validator(mode="after")
    def _sizes_need_buckets(self) -> BucketConfig:
        if self.sizes and not self.enabled:
            raise ValueError("sizes are given but enabled is false: set enabled = true to use buckets")
        return self


class CacheConfig(Section):
    """What is computed once and kept on disk, outside the picture folders.

    With ``latents`` a picture's crop is fixed (the center) and its flip is one of two stored
    variants, because the VAE no longer sees the picture during training. ``text`` keeps the text
    encoders' outputs and is refused when the encoders are trained.
    """

    dir: PlainPath | None = None
    latents: bool = False
    text: bool = False
    dtype: Annotated[Literal["fp32", "fp16", "bf16"], AnyDtypeName] = "fp16"
    ram_mb: Annotated[int, Field(ge=0, le=2**30)] = 4096
    """Caches up to this size are read into memory whole, once; larger ones are read as they are used."""


class ControlConfig(Section):
    """Where the control pictures of a ControlNet training come from.

    ``canny`` makes edges from the pictures, after crop and flip; ``depth`` asks a depth-estimation model of
    transformers, a local folder; ``files`` reads them: from a source's ``control_dir`` or ``control_field``.
    """

    kind: Literal["canny", "depth", "files"]
    low: Annotated[int, Field(ge=0, le=10000)] = 100
    high: Annotated[int, Field(ge=0, le=10000)] = 200
    """Thresholds of canny; these are the published ControlNets' own."""
    model: PlainPath | None = None
    label: str = ""
    """What the control pictures show ("pose", "depth"), for the file that is written; default: the kind."""

    @model_validator(mode="after")
    def _consistent(self) -> ControlConfig:
        if (self.kind == "depth") != (self.model is not None):
            raise ValueError("model (the folder of a depth-estimation model) belongs to kind = 'depth'")
        if self.low > self.high:
            raise ValueError(f"low = {self.low} is above high = {self.high}")
        return self


class PriorConfig(Section):
    """How pictures of sources with ``prior = true`` are mixed with the others (Ruiz et al. 2023, DreamBooth).

    However many there are, they make up ``share`` of every epoch, all of them equally often: where there are
    more than that, an epoch goes on where the one before stopped. They are never held out for validation.
    """

    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """What the loss of such a picture counts."""


class MaskConfig(Section):
    """Which part of a picture the loss looks at.

    ``files`` reads grayscale masks, white where the picture counts, from a source's ``mask_dir`` or
    ``mask_field``; pictures of sources without either count whole. ``alpha`` takes the pictures' own
    transparency. The loss is the mean over what counts, so a small part counts as much as a large one.
    """

    kind: Literal["files", "alpha"]
    outside: Annotated[float, Field(ge=0, le=1)] = 0.0
    """What the rest of the picture counts."""


class DataConfig(Section):
    """Everything about the pictures and captions of a training run."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    resolution: int | Size = 1024
    """Edge in pixels of the square base size, or one fixed (width, height)."""
    buckets: BucketConfig = BucketConfig()
    crop: Literal["random", "center"] | None = None
    """Where the longer side is cropped; unset means random, or the center when latents are cached."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability of a left-right flip."""
    min_side: Annotated[int, Field(ge=0, le=MAX_SIDE)] = 0
    """Pictures whose shorter side is below this many pixels are left out, and counted."""
    alpha_color: str = "white"
    """What shows through transparent pixels: a CSS name or ``#rrggbb``."""
    on_unreadable: Literal["error", "skip"] = "error"
    allow_missing_captions: bool = False
    empty_caption: str = ""
    """Caption of pictures that have none, where ``allow_missing_captions`` permits them."""
    validation: int | float = 0
    """A count (int) or a fraction below 1 (float) of the pictures, held out by a hash of their names."""
    control: ControlConfig | None = None
    mask: MaskConfig | None = None
    prior: PriorConfig = PriorConfig()
    posterior: Literal["auto", "sample", "mode"] = "auto"
    """Whether each step samples the VAE's posterior or takes its mean; ``auto`` does what the base was
    trained with."""
    cache: CacheConfig = CacheConfig()
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Processes that prepare batches ahead; the batches do not depend on their number."""

    @field_validator("resolution")
    @classmethod
    def _valid_resolution(cls, resolution: int | Size) -> int | Size:
        check_size((resolution, resolution) if isinstance(resolution, int) else resolution)
        return resolution

    @field_validator("alpha_color")
    @classmethod
    def _valid_color(cls, color: str) -> str:
        from PIL import ImageColor

        ImageColor.getrgb(color)
        return color

    @field_validator("validation")
    @classmethod
    def _valid_validation(cls, value: int | float) -> int | float:
        if value < 0 or (isinstance(value, float) and value >= 1):
            raise ValueError(f"validation = {value}: use a count (0, 1, 2, ...) or a fraction below 1.0")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.buckets.enabled and not isinstance(self.resolution, int) and not self.buckets.sizes:
            raise ValueError(
                "buckets are generated from one base edge: set resolution to a single number, "
                "or list buckets.sizes"
            )
        if self.cache.latents and self.crop == "random":
            raise ValueError(
                "cached latents have a fixed crop: remove crop = 'random', or set cache.latents = false"
            )
        for source in self.sources:
            if (source.mask_dir or source.mask_field) and (self.mask is None or self.mask.kind != "files"):
                raise ValueError("mask_dir and mask_field belong to a table data.mask with kind = 'files'")
        priors = [source.prior for source in self.sources]
        if all(priors):
            raise ValueError("every source has prior = true: one must show what is to be learned")
        if self.prior != PriorConfig() and not any(priors):
            raise ValueError("the table data.prior needs a source with prior = true")
        return self

    @property
    def fixed_size(self) -> Size:
        """The one size that is trained when buckets are off."""
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution

    @property
    def random_crop(self) -> bool:
        """Whether the crop is drawn anew each time a picture is shown."""
        return self.crop != "center" and not self.cache.latents

    def resolved(self, base: Path) -> DataConfig:
        """A copy whose relative paths start at ``base``, for example the configuration file's folder."""

        def absolute(path: Path | None) -> Path | None:
            return None if path is None else base / path.expanduser()

        sources = tuple(
            s.model_copy(update={n: absolute(getattr(s, n)) for n in _SOURCE_PATHS}) for s in self.sources
        )
        cache = self.cache.model_copy(update={"dir": absolute(self.cache.dir)})
        control = self.control and self.control.model_copy(update={"model": absolute(self.control.model)})
        return self.model_copy(update={"sources": sources, "cache": cache, "control": control})
