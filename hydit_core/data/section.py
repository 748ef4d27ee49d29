"""The tables of a configuration file: which kinds of values they take."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator

from ..dtypes import short_name

MAX_COUNT = 10**9
"""The largest number of steps and the like."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Section(BaseModel):
    """One table. Unknown keys, true and false for numbers, texts for numbers, NaN and inf are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        _check_kind(value, set(leaves(cls.model_fields[info.field_name].annotation)))
        return value


def _check_kind(value: Any, kinds: set[type]) -> None:
    """Refuse what pydantic would convert: TOML has kinds of its own, and another one is a mistake."""
    numbers = kinds & {int, float}
    if isinstance(value, list | tuple):
        for inner in value:
            _check_kind(inner, kinds)
    elif isinstance(value, bool):
        if numbers and bool not in kinds:
            raise ValueError("expected a number")
    elif isinstance(value, int | float):
        if bool in kinds and not numbers:
            raise ValueError("expected true or false")
        if isinstance(value, float) and numbers == {int}:
            raise ValueError("expected a whole number, without a decimal point")
    elif isinstance(value, str) and not kinds & {str, Path} and (numbers or bool in kinds):
        raise ValueError(f"expected {'a number' if numbers else 'true or false'}, not a text")


def leaves(annotation: Any) -> Iterator[type]:
    """The classes inside an annotation, such as ``Path`` in ``Path | None``."""
    arguments = typing.get_args(annotation)
    if not arguments and isinstance(annotation, type):
        yield annotation
    for argument in arguments:
        yield from leaves(argument)


def plain_path(value: Any) -> Any:
    r"""Refuse an empty path, and control characters in one: ``"D:\new\table"`` holds two."""
    if value == "":
        raise ValueError("an empty path; leave the key out, or write '.' for the folder itself")
    if isinstance(value, str | Path) and _CONTROL.search(str(value)):
        raise ValueError(
            "a path with a line break, tab or the like: in double quotes a backslash is an escape; write "
            r"Windows paths in single quotes, 'D:\new\table', or with /"
        )
    return value


PlainPath = Annotated[Path, BeforeValidator(plain_path)]

AnyDtypeName = BeforeValidator(lambda value: short_name(value) if isinstance(value, str) else value)
"""Makes ``fp16`` of ``float16`` and so on, before it is looked at."""
