"""What a model is (read from shapes) and what its file says about it (read from metadata)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from . import facts
from .errors import ConfigError, WeightsError, printable
from .untrusted import count_numbered, parse_json

METADATA_KEY = "hydit.config"
METADATA_FORMAT = 1

SIZE_COND_DIM = 6 * 256
"""Columns of ``extra_embedder`` that the six sizes take: six sinusoids of 256 values."""

NEGATIVE_PROMPT = (
    "错误的眼睛，糟糕的人脸，毁容，糟糕的艺术，变形，多余的肢体，模糊的颜色，模糊，重复，病态，残缺，"
)
"""Default negative prompt of Tencent/HunyuanDiT (``hydit/constants.py``)."""


@dataclass(frozen=True)
class DiTConfig:
    """Dimensions of a HunyuanDiT; the defaults are those of DiT-g/2 v1.2.

    All but ``pooler_heads`` and ``rope_base`` can be read from a state dict's shapes
    (:meth:`from_state_dict`). ``rope_base`` is the side, in tokens, of the square grid that the rotary
    positions are stretched over.

    Raises :class:`ConfigError` when the dimensions do not fit each other.
    """

    hidden_size: int = 1408
    depth: int = 40
    num_heads: int = 16
    mlp_hidden: int = 6144
    patch_size: int = 2
    in_channels: int = 4
    out_channels: int = 8
    text_dim: int = 1024
    text_len: int = 77
    t5_dim: int = 2048
    t5_len: int = 256
    t5_hidden: int = 8192
    pooled_dim: int = 1024
    pooler_heads: int = 8
    size_cond: bool = False
    style_cond: bool = False
    rope_base: int = 32

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1 and not isinstance(value, bool):
                raise ConfigError(f"{name} is {value}; expected a number from 1")
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise ConfigError(
                f"hidden_size {self.hidden_size} with {self.num_heads} heads: a head's width must be a whole "
                "multiple of 4 (two axes of rotary pairs)"
            )
        if self.depth < 2 or self.depth % 2:
            raise ConfigError(f"depth {self.depth}: must be even, so that every stored skip is used")
        if self.t5_dim % self.pooler_heads:
            raise ConfigError(f"t5_dim {self.t5_dim} is not divisible by pooler_heads {self.pooler_heads}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def num_controls(self) -> int:
        """Number of skips, hence of a ControlNet's residuals and blocks."""
        return self.depth // 2 - 1

    @property
    def extra_dim(self) -> int:
        """Input width of ``extra_embedder``: pooled text, then sizes and style where the model has them."""
        return self.pooled_dim + SIZE_COND_DIM * self.size_cond + self.hidden_size * self.style_cond

    @property
    def version(self) -> str:
        """``"v1.1"`` for the conditions of v1.0 and v1.1 (same shapes), ``"v1.2"`` without them."""
        return "v1.1" if self.size_cond or self.style_cond else "v1.2"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, accepted by :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiTConfig:
        """Inverse of :meth:`to_dict`. Raises :class:`ConfigError` on an unknown name."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ConfigError(f"unknown model dimension: {', '.join(unknown)}")
        return cls(**values)

    @classmethod
    def from_state_dict(
        cls, shapes: Mapping[str, Any], *, pooler_heads: int = 8, rope_base: int = 32
    ) -> DiTConfig:
        """Read the dimensions of a DiT or of a ControlNet from its tensors' shapes.

        ``shapes`` maps Tencent's names, without prefix, to tensors or to shapes. A ControlNet holds the first
        ``depth // 2 - 1`` blocks; the depth is that of the DiT that it controls.

        Raises :class:`WeightsError` when a needed tensor is missing or the shapes contradict each other.
        """
        hidden, in_channels, patch, _ = _shape(shapes, "x_embedder.proj.weight", 4)
        mlp_hidden, _ = _shape(shapes, "blocks.0.mlp.fc1.weight", 2)
        (head_dim,) = _shape(shapes, "blocks.0.attn1.q_norm.weight", 1)
        t5_hidden, t5_dim = _shape(shapes, "mlp_t5.0.weight", 2)
        text_rows, text_dim = _shape(shapes, "text_embedding_padding", 2)
        pooler_rows, _ = _shape(shapes, "pooler.positional_embedding", 2)
        pooled_dim, _ = _shape(shapes, "pooler.c_proj.weight", 2)
        _, extra_dim = _shape(shapes, "extra_embedder.0.weight", 2)

        style_cond = "style_embedder.weight" in shapes
        size_columns = extra_dim - pooled_dim - hidden * style_cond
        if size_columns not in (0, SIZE_COND_DIM):
            raise WeightsError(
                f"extra_embedder.0.weight has {extra_dim} columns; expected {pooled_dim} (pooled text), plus "
                f"{SIZE_COND_DIM} with size condition, plus {hidden} with a style_embedder.weight"
            )
        num_blocks = count_numbered(shapes, "blocks.")
        if "final_layer.linear.weight" in shapes:
            depth = num_blocks
            out_channels = _shape(shapes, "final_layer.linear.weight", 2)[0] // patch**2
        else:
            _shape(shapes, f"after_proj_list.{num_blocks - 1}.weight", 2)
            depth = 2 * (num_blocks + 1)
            out_channels = 2 * in_channels
        return cls(
            hidden_size=hidden,
            depth=depth,
            num_heads=hidden // head_dim,
            mlp_hidden=mlp_hidden,
            patch_size=patch,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            text_len=text_rows - (pooler_rows - 1),
            t5_dim=t5_dim,
            t5_len=pooler_rows - 1,
            t5_hidden=t5_hidden,
            pooled_dim=pooled_dim,
            pooler_heads=pooler_heads,
            size_cond=size_columns > 0,
            style_cond=style_cond,
            rope_base=rope_base,
        )


def _shape(shapes: Mapping[str, Any], key: str, ndim: int) -> tuple[int, ...]:
    if key not in shapes:
        raise WeightsError(f"not a HunyuanDiT state dict in Tencent's names: {key} is missing")
    shape = tuple(int(n) for n in getattr(shapes[key], "shape", shapes[key]))
    if len(shape) != ndim:
        raise WeightsError(f"{key} has shape {shape}; expected {ndim} dimension(s)")
    if 0 in shape:
        raise WeightsError(f"{key} has shape {shape}, which holds nothing")
    return shape


DIT_G2_V12 = DiTConfig()
DIT_G2_V11 = DiTConfig(size_cond=True, style_cond=True)
DIT_XL2_V12 = DiTConfig(hidden_size=1152, depth=28, mlp_hidden=4608)
DIT_XL2_V11 = DiTConfig(hidden_size=1152, depth=28, mlp_hidden=4608, size_cond=True, style_cond=True)


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise schedule (scaled linear betas) and what the model predicts; defaults of v1.2.

    Raises :class:`ConfigError` for what is no such schedule (:mod:`.facts`).
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.018
    prediction: Literal["v", "epsilon", "sample"] = "v"

    def __post_init__(self) -> None:
        facts.check("diffusion", vars(self))
        facts.check_betas(self.beta_start, self.beta_end, self.num_train_timesteps)


@dataclass(frozen=True)
class SamplingDefaults:
    """The settings that a model's file recommends; defaults of the published weights."""

    sampler: str = "ddpm"
    spacing: str = "leading"
    steps: int = 50
    cfg: float = 6.0
    guidance_rescale: float = 0.0
    width: int = 1024
    height: int = 1024
    negative: str = NEGATIVE_PROMPT


