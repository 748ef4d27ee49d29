"""What a training run says about its data: the ``[data]`` table of a configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from ..images import MAX_SIDE, SIZE_MULTIPLE, Size, check_size, parse_size
from .remote import RemotePath, place
from .section import AnyDtypeName, PlainPath, Section

SourcePath = Annotated[PlainPath, AfterValidator(place)]
_SOURCE_PATHS = ("path", "root", "control_dir", "mask_dir", "image_prompt_dir")


class SourceConfig(Section):
    """One place that pictures and captions come from.

    A folder holds pictures with a same-named ``.txt`` beside each. A JSONL, CSV, Parquet or Arrow file
    has one row per picture; relative picture paths start at ``root``, by default the folder of that
    file. Parquet and Arrow may hold the pictures themselves. ``index`` is Tencent's JSON over Arrow files. A
    tar file, as of webdataset, holds pictures and captions of the same names; a folder that Hugging Face's
    ``datasets`` saved is its Arrow files.
    """

    path: SourcePath = Field(
        description="a folder, a file, or a pattern of files such as shards/*.tar; on a disk, or a URL"
    )
    kind: Literal["auto", "folder", "jsonl", "csv", "arrow", "parquet", "tar", "index"] = Field(
        default="auto", description="what path is; auto goes by its name"
    )
    root: SourcePath | None = Field(
        default=None, description="where relative paths in a table begin; unset: its folder"
    )
    image_field: str | None = Field(
        default=None,
        description="table: the column with the picture's path; unset: the first known name in the row",
    )
    caption_fields: tuple[str, ...] = Field(
        default=(),
        description="table: the columns with captions, of which one is drawn each time; empty: known names",
    )
    control_field: str | None = Field(
        default=None, description="table: the column with the control picture's path"
    )
    control_dir: PlainPath | None = Field(
        default=None,
        description="folder: where control pictures lie, named as the pictures; unset: its folder control",
    )
    mask_field: str | None = Field(
        default=None,
        description="table: the column with the mask's path; where it is empty, the whole picture counts",
    )
    mask_dir: PlainPath | None = Field(
        default=None,
        description="folder: where masks lie, named as the pictures; unset: its folder mask, if there is one",
    )
    image_prompt_field: str | None = Field(
        default=None,
        description="table: the column with the path of the picture's prompt picture; where it is empty, the "
        "picture itself",
    )
    image_prompt_dir: PlainPath | None = Field(
        default=None,
        description="folder: where prompt pictures lie, named as the pictures; unset: its image_prompt",
    )
    caption_lines: bool = Field(
        default=False,
        description="folder: every line of a .txt is a caption of its own, one of which is drawn each time",
    )
    caption: str | None = Field(
        default=None, description="the caption of pictures that have none of their own"
    )
    trigger: str = Field(
        default="", description="words that are put before each caption in which they do not occur"
    )
    stream: bool | None = Field(
        default=None,
        description="shuffle file by file and within data.window, instead of all pictures at once: for tar, "
        "Parquet and Arrow files; unset: for such as are not on a disk, unless latents are cached",
    )
    repeats: int = Field(
        default=1, ge=1, le=100_000, description="how often an epoch shows each of these pictures"
    )
    prior: bool = Field(
        default=False, description="these pictures show what the base already knows and should not forget"
    )
    validation: bool = Field(
        default=False,
        description="hold all of these pictures out; with prior, they show how much is forgotten",
    )


class BucketConfig(Section):
    """Sizes for pictures of different shapes; a picture goes to the nearest aspect ratio.

    Without ``sizes`` the buckets are Tencent's: from the square base, one side grows and the other
    shrinks by ``step`` until ``max_side`` (default 2 x base) and ``min_side`` (default base / 2).
    """

    enabled: bool = Field(default=False, description="train at several shapes; off: at one size")
    step: int = Field(
        default=64,
        ge=SIZE_MULTIPLE,
        le=MAX_SIDE,
        multiple_of=SIZE_MULTIPLE,
        description="by how much the sides differ from one size to the next",
    )
    min_side: int | None = Field(
        default=None,
        ge=SIZE_MULTIPLE,
        le=MAX_SIDE,
        multiple_of=SIZE_MULTIPLE,
        description="smallest side; unset: half of data.resolution",
    )
    max_side: int | None = Field(
        default=None,
        ge=SIZE_MULTIPLE,
        le=MAX_SIDE,
        multiple_of=SIZE_MULTIPLE,
        description="largest side; unset: twice data.resolution",
    )
    sizes: tuple[str, ...] = Field(default=(), description="these sizes instead of the computed ones")

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

    dir: PlainPath | None = Field(
        default=None,
        description="where the caches lie, outside the picture folders; unset: the user's cache folder",
    )
    latents: bool = Field(default=False, description="encode each picture once, at a fixed central crop")
    text: bool = Field(
        default=False, description="encode each caption once; not while text encoders are trained"
    )
    dtype: Annotated[Literal["fp32", "fp16", "bf16"], AnyDtypeName] = Field(
        default="fp16", description="dtype of what is kept"
    )
    ram_mb: int = Field(
        default=4096,
        ge=0,
        le=2**30,
        description="caches up to this size are read into memory whole, larger ones as they are used",
    )


class ControlConfig(Section):
    """Where the control pictures of a ControlNet training come from.

    ``canny`` makes edges from the pictures, after crop and flip; ``depth`` asks a depth-estimation model of
    transformers, a local folder; ``files`` reads them: from a source's ``control_dir`` or ``control_field``.
    """

    kind: Literal["canny", "depth", "files"] = Field(
        description="canny: edges of the pictures; depth: by a depth-estimation model; files: ready-made ones"
    )
    low: int = Field(default=100, ge=0, le=10000, description="canny: lower threshold")
    high: int = Field(default=200, ge=0, le=10000, description="canny: upper threshold")
    model: PlainPath | None = Field(
        default=None, description="depth: the folder of a depth-estimation model for transformers"
    )
    label: str = Field(
        default="", description="what control pictures show, such as pose, for the exported file; unset: kind"
    )

    @model_validator(mode="after")
    def _consistent(self) -> ControlConfig:
        if (self.kind == "depth") != (self.model is not None):
            raise ValueError("model (the folder of a depth-estimation model) belongs to kind = 'depth'")
        if self.low > self.high:
            raise ValueError(f"low = {self.low} is above high = {self.high}")
        return self


class ImagePromptConfig(Section):
    """Which pictures an IP-Adapter is shown in training.

    ``self`` takes the training pictures themselves, ``files`` others of the same thing: from a source's
    ``image_prompt_dir`` or ``image_prompt_field``; a picture without one is its own. Either is shown in
    ``views`` that differ in crop and orientation, so that copying it whole does not pay.
    """

    kind: Literal["self", "files"] = Field(
        default="self", description="self: the training pictures themselves; files: pictures in files"
    )
    views: int = Field(
        default=8,
        ge=1,
        le=256,
        description="in how many ways each is cropped and mirrored; 1: always whole, as it is",
    )
    least: float = Field(
        default=0.7, gt=0, le=1, description="the smallest fraction of each side that a view shows"
    )
    flip: float = Field(default=0.5, ge=0, le=1, description="the fraction of the views that are mirrored")


class PriorConfig(Section):
    """How pictures of sources with ``prior = true`` are mixed with the others (Ruiz et al. 2023, DreamBooth).

    However many there are, they make up ``share`` of every epoch, all of them equally often: where there are
    more than that, an epoch goes on where the one before stopped. They are never held out for validation.
    ``prompts`` has the base draw some of them.
    """

    share: float = Field(
        default=0.5, gt=0, lt=1, description="what part of every epoch prior pictures make up"
    )
    weight: float = Field(default=1.0, gt=0, le=1000, description="how much their loss counts")
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="prompts that the base draws before the run, one such picture of each"
    )


class MaskConfig(Section):
    """Which part of a picture the loss looks at.

    ``files`` reads grayscale masks, white where the picture counts, from a source's ``mask_dir`` or
    ``mask_field``; pictures of sources without either count whole. ``alpha`` takes the pictures' own
    transparency. The loss is the mean over what counts, so a small part counts as much as a large one.
    """

    kind: Literal["files", "alpha"] = Field(
        description="files: masks in files; alpha: the pictures' own transparency"
    )
    outside: float = Field(default=0.0, ge=0, le=1, description="how much the rest of the picture counts")


class DataConfig(Section):
    """Everything about the pictures and captions of a training run."""

    sources: tuple[SourceConfig, ...] = Field(
        min_length=1, description="where pictures and captions come from"
    )
    resolution: int | Size = Field(
        default=1024, description="the side of the square base size, or one fixed [width, height]"
    )
    buckets: BucketConfig = BucketConfig()
    crop: Literal["random", "center"] | None = Field(
        default=None,
        description="where the longer side is cropped; unset: random, or center with cached latents",
    )
    flip: float = Field(default=0.0, ge=0, le=1, description="probability of a left-right flip")
    min_side: int = Field(
        default=0,
        ge=0,
        le=MAX_SIDE,
        description="leave out, and count, pictures whose shorter side is less than this",
    )
    alpha_color: str = Field(default="white", description="what shows through transparent pixels")
    window: int = Field(
        default=2048,
        ge=1,
        le=10_000_000,
        description="streams: among how many pictures that follow each other their order is shuffled",
    )
    on_unreadable: Literal["error", "skip"] = Field(
        default="error", description="stop at an unreadable picture, or skip and count it"
    )
    allow_missing_captions: bool = Field(default=False, description="accept pictures without a caption")
    empty_caption: str = Field(
        default="", description="the caption of pictures that have none, where that is accepted"
    )
    validation: int | float = Field(
        default=0,
        description="how many pictures to hold out, or what fraction; chosen by a hash of their names",
    )
    control: ControlConfig | None = None
    mask: MaskConfig | None = None
    image_prompt: ImagePromptConfig = ImagePromptConfig()
    prior: PriorConfig = PriorConfig()
    posterior: Literal["auto", "sample", "mode"] = Field(
        default="auto",
        description="draw latents from the VAE's posterior, or take its mean; auto: as the base was trained",
    )
    cache: CacheConfig = CacheConfig()
    workers: int | None = Field(
        default=None,
        ge=0,
        le=1024,
        description="processes that prepare batches ahead; the batches are the same with any number; unset: "
        "by the machine",
    )

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
            if (source.image_prompt_dir or source.image_prompt_field) and self.image_prompt.kind != "files":
                raise ValueError(
                    "image_prompt_dir and image_prompt_field belong to a table data.image_prompt with kind = "
                    "'files'"
                )
        if all(source.prior or source.validation for source in self.sources):
            raise ValueError(
                "every source has prior = true or validation = true: one must show what is to be learned"
            )
        mixed = any(source.prior and not source.validation for source in self.sources)
        if self.prior != PriorConfig() and not mixed and "prompts" not in self.prior.model_fields_set:
            raise ValueError("the table data.prior needs prompts, or a source with prior = true")
        if self.prior.prompts and self.control is not None and self.control.kind == "files":
            raise ValueError("data.prior.prompts draws pictures that have no control pictures in files")
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
            return path if path is None or isinstance(path, RemotePath) else base / path.expanduser()

        sources = tuple(
            s.model_copy(update={n: absolute(getattr(s, n)) for n in _SOURCE_PATHS}) for s in self.sources
        )
        cache = self.cache.model_copy(update={"dir": absolute(self.cache.dir)})
        control = self.control and self.control.model_copy(update={"model": absolute(self.control.model)})
        return self.model_copy(update={"sources": sources, "cache": cache, "control": control})
