"""Reading text from untrusted files within limits: everything in JSON or TOML goes through here.

Python's own readers accept whatever a file contains: nesting that ends in a RecursionError, or in a crash of
a thread with a small stack; numbers of a million digits; infinities that no schema expects; duplicate keys
that mean one thing to us and another to whoever checked the file. Here each of these is one error of the
caller's class that names the file.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import ConfigError, HyditError, WeightsError

MAX_DEPTH = 100
"""Brackets within brackets."""
MAX_VALUES = 1_000_000
"""Values in one text, counted by its commas and brackets: they cost up to a hundred bytes each."""
MAX_BYTES = 64 << 20
MAX_TOML_BYTES = 256 << 10
_MAX_DIGITS = 1000
_MAX_WHOLE_DIGITS = 40
# TOML's reader needs time that grows with the square of this number.
_MAX_DOTS = 100

_STRING = re.compile(r'"[^"\\]*(?:\\(?:.|\Z)[^"\\]*)*(?:"|\Z)', re.DOTALL)
_NO_BRACKET = re.compile(r"[^\[\]{}]+")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_STEP = {"[": 1, "{": 1, "]": -1, "}": -1}
# The start of a Windows path in double quotes, "C:\ or "\\, whose backslash is not written twice.
_BACKSLASH = re.compile(r'"(?:[A-Za-z]:\\(?!\\)|\\\\(?!\\)|[^"\n]*\\[^btnfre"\\uUx])')
_ESCAPES = (
    "; in double quotes a backslash starts an escape: write Windows paths in single quotes, "
    r"'C:\Users\me', or with /"
)
_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


class _Refused(ValueError):
    """Valid JSON that is refused whatever its purpose."""


def read_json(
    path: str | os.PathLike[str],
    *,
    kind: type | tuple[type, ...] = dict,
    error: type[HyditError] = WeightsError,
    max_bytes: int = MAX_BYTES,
    max_values: int = MAX_VALUES,
) -> Any:
    """The content of a JSON file in UTF-8; like :func:`parse_json`, whose errors name the file."""
    text = read_text(path, error=error, max_bytes=max_bytes)
    return parse_json(text, str(path), kind=kind, error=error, max_values=max_values)


def parse_json(
    text: str | bytes,
    what: str,
    *,
    kind: type | tuple[type, ...] = dict,
    error: type[HyditError] = WeightsError,
    max_values: int = MAX_VALUES,
) -> Any:
    """The value of a JSON text.

    Args:
        what: names the text in errors: "FILE", or "FILE: metadata 'x'".
        kind: the type of the value, usually a dictionary; ``object`` for any.
        error: the class of the error.
        max_values: about how many values it may hold.

    Raises:
        error: it is not valid JSON, not of type ``kind``, or breaks a limit: depth, digits, values that are
            not finite, duplicate keys, halves of surrogate pairs.
    """
    text = decode(text, what, error) if isinstance(text, bytes) else text.removeprefix("\ufeff")
    if (depth := _depth(text)) > MAX_DEPTH:
        raise error(f"{what}: nested {depth:,} deep; up to {MAX_DEPTH} levels are read")
    if (values := _values(text)) > max_values:
        raise error(f"{what}: about {values:,} values; up to {max_values:,} are read")
    try:
        value = _DECODER.decode(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise error(f"{what}: half of a surrogate pair, which is no character") from None
    except _Refused as problem:
        raise error(f"{what}: {problem}") from None
    except ValueError as problem:
        raise error(f"{what} is not valid JSON: {problem}") from None
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(dict.fromkeys(_KINDS[each] for each in kinds))
        raise error(f"{what} holds {_KINDS[type(value)]}; expected {wanted}")
    return value


def read_toml(path: str | os.PathLike[str], *, error: type[HyditError] = ConfigError) -> dict[str, Any]:
    """The content of a TOML file in UTF-8; like :func:`parse_toml`, whose errors name the file."""
    return parse_toml(read_text(path, error=error, max_bytes=MAX_TOML_BYTES), str(path), error=error)


def parse_toml(text: str, what: str, *, error: type[HyditError] = ConfigError) -> dict[str, Any]:
    """The table that a TOML text holds.

    Raises:
        error: it is not valid TOML, or breaks a limit: depth, digits, numbers that are not finite or beyond
            64 bits.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:  # pragma: no cover
        import tomli as tomllib

    if any(part.count(".") > _MAX_DOTS for part in re.split(r"[\n=,{}\[\]#]", text)):
        raise error(f"{what}: a key of more than {_MAX_DOTS} parts")
    try:
        values = tomllib.loads(text.removeprefix("\ufeff"))
        _check(values)
    except RecursionError:
        raise error(f"{what}: nested too deep; up to {MAX_DEPTH} levels are read") from None
    except _Refused as problem:
        raise error(f"{what}: {problem}") from None
    except ValueError as problem:
        if "set_int_max_str_digits" in str(problem):
            raise error(f"{what}: a number of more than {sys.get_int_max_str_digits():,} digits") from None
        hint = _ESCAPES if _BACKSLASH.search(text) else ""
        raise error(f"{what}: not valid TOML: {problem}{hint}") from None
    return values


