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
from ..weights import hub

_MIN_TOKENS = 4
"""BERT's two marks around a text, one word between them, and one to spare."""
_MAX_DEPTH, _MAX_WIDTH = 512, 65536
"""Far beyond any real model, so that a digit too many is an error before memory is allocated for it."""


def _resolve(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, (str, Path)) or not str(value):
        return plain_path(value)
    if hub.name(value):
        return Path(value)
    base = (info.context or {}).get("base", Path.cwd())
    return (base / Path(plain_path(value)).expanduser()).resolve()


ConfigPath = Annotated[Path, BeforeValidator(_resolve)]


def _mirror(name: str, source: type, descriptions: dict[str, str]) -> type[Section]:
    """A strict pydantic section with the fields and defaults of the dataclass ``source``."""
    hints = typing.get_type_hints(source)
    fields: dict[str, Any] = {
        f.name: (hints[f.name], Field(default=f.default, description=descriptions[f.name]))
        for f in dataclasses.fields(source)
    }
    return create_model(name, __base__=Section, **fields)


DiTSection = _mirror(
    "DiTSection",
    DiTConfig,
    {
        "hidden_size": "width of the DiT",
        "depth": "number of blocks; even, because the skips make a U of them",
        "num_heads": "attention heads; each is hidden_size / num_heads wide, a multiple of 4",
        "mlp_hidden": "inner width of the blocks' MLPs",
        "patch_size": "side of a patch, in latents",
        "in_channels": "latent channels of the VAE",
        "out_channels": "twice in_channels: prediction and variance",
        "text_dim": "width of BERT's features",
        "text_len": "tokens of a text that BERT reads, its two marks included",
        "t5_dim": "width of mT5's features",
        "t5_len": "tokens of a text that mT5 reads, its end mark included",
        "t5_hidden": "inner width of the MLP that projects mT5's features",
        "pooled_dim": "width of the pooled text",
        "pooler_heads": "attention heads of the text pooler; they divide t5_dim",
        "size_cond": "condition on picture size, as in v1.0 and v1.1",
        "style_cond": "condition on a style, as in v1.0 and v1.1",
        "rope_base": "side, in tokens, of the grid over which rotary positions are stretched",
    },
)
DiffusionSection = _mirror(
    "DiffusionSection",
    DiffusionConfig,
    {
        "num_train_timesteps": "length of the noise schedule",
        "beta_start": "first beta of the scaled-linear schedule",
        "beta_end": "last beta",
        "prediction": "what the DiT predicts",
    },
)
DefaultsSection = _mirror(
    "DefaultsSection",
    SamplingDefaults,
    {
        "sampler": "sampler",
        "spacing": "spacing of the timesteps",
        "steps": "sampling steps",
        "cfg": "guidance scale; 1 is off",
        "guidance_rescale": "guidance rescale; 0 is off",
        "width": "width of a picture",
        "height": "height of a picture",
        "negative": "negative prompt",
    },
)


class TextScratch(Section):
    """Fresh text encoders: transformers' configuration fields and the tokenizer files."""

    bert: dict[str, Any] = Field(description="fields of transformers' BertConfig")
    t5: dict[str, Any] = Field(description="fields of transformers' MT5Config")
    vocab: ConfigPath = Field(description="BERT's vocab.txt")
    spiece: ConfigPath = Field(description="mT5's sentencepiece model")


def _text_kind(value: Any) -> str:
    return "table" if isinstance(value, (dict, TextScratch)) else "path"


class InfoSection(Section):
    """What the exported file says of itself; unset fields keep what ``init_from`` says."""

    version: str | None = Field(default=None, description="HunyuanDiT version whose published values hold")
    variant: str | None = Field(default=None, description="such as ema or distill")
    base: str | None = Field(default=None, description="what the training started from")
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
    init_from: ConfigPath | None = Field(
        default=None, description="weights to start from, a file or folder in any layout"
    )
    load_key: str | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="which weights of a torch file with several: ema (taken if unset), module, distill",
    )
    from_scratch: DiTSection | None = Field(  # type: ignore[valid-type]
        default=None, description="dimensions of a new DiT with random weights"
    )
    text_encoders: (
        Annotated[
            Annotated[ConfigPath, Tag("path")] | Annotated[TextScratch, Tag("table")],
            Discriminator(_text_kind),
        ]
        | None
    ) = Field(default=None, description="a path, or a table for new ones; unset: those of init_from")
    vae: ConfigPath | None = Field(default=None, description="the VAE; unset: that of init_from")
    info: InfoSection = InfoSection()

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSection:
        if (self.init_from is None) == (self.from_scratch is None):
            raise ValueError("give exactly one of init_from (weights) and from_scratch (dimensions)")
        if self.load_key is not None and self.init_from is None:
            raise ValueError("load_key chooses among the weights of init_from, which is not given")
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
