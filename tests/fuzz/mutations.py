"""Ways of damaging a file: blind ones on its bytes, and ones that know JSON, safetensors, zip and text.

A mutation is plain data, so that hypothesis can draw, shrink and print it; ``apply`` is a pure function.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

# What stands for a value in somebody's file: wrong types, borders of integers, endless and deep things.
ODD: tuple[str, ...] = (
    "null", "true", "false", "0", "-1", "1", "2", "3", "7", "64", "-5", "1e9", "1e308", "1e999", "-1e999",
    "NaN", "Infinity", "0.5", "4294967296", "9223372036854775807", "18446744073709551616", "9" * 5000,
    '""', '"x"', '"0"', '"../../etc/passwd"', '"/dev/zero"', '"a\\u0000b"', '"\\u001b[31m\\u001b]0;t\\u0007"',
    '"\\ud800"', '"' + "a" * 70000 + '"', "[]", "{}", "[[]]", "[0]", "[-1]", "[0,0]", "[1000000000,0]",
    "[1000000000,1000000000]", "[1,2,3,4,5,6,7,8,9]", '["x"]', '{"x":1}', '{"":{}}', "[" * 3000 + "]" * 3000,
    '{"a":' * 1500 + "1" + "}" * 1500, '"F8_E4M3"', '"I64"', '"F64"', '"BF16"', '"v"', '"banana"', '"(a+)+$"',
)  # fmt: skip
WORDS = (b"\x00", b"\xff", b"\x1b]0;x\x07", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"\xff" * 8,
         b"[" * 4000, b"\r\n", b"\xef\xbb\xbf", b"../", b"1e999", b"-1", b"nan",
         b"99999999999999999999")  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """``kind`` names a function below; the numbers are read modulo whatever they choose from."""

    kind: str
    place: int
    value: int


def apply(content: bytes, mutations: list[Mutation]) -> bytes:
    for mutation in mutations:
        content = KINDS[mutation.kind](content, mutation.place, mutation.value)
    return content


# -- blind ---------------------------------------------------------------------------------------------


def _flip(content: bytes, place: int, value: int) -> bytes:
    if not content:
        return content
    at = place % len(content)
    return content[:at] + bytes([content[at] ^ (1 << value % 8)]) + content[at + 1 :]


def _head(content: bytes, place: int, value: int) -> bytes:
    """As _flip, but where formats keep what matters: at the front."""
    return _flip(content[:256], place, value) + content[256:]


def _cut(content: bytes, place: int, value: int) -> bytes:
    return content[: place % (len(content) + 1)]


def _remove(content: bytes, place: int, value: int) -> bytes:
    at = place % (len(content) + 1)
    return content[:at] + content[at + 1 + value % 64 :]


def _insert(content: bytes, place: int, value: int) -> bytes:
    at = place % (len(content) + 1)
    return content[:at] + WORDS[value % len(WORDS)] + content[at:]


def _write(content: bytes, place: int, value: int) -> bytes:
    at, word = place % (len(content) + 1), WORDS[value % len(WORDS)]
    return content[:at] + word + content[at + len(word) :]


def _repeat(content: bytes, place: int, value: int) -> bytes:
    at = place % (len(content) + 1)
    return content[:at] + content[at : at + 1 + value % 256] * 3 + content[at:]


# -- JSON ----------------------------------------------------------------------------------------------


def _nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every value inside ``value``, its own (empty) first."""
    found = [path]
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        found += _nodes(child, (*path, key))
    return found


class _Raw(str):
    """JSON text that is written as it stands: what json.dumps would never write."""


def _dump(value: Any) -> str:
    raws: list[str] = []

    def mark(item: Any) -> Any:
        if isinstance(item, _Raw):
            raws.append(item)
            return f"@raw{len(raws) - 1}@"
        if isinstance(item, dict):
            return {key: mark(child) for key, child in item.items()}
        return [mark(child) for child in item] if isinstance(item, list) else item

    text = json.dumps(mark(value), ensure_ascii=False)
    return re.sub(r'"@raw(\d+)@"', lambda match: raws[int(match[1])], text)