def read_text(path: str | os.PathLike[str], *, error: type[HyditError], max_bytes: int = MAX_BYTES) -> str:
    """The content of a text file in UTF-8, with or without a byte order mark.

    Raises:
        error: it cannot be read, is larger than ``max_bytes``, or is not UTF-8.
    """
    return decode(read_bytes(path, error=error, max_bytes=max_bytes), str(path), error)


def read_bytes(
    path: str | os.PathLike[str], *, error: type[HyditError] = WeightsError, max_bytes: int = MAX_BYTES
) -> bytes:
    """The content of a file.

    Raises:
        error: it cannot be read, or is larger than ``max_bytes``.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(max_bytes + 1)
    except (OSError, ValueError) as problem:  # ValueError: a NUL character in the name
        raise error(f"cannot read {path}: {getattr(problem, 'strerror', None) or problem}") from problem
    if len(content) > max_bytes:
        raise error(f"{path} is larger than {max_bytes:,} bytes: too large for what it should be")
    return content


def decode(content: bytes, what: str, error: type[HyditError]) -> str:
    """Decode UTF-8, with or without a byte order mark.

    Raises:
        error: it is not UTF-8; the message says what else it may be.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        found = f"{problem.reason} at byte {problem.start}"
    guess = ""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        guess = "; it is UTF-16"
    else:
        try:
            content[:4096].decode("gb18030", errors="strict" if len(content) <= 4096 else "ignore")
            guess = "; it may be GB18030 or another older encoding"
        except UnicodeDecodeError:
            pass
    raise error(f"{what} is not UTF-8 ({found}{guess}): save it as UTF-8")


def is_plain_name(name: object) -> bool:
    """Whether a name that a file contains can only be that of a file in the same folder, on every system."""
    return (
        isinstance(name, str)
        and 0 < len(name.encode(errors="replace")) <= 255
        and name not in (".", "..")
        and not re.search(r"[\x00-\x1f/\\:]", name)
    )


def count_numbered(names: Iterable[str], before: str) -> int:
    """How many different numbers, from 0 without a gap, follow ``before`` in these names.

    Networks are sized by such counts, never by a number in a name.

    Raises:
        WeightsError: a number is missing, or not written in the usual way.
    """
    start = len(before)
    found = {name[start:].partition(".")[0] for name in names if name.startswith(before)}
    found = {number for number in found if number.isdecimal()}
    wanted = {str(i) for i in range(len(found))}
    if missing := wanted - found:
        other = min(found - wanted, key=lambda number: (len(number), number))
        raise WeightsError(
            f"{before}{min(missing, key=int)} is missing, but there is {before}{_shown(other)}: expected "
            "numbers from 0 without a gap"
        )
    return len(found)


def _depth(text: str) -> int:
    """How deep brackets are nested, strings aside; if it is small enough, an upper bound."""
    if (most := text.count("[") + text.count("{")) <= MAX_DEPTH:
        return most
    brackets = _NO_BRACKET.sub("", _STRING.sub("", text))
    return max(itertools.accumulate(map(_STEP.__getitem__, brackets)), default=0)


def _values(text: str) -> int:
    return 1 + text.count(",") + text.count("[") + text.count("{")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"the key {_shown(twice)!r} occurs twice in one object")
    return values


def _integer(digits: str) -> int:
    # transformers writes 10**30 for "no limit".
    if len(digits) > _MAX_WHOLE_DIGITS:
        raise _Refused(f"the number {_shown(digits)} has {len(digits):,} digits")
    return int(digits)


def _float(digits: str) -> float:
    if len(digits) > _MAX_DIGITS or not math.isfinite(float(digits)):
        raise _Refused(f"the number {_shown(digits)} is too large")
    return float(digits)


def _constant(name: str) -> float:
    raise _Refused(f"{name} is not a number in JSON")


def _shown(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant
)


def _check(value: Any, depth: int = 0) -> None:
    """Raise for numbers that JSON cannot have, and for nesting that is too deep."""
    if depth > MAX_DEPTH:
        raise _Refused(f"nested too deep; up to {MAX_DEPTH} levels are read")
    if isinstance(value, float) and not math.isfinite(value):
        raise _Refused(f"{value} is not a number that a setting can have")
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise _Refused("a number does not fit into 64 bits")
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _check(inner, depth + 1)
