"""A configuration as TOML, with the reason for each choice beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from ...errors import ConfigError, printable
from .choices import Choice

_WIDTH = 44
"""Where comments begin, unless a line is longer."""


def document(head: Sequence[str], choices: Iterable[Choice]) -> str:
    """The text; ``head`` are comments before everything else."""
    tables: dict[str, list[Choice]] = {}
    for choice in choices:
        tables.setdefault(choice.table, []).append(choice)
    lines = [f"# {printable(line)}".rstrip() for line in head]
    for table, chosen in tables.items():
        lines += ["", f"[{table}]", *map(_line, chosen)]
    return "\n".join(lines) + "\n"


def _line(choice: Choice) -> str:
    text = f"{choice.key} = {_value(choice.value, choice.key)}"
    return f"{text:<{_WIDTH}} # {printable(choice.reason)}" if choice.reason else text


def _value(value: Any, key: str) -> str:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(f"{printable(value)}: a name that is not UTF-8; rename it") from None
        # TOML's basic strings are JSON's, but for this one character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(_value(item, key) for item in value)}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{name} = {_value(item, key)}' for name, item in value.items())} }}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
