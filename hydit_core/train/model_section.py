"""The table ``model``: what is trained, and what the exported file says of it."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from .. import facts
from ..data.section import Section, plain_path
from ..errors import ConfigError
from ..facts import DiffusionConfig, ModelInfo, SamplingDefaults
from ..model.config import DiTConfig

_MIN_TOKENS = 4
"""A word between the two marks that BERT puts around a text, and one to spare."""
_MAX_DEPTH, _MAX_WIDTH = 512, 65536
"""Far beyond what is trained: a digit too many is told before memory for it is asked for."""


def _resolve(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, (str, Path)) or not str(value):
        return plain_path(value)
    base = (info.context or {}).get("base", Path.cwd())
    return (base / Path(plain_path(value)).expanduser()).resolve()


ConfigPath = Annotated[Path, BeforeValidator(_resolve)]


def _mirror(name: str, source: type) -> type[Section]:
    """A strict pydantic section with the fields and defaults of the dataclass ``source``."""
    hints = typing.get_type_hints(source)
    fields: dict[str, Any] = {f.name: (hints[f.name], f.default) for f in dataclasses.fields(source)}
    return create_model(name, __base__=Section, **fields)


DiTSection = _mirror("DiTSection", DiTConfig)
DiffusionSection = _mirror("DiffusionSection", DiffusionConfig)
DefaultsSection = _mirror("DefaultsSection", SamplingDefaults)


class TextScratch(Section):
    """Fresh text encoders: transformers' configuration fields and the tokenizer files."""

    bert: dict[str, Any]
    t5: dict[str, Any]
    vocab: ConfigPath
    spiece: ConfigPath


def _text_kind(value: Any) -> str:
    return "table" if isinstance(value, (dict, TextScratch)) else "path"


class InfoSection(Section):
    """What the exported file says of itself; unset fields keep what ``init_from`` says."""

    version: str | None = None
    variant: str | None = None
    base: str | None = None
    diffusion: DiffusionSection | None = None  # type: ignore[valid-type]
    defaults: DefaultsSection | None = None  # type: ignore[valid-type]

    def applied_to(self, info: ModelInfo) -> ModelInfo:
        """``info`` with what is set here. Raises :class:`ConfigError` for what no model can be."""
        changes: dict[str, object] = {
            name: value
            for name in ("version", "variant", "base")
            if (value := getattr(self, name)) is not None
        }
        for name in ("diffusion", "defaults"):
            table = getattr(self, name)
            if table is not None:
                changed = table.model_dump(exclude_unset=True)
                changes[name] = dataclasses.replace(getattr(info, name), **changed)
        return dataclasses.replace(info, **changes)  # type: ignore[arg-type]


class ModelSection(Section):
    init_from: ConfigPath | None = Field(default=None, description="weights to start from, in any layout")
    from_scratch: DiTSection | None = Field(default=None, description="dimensions of a fresh DiT")  # type: ignore[valid-type]
    text_encoders: (
        Annotated[
            Annotated[ConfigPath, Tag("path")] | Annotated[TextScratch, Tag("table")],
            Discriminator(_text_kind),
        ]
        | None
    ) = Field(default=None, description="path, or a table for fresh ones; default: those inside init_from")
    vae: ConfigPath | None = Field(default=None, description="default: the one inside init_from")
    info: InfoSection = InfoSection()

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSection:
        if (self.init_from is None) == (self.from_scratch is None):
            raise ValueError("give exactly one of init_from (weights) and from_scratch (dimensions)")
        if self.from_scratch is not None and (self.text_encoders is None or self.vae is None):
            raise ValueError("from_scratch needs text_encoders (a path, or a table for fresh ones) and vae")
        return self

    @field_validator("from_scratch")
    @classmethod
    def _possible_dimensions(cls, section: Any) -> Any:
        if section is None:
            return None
        for name, value in section.model_dump().items():
            least = _MIN_TOKENS if name in ("text_len", "t5_len") else 1
            most = _MAX_DEPTH if name == "depth" else _MAX_WIDTH
            if not isinstance(value, bool) and not least <= value <= most:
                raise ValueError(f"{name} = {value}: use {least} to {most}")
        try:
            DiTConfig.from_dict(section.model_dump())
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return section

    @field_validator("info")
    @classmethod
    def _possible_info(cls, section: InfoSection) -> InfoSection:
        """Each value by itself: whether they go together is known when the base is opened."""
        values = section.model_dump(exclude_unset=True)
        tables = {name: values.pop(name) or {} for name in ("diffusion", "defaults") if name in values}
        try:
            facts.check("", {name: value for name, value in values.items() if value is not None})
            for name, table in tables.items():
                facts.check(name, table)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return section