def _change(tree: Any, place: int, value: int) -> Any:
    """One node replaced, removed, renamed, moved or doubled."""
    paths = _nodes(tree)
    path = paths[place % len(paths)]
    if not path:
        return _Raw(ODD[value % len(ODD)])
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    last, action = path[-1], value % (len(ODD) + 6)
    if action < len(ODD):
        parent[last] = _Raw(ODD[action])
    elif action == len(ODD):
        del parent[last]
    elif isinstance(parent, dict):
        names = (
            "",
            "x" * 300,
            "\x1b[2J",
            "blocks.999999999.attn1.Wqkv.weight",
            str(last) + ".0",
            str(last)[:-1],
        )
        parent[names[place % len(names)]] = parent.pop(last)
    else:
        parent.append(parent[last])
    return tree


def _json(content: bytes, place: int, value: int) -> bytes:
    try:
        return _dump(_change(json.loads(content), place, value)).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):  # damaged already
        return _insert(content, place, value)


def _json_line(content: bytes, place: int, value: int) -> bytes:
    lines = content.splitlines()
    if not lines:
        return content
    at = place % len(lines)
    lines[at] = _json(lines[at], place // max(len(lines), 1), value)
    return b"\n".join(lines) + b"\n"


# -- safetensors ---------------------------------------------------------------------------------------


def _header(content: bytes, place: int, value: int) -> bytes:
    """One value of the header changed: dtypes, shapes, offsets, names, metadata and JSON inside metadata."""
    try:
        (length,) = struct.unpack("<Q", content[:8])
        tree, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
        metadata = tree["__metadata__"] if isinstance(tree, dict) and "__metadata__" in tree else {}
        inner = [key for key, text in metadata.items() if str(text).startswith("{")]
        if inner and place % 3 == 0:
            key = inner[place % len(inner)]
            metadata[key] = _json(metadata[key].encode(), place // 3, value).decode("utf-8", "replace")
        else:
            tree = _change(tree, place, value)
        header = _dump(tree).encode("utf-8", "surrogatepass")
    except (ValueError, AttributeError, RecursionError, struct.error):  # damaged already
        return _insert(content, place, value)
    return struct.pack("<Q", len(header)) + header + rest


# -- zip (torch files) ---------------------------------------------------------------------------------


def _zip(content: bytes, place: int, value: int) -> bytes:
    """One byte of one member changed, with a checksum that is right again."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(info, archive.read(info)) for info in archive.infolist()]
    except Exception:  # damaged already, which zipfile and zlib tell in a dozen ways
        return _flip(content, place, value)
    if not members:
        return _flip(content, place, value)
    pickles = [i for i, (info, _) in enumerate(members) if info.filename.endswith(".pkl")]
    at = pickles[0] if pickles and value % 4 else place % len(members)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for index, (info, data) in enumerate(members):
            if index == at:
                tools: tuple[Callable[[bytes, int, int], bytes], ...] = (
                    _flip,
                    _write,
                    _remove,
                    _insert,
                    _cut,
                )
                data = tools[value // 4 % len(tools)](data, place, value // 20)
            archive.writestr(info.filename, data)
    return out.getvalue()


# -- text ----------------------------------------------------------------------------------------------


def _text(content: bytes, place: int, value: int) -> bytes:
    """One number, word or string of a text (TOML, CSV, weights, captions) replaced by something odd."""
    spans = [m.span() for m in re.finditer(rb'"[^"\n]*"|-?\d[\d.]*|\w+|[^\s\w]', content)]
    if not spans:
        return _insert(content, place, value)
    start, end = spans[place % len(spans)]
    return content[:start] + ODD[value % len(ODD)].encode("utf-8", "surrogatepass") + content[end:]


KINDS: dict[str, Callable[[bytes, int, int], bytes]] = {
    "flip": _flip, "head": _head, "cut": _cut, "remove": _remove, "insert": _insert, "write": _write,
    "repeat": _repeat, "json": _json, "json_line": _json_line, "header": _header, "zip": _zip, "text": _text,
}  # fmt: skip
BLIND = ("flip", "head", "cut", "remove", "insert", "write", "repeat")


def mutations(knowing: tuple[str, ...]) -> st.SearchStrategy[list[Mutation]]:
    """One to four mutations; those that know the format three times as often as blind ones."""
    kinds = st.sampled_from((*knowing * 9, *BLIND) if knowing else BLIND)
    number = st.integers(0, 2**32 - 1)
    return st.lists(st.builds(Mutation, kinds, number, number), min_size=1, max_size=4)
