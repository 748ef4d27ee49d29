"""The table ``lora`` of the configuration."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ..data.section import AnyDtypeName, Section
from .model_section import ConfigPath

TARGETS = ("attention", "attention+mlp", "all-linear")

_LARGEST_RANK, _LARGEST_ALPHA = 8192, 1e6
Rank = Annotated[int, Field(gt=0, le=_LARGEST_RANK, strict=True)]
Alpha = Annotated[float, Field(gt=0, le=_LARGEST_ALPHA, strict=True)]


class LoraSection(Section):
    """The table ``lora`` of the configuration."""

    kind: Literal["lora", "loha", "lokr"] = Field(
        default="lora",
        description="what changes a layer: lora, a product of two small matrices; loha, two such products "
        "multiplied value by value; lokr, a Kronecker product",
    )
    rank: int = Field(default=16, gt=0, le=_LARGEST_RANK, description="rank of the matrices of each layer")
    alpha: float | None = Field(
        default=None,
        gt=0,
        le=_LARGEST_ALPHA,
        description="the strength is alpha / rank; unset: the rank, so strength 1",
    )
    rank_pattern: dict[str, Rank] = Field(
        default={}, description="other ranks, by patterns as in targets; the first that fits a layer counts"
    )
    alpha_pattern: dict[str, Alpha] = Field(default={}, description="other alphas, in the same way")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="lora: dropout on the adapters' inputs")
    rank_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="loha, lokr: share of the change's rows that a step leaves out"
    )
    factor: int = Field(
        default=-1,
        ge=-1,
        le=65536,
        description="lokr: size of the left matrix, or the largest divisors below it; -1: both alike",
    )
    decompose_both: bool = Field(default=False, description="lokr: the left matrix too has this rank")
    full_matrix: bool = Field(default=False, description="lokr: both matrices whole, without a rank")
    rslora: bool = Field(default=False, description="take alpha / sqrt(rank) as the strength instead")
    dora: bool = Field(
        default=False, description="lora: DoRA, train the norm of each output's weights separately"
    )
    targets: str | tuple[str, ...] = Field(
        default="attention", description="which linear layers get adapters"
    )
    train_bert: bool = Field(default=False, description="adapters in BERT too")
    train_t5: bool = Field(default=False, description="adapters in mT5 too")
    init_from: ConfigPath | None = Field(
        default=None, description="a file of this kind to continue from, in any format, of at most this rank"
    )
    base_precision: Annotated[Literal["fp32", "bf16", "fp16", "fp8", "int8", "nf4"] | None, AnyDtypeName] = (
        Field(default=None, description="how the frozen DiT's matrices are stored; unset: run.precision")
    )
    trigger: str = Field(
        default="", description="words in the captions that call up the LoRA, for the exported files"
    )

    @field_validator("targets")
    @classmethod
    def _known_targets(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(targets, str) and targets not in TARGETS:
            raise ValueError(f"use one of {', '.join(TARGETS)}, or a list of patterns such as ['Wqkv']")
        if not targets:
            raise ValueError("an empty list: nothing would be trained")
        for pattern in () if isinstance(targets, str) else targets:
            _check_expression(pattern)
        return targets

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _valid_patterns(cls, patterns: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        for pattern in patterns:
            _check_expression(pattern)
        return patterns

    @field_validator("factor")
    @classmethod
    def _not_zero(cls, factor: int) -> int:
        if factor == 0:
            raise ValueError("use -1, or 1 and more")
        return factor

    @model_validator(mode="after")
    def _keys_of_the_kind(self) -> LoraSection:
        for name, kinds in _ONLY.items():
            if self.kind not in kinds and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is for kind = {' or '.join(map(repr, kinds))}, not {self.kind!r}")
        return self

    @property
    def trains_text(self) -> bool:
        return self.train_bert or self.train_t5

    def strength(self, rank: int, alpha: float | None) -> float:
        """The factor on the change of a layer of this rank and alpha."""
        return (alpha or rank) / (math.sqrt(rank) if self.rslora else rank)


_ONLY = {
    "dropout": ("lora",),
    "dora": ("lora",),
    "rank_dropout": ("loha", "lokr"),
    "factor": ("lokr",),
    "decompose_both": ("lokr",),
    "full_matrix": ("lokr",),
}
"""Keys that some kinds have."""


def _check_expression(pattern: str) -> None:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
