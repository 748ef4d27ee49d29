"""Write docs/configuration.md and docs/zh/configuration.md from the schema of the training configuration.

    python docs/make_configuration.py

Keys, defaults, ranges and English meanings are the schema's; docs/configuration.toml adds the
Chinese meanings, the units and the few ranges that no field declares.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from hydit_core import facts
from hydit_core.train.config import TrainConfig
from hydit_core.untrusted import read_toml

DOCS = Path(__file__).resolve().parent
TABLE = DOCS / "configuration.toml"
PAGES = {"en": DOCS / "configuration.md", "zh": DOCS / "zh" / "configuration.md"}

WORDS = {
    "head": {
        "en": ("key", "meaning", "unit", "default", "values"),
        "zh": ("键", "含义", "单位", "默认值", "取值"),
    },
    "required": {"en": "required", "zh": "必填"},
    "unset": {"en": "unset", "zh": "不设"},
    "path": {"en": "path", "zh": "路径"},
    "paths": {"en": "list of paths", "zh": "路径列表"},
    "text": {"en": "text", "zh": "文本"},
    "texts": {"en": "list of texts", "zh": "文本列表"},
    "two numbers": {"en": "two numbers, each {}", "zh": "两个数，均为 {}"},
    "table": {"en": "table", "zh": "表"},
    "text of up to": {"en": "text of up to {} characters", "zh": "文本，不超过 {} 个字符"},
    "multiple": {"en": "{}, multiples of {}", "zh": "{}，须为 {} 的倍数"},
    "from to": {"en": "{} to {}", "zh": "{} 到 {}"},
    "above to": {"en": "above {}, up to {}", "zh": "大于 {}，不超过 {}"},
    "to below": {"en": "{} to below {}", "zh": "{} 到 {}（不含 {}）"},
    "above below": {"en": "above {}, below {}", "zh": "大于 {}，小于 {}"},
}


class Key(NamedTuple):
    """One key, ``data.flip`` for example, with the field that declares it."""

    name: str
    field: FieldInfo


class Table(NamedTuple):
    """One table of the file; ``repeated`` ones are written ``[[name]]``."""

    name: str
    repeated: bool
    keys: list[Key]


def tables(section: type[BaseModel] = TrainConfig, name: str = "", repeated: bool = False) -> Iterator[Table]:
    """Every table of the configuration, each before those inside it."""
    keys, inner = [], []
    for key, field in section.model_fields.items():
        dotted = f"{name}.{key}" if name else key
        kinds = list(_leaves(field.annotation))
        sections = [kind for kind in kinds if issubclass(kind, BaseModel)]
        inner += [(kind, dotted, _is_list(field.annotation)) for kind in sections]
        if not sections or len(kinds) > len(sections) + (type(None) in kinds):
            keys.append(Key(dotted, field))
    if keys:
        yield Table(name, repeated, keys)
    for kind, dotted, many in inner:
        yield from tables(kind, dotted, many)


def pages() -> dict[str, str]:
    """The text of each page, by language. Raises KeyError for a key without a meaning in that language."""
    told = read_toml(TABLE)
    return {language: _page(language, told) for language in PAGES}


def _page(language: str, told: dict[str, Any]) -> str:
    lines = [told["page"][language].strip(), ""]
    for table in tables():
        name = f"[[{table.name}]]" if table.repeated else f"[{table.name}]"
        lines += [f"## `{name}`", "", told["tables"][table.name][language], ""]
        lines += ["| " + " | ".join(WORDS["head"][language]) + " |", "|---|---|---|---|---|"]
        lines += [_row(key, language, told) for key in table.keys]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _row(key: Key, language: str, told: dict[str, Any]) -> str:
    about = told["keys"][key.name]
    meaning = key.field.description if language == "en" else about["zh"]
    if not meaning:
        raise KeyError(f"{key.name} has no description in the schema")
    values = about["values"][language] if "values" in about else _values(key, language)
    unit = about.get("unit", "")
    if unit and language != "en":
        unit = told["units"][unit]
    cells = (f"`{key.name.rsplit('.', 1)[-1]}`", meaning, unit, _default(key.field, language), values)
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _default(field: FieldInfo, language: str) -> str:
    value = field.default
    if value is PydanticUndefined:
        return WORDS["required"][language]
    return WORDS["unset"][language] if value is None else f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) and value != round(value, 6) else str(value)


def _values(key: Key, language: str) -> str:
    if rule := _rule(key.name):
        return _ruled(rule.words, language)
    choices = list(_choices(key.field.annotation))
    if choices:
        return _joined(choices, language)
    kinds, many = set(_leaves(key.field.annotation)) - {type(None)}, _is_list(key.field.annotation)
    if kinds == {bool}:
        return _joined(["true", "false"], language)
    if Path in kinds:
        return WORDS["paths" if many else "path"][language]
    if kinds == {str}:
        is_table = typing.get_origin(key.field.annotation) is dict
        return WORDS["table" if is_table else "texts" if many else "text"][language]
    if kinds in ({int}, {float}) and (text := _range(key.field, language, float in kinds)):
        return WORDS["two numbers"][language].format(text) if many else text
    raise KeyError(f"{key.name}: say in {TABLE.name} which values it takes")


def _joined(choices: list[str], language: str) -> str:
    return (", " if language == "en" else "、").join(f"`{choice}`" for choice in choices)


def _range(field: FieldInfo, language: str, real: bool) -> str:
    found = {name: value for rule in _rules(field) for name, value in rule.items()}
    low, high = found.get("ge", found.get("gt")), found.get("le", found.get("lt"))
    if low is None or high is None:
        return ""
    if not real and "gt" in found:
        low, found["ge"] = low + 1, low
    if not real and "lt" in found:
        found["le"] = high
    kind = {
        (True, True): "from to",
        (True, False): "to below",
        (False, True): "above to",
        (False, False): "above below",
    }["ge" in found, "le" in found]
    top = _number(high) + (" - 1" if not real and "lt" in found else "")
    text = WORDS[kind][language].format(_number(low), top, top)
    step = found.get("multiple_of")
    return WORDS["multiple"][language].format(text, step) if step else text


def _rules(field: FieldInfo) -> Iterator[dict[str, Any]]:
    """Bounds of the field, or of the numbers inside it."""
    found = [*field.metadata, *_annotations(field.annotation)]
    for rule in found:
        names = ("ge", "gt", "le", "lt", "multiple_of")
        yield {name: value for name in names if (value := getattr(rule, name, None)) is not None}


def _annotations(annotation: Any) -> Iterator[Any]:
    for extra in getattr(annotation, "__metadata__", ()):
        yield from getattr(extra, "metadata", [extra])
    for argument in typing.get_args(annotation):
        yield from _annotations(argument)


def _number(value: float) -> str:
    for base in (2, 10):
        power = next((n for n in range(6 if base == 10 else 20, 64) if base**n == value), None)
        if power:
            return f"{base}^{power}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _rule(name: str) -> facts.Rule | None:
    """What a model's file may say of itself: those keys are checked by :mod:`hydit_core.facts`."""
    section, _, last = name.removeprefix("model.info.").rpartition(".")
    return facts.RULES[section].get(last) if name.startswith("model.info.") else None