@dataclass(frozen=True)
class ModelInfo:
    """What a file's shapes do not tell, stored as JSON in its ``hydit.config`` metadata.

    ``version`` is "v1.0", "v1.1" or "v1.2"; ``variant`` is "", "ema", "module" or "distill"; ``bert``, ``t5``
    and ``vae`` hold what those parts' shapes do not tell (attention heads, maximum relative distance, norm
    groups, latent scale, preview colors); ``base`` names the weights that training started from;
    ``posterior`` is "sample" or "mode", the kind of the VAE's latents that the DiT was trained on, or "".

    Raises :class:`ConfigError` for values that no model can have (:mod:`.facts`): what exists can be written.
    """

    version: str
    variant: str = ""
    pooler_heads: int = 8
    rope_base: int = 32
    diffusion: DiffusionConfig = DiffusionConfig()
    defaults: SamplingDefaults = SamplingDefaults()
    bert: dict[str, Any] = field(default_factory=dict)
    t5: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    base: str = ""
    posterior: Literal["", "sample", "mode"] = ""

    def __post_init__(self) -> None:
        facts.check("", vars(self))
        for section in ("bert", "t5", "vae"):
            facts.check(section, getattr(self, section))
        facts.check("defaults", vars(self.defaults))
        most = self.diffusion.num_train_timesteps - (self.defaults.spacing != "trailing")
        if self.defaults.steps > most:
            raise ConfigError(
                f"defaults.steps is {self.defaults.steps}; the schedule has room for {most} with "
                f"{self.defaults.spacing!r} spacing"
            )

    @classmethod
    def published(cls, version: str) -> ModelInfo:
        """The values of Tencent's published weights of ``version``.

        v1.2 was trained with ``beta_end`` 0.018, earlier versions with 0.03 (Tencent's training scripts).
        """
        if version not in facts.VERSIONS:
            raise ConfigError(f"unknown HunyuanDiT version {version!r}; known are v1.0, v1.1 and v1.2")
        beta_end = 0.018 if version == "v1.2" else 0.03
        return cls(version=version, diffusion=DiffusionConfig(beta_end=beta_end))

    def to_json(self) -> str:
        """The text of the ``hydit.config`` metadata key."""
        return json.dumps({"format": METADATA_FORMAT, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], *, version: str) -> ModelInfo:
        """Read a safetensors file's metadata; ``version`` (from the shapes) is used where it says nothing.

        Values that are absent are those that were published for the version. Names that are not known, of a
        later release or misspelt, are warned of and passed over; a release that changes what a known name
        means raises the format number.

        Raises :class:`WeightsError` when the text is no JSON object, is in a newer format than ours, or has
        a value that cannot be meant.
        """
        text = metadata.get(METADATA_KEY)
        if text is None:
            return cls.published(version)
        where = f"metadata {METADATA_KEY!r}"
        values = parse_json(text, where)
        if type(values.get("format")) is not int or values["format"] < 1:
            raise WeightsError(f"{where} is not an object with a format number")
        if values["format"] > METADATA_FORMAT:
            raise WeightsError(
                f"{where} has format {values['format']}; this version of hydit reads up to "
                f"{METADATA_FORMAT}: update hydit"
            )
        if names := facts.unknown(values):
            shown = printable(", ".join(names[:8]))
            warnings.warn(f"{where}: passed over what is not known here: {shown}", stacklevel=1)
        try:
            facts.check("", values)
            return _merge(cls.published(values.get("version", version)), values)
        except ConfigError as error:
            raise WeightsError(f"{where}: {error}") from None


def _merge(start: ModelInfo, values: Mapping[str, Any]) -> ModelInfo:
    """``start`` with those of its fields that ``values`` names."""
    changes: dict[str, Any] = {name: values[name] for name in facts.RULES[""] if name in values}
    for section in facts.SECTIONS:
        inner = values.get(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{section} is {inner!r}; expected an object")
        known = getattr(start, section)
        if isinstance(known, dict):
            changes[section] = inner
        else:
            names = {f.name for f in fields(known)}
            facts.check(section, inner)
            changes[section] = replace(known, **{name: inner[name] for name in names & inner.keys()})
    return replace(start, **changes)
