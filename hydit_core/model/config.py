"""The dimensions of a HunyuanDiT, read from its tensors' shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ConfigError, WeightsError
from ..untrusted import count_numbered

SIZE_COND_DIM = 6 * 256
"""Columns of ``extra_embedder`` for the six sizes: six sinusoids of 256 values."""


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
        """Input width of ``extra_embedder``: pooled text, then sizes and style if the model has them."""
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
        hidden, in_channels, patch, _ = shape_of(shapes, "x_embedder.proj.weight", 4)
        mlp_hidden, _ = shape_of(shapes, "blocks.0.mlp.fc1.weight", 2)
        (head_dim,) = shape_of(shapes, "blocks.0.attn1.q_norm.weight", 1)
        t5_hidden, t5_dim = shape_of(shapes, "mlp_t5.0.weight", 2)
        text_rows, text_dim = shape_of(shapes, "text_embedding_padding", 2)
        pooler_rows, _ = shape_of(shapes, "pooler.positional_embedding", 2)
        pooled_dim, _ = shape_of(shapes, "pooler.c_proj.weight", 2)
        _, extra_dim = shape_of(shapes, "extra_embedder.0.weight", 2)

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
            out_channels = shape_of(shapes, "final_layer.linear.weight", 2)[0] // patch**2
        else:
            shape_of(shapes, f"after_proj_list.{num_blocks - 1}.weight", 2)
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


def shape_of(shapes: Mapping[str, Any], key: str, ndim: int, what: str = "a HunyuanDiT") -> tuple[int, ...]:
    """A tensor's shape, which must have ``ndim`` dimensions, none of them empty.

    Raises :class:`WeightsError`; ``what`` is the network that the names are Tencent's of.
    """
    if key not in shapes:
        raise WeightsError(f"not {what} in Tencent's names: {key} is missing")
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