def _ruled(words: str, language: str) -> str:
    """The words of a rule, which are English, as a cell in ``language``."""
    if match := re.fullmatch(r"one of (.+)", words):
        return _joined(match[1].split(", "), language)
    if match := re.fullmatch(r"a text of up to ([\d,]+) characters", words):
        return WORDS["text of up to"][language].format(match[1].replace(",", ""))
    match = re.fullmatch(r"a (?:whole )?number from (\S+) to ([\d.,]+)(?: that (\d+) divides)?", words)
    if not match:
        raise KeyError(f"no words for {words!r}")
    text = WORDS["from to"][language].format(match[1], match[2].replace(",", ""))
    return WORDS["multiple"][language].format(text, match[3]) if match[3] else text


def _choices(annotation: Any) -> Iterator[str]:
    if typing.get_origin(annotation) is typing.Literal:
        yield from typing.get_args(annotation)
        return
    for argument in typing.get_args(annotation):
        yield from _choices(argument)


def _leaves(annotation: Any) -> Iterator[type]:
    arguments = typing.get_args(annotation)
    if isinstance(annotation, type) and not arguments:
        yield annotation
    if annotation is Any:
        yield object
    for argument in arguments:
        yield from _leaves(argument)


def _is_list(annotation: Any) -> bool:
    return typing.get_origin(annotation) is tuple or any(
        _is_list(argument) for argument in typing.get_args(annotation)
    )


if __name__ == "__main__":
    for language, text in pages().items():
        PAGES[language].parent.mkdir(exist_ok=True)
        PAGES[language].write_text(text, encoding="utf-8")
