"""Read a prompt: which things, how many, how large and where, as far as ``things.py`` has words for it."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from things import (
    NUMBERS,
    SIDES,
    TINTED,
    Thing,
    chinese_nouns,
    english_nouns,
    plural_of,
    read_things,
)

# A sentence about two things: what stands before, between and after them, and how they are arranged: "beside"
# in any order, "row" and "column" with the first one on the left, or on top; "turned" with the second one.
_ENGLISH_PAIRS = (
    ("", " and ", "", "beside"),
    ("", " next to ", "", "beside"),
    ("", " on the left and ", " on the right", "row"),
    ("", " above ", "", "column"),
    ("", " on top of ", "", "column"),
    ("", " below ", "", "column turned"),
)
_CHINESE_PAIRS = (
    ("", "和", "", "beside"),
    ("", "在", "旁边", "beside"),
    ("", "在", "上面", "column"),
    ("", "在", "下面", "column turned"),
    *(
        (first + verb, f",{second}{verb}", "", order)
        for first, second, order in (("左边", "右边", "row"), ("上面", "下面", "column"))
        for verb in ("是", "有", "")
    ),
)
_FRAMES = ("a picture of (.+)", "(.+) emoji", "一张(.+)的图片", "(.+)图标", "画(.+)")
# Shapes that have an icon of their own: without a color, their names mean that one.
_WITH_ICON = ("star", "moon")


@dataclass(frozen=True)
class Part:
    """A number of one thing; ``things``: all that its noun may mean."""

    things: tuple[Thing, ...]
    count: int = 1
    size: str = ""


@dataclass(frozen=True)
class Asked:
    """One reading of a prompt: a part somewhere (``place``: a side, or empty), or two parts in an order."""

    parts: tuple[Part, ...]
    place: str = ""


def readings(prompt: str) -> list[Asked]:
    """Everything that a prompt may mean; empty if it is not in the vocabulary."""
    text = re.sub(r"\s+", " ", prompt).strip(" .。!！").lower().replace("，", ",")
    text = text.replace(", ", ",")
    found: dict[Asked, None] = {}
    for said in (text, *_unframed(text)):
        found |= dict.fromkeys(itertools.chain(_single(said), _pair(said)))
    return list(found)


def _unframed(text: str) -> Iterator[str]:
    for frame in _FRAMES:
        if match := re.fullmatch(frame, text):
            yield match[1]


def _single(text: str) -> Iterator[Asked]:
    """Some of one thing, somewhere or at a side."""
    for part in _parts(text):
        yield Asked((part,))
    for side, (english, chinese) in SIDES.items():
        rests = [text.removesuffix(f" {words}") for words in english if text.endswith(f" {words}")]
        for words in chinese:
            rests += [
                text.removeprefix(words + link) for link in ("的", "有") if text.startswith(words + link)
            ]
            rests += [text.removesuffix(f"在{words}")] if text.endswith(f"在{words}") else []
        for part in itertools.chain.from_iterable(map(_parts, rests)):
            yield Asked((part,), side)


def _pair(text: str) -> Iterator[Asked]:
    for before, between, after, order in (*_ENGLISH_PAIRS, *_CHINESE_PAIRS):
        if not (text.startswith(before) and text.endswith(after)):
            continue
        inner = text[len(before) : len(text) - len(after)]
        for match in re.finditer(f"(?={re.escape(between)})", inner):
            sides = inner[: match.start()], inner[match.start() + len(between) :]
            # a size means little in half of a picture, and "two dogs and a cat" was never taught
            plain = [[p for p in _parts(said) if p.count == 1 and not p.size] for said in sides]
            for first, second in itertools.product(*plain):
                parts = (second, first) if "turned" in order else (first, second)
                yield Asked(parts, order.removesuffix(" turned"))


def _parts(text: str) -> Iterator[Part]:
    """A noun phrase: with an article, or with a number and, in Chinese, a measure word."""
    words = vocabulary()
    yield from words.nouns(text, 1)
    if match := re.fullmatch(r"(?:an?|the) (.+)", text):
        yield from words.nouns(match[1], 1)
    for count, (english, chinese) in NUMBERS.items():
        for number in (english, str(count)):
            if text.startswith(f"{number} "):
                yield from words.nouns(text[len(number) + 1 :], count)
        for number in (chinese, str(count), *("二" * (count == 2))):
            if text.startswith(number):
                rest = text.removeprefix(number)
                for measure in words.measures:
                    if rest.startswith(measure):
                        yield from words.nouns(rest.removeprefix(measure), count, chinese=True)


class Vocabulary:
    """Every noun, with the things that it may mean."""

    def __init__(self, things: Iterable[Thing]) -> None:
        self.things = tuple(things)
        self.measures = sorted({thing.measure for thing in self.things})
        self._one: dict[str, dict[str, list[Thing]]] = {}
        self._many: dict[str, dict[str, list[Thing]]] = {}
        icons = {thing.id: thing for thing in self.things}
        for thing in self.things:
            self._add(thing, thing)
            if thing.shape and thing.name not in _WITH_ICON:
                self._add(thing, _renamed(thing, thing.english, thing.chinese, ""))
        for code, (own, english, chinese, _) in TINTED.items():
            names = tuple(english.split("|")), tuple(chinese.split("|"))
            for color in {own, ""}:
                self._add(icons[code], _renamed(icons[code], *names, color))

    def _add(self, meant: Thing, named: Thing) -> None:
        for size in ("", "small", "big"):
            for noun in (*english_nouns(named, size), *chinese_nouns(named, size)):
                _insert(self._one, noun, size, meant)
        if named.plural:
            color = f"{named.color} " if named.color else ""
            plurals = {named.plural} if named is meant else set()
            for name in (*plurals, *map(plural_of, named.english)):
                _insert(self._many, color + name, "", meant)

    def nouns(self, text: str, count: int, chinese: bool = False) -> Iterator[Part]:
        """What ``text`` may mean as the noun of ``count`` things."""
        known = self._one if count == 1 or chinese else self._many
        for size, things in known.get(text, {}).items():
            yield Part(tuple(things), count, size)


def _renamed(thing: Thing, english: tuple[str, ...], chinese: tuple[str, ...], color: str) -> Thing:
    return Thing(
        thing.id, thing.code, color, english[0], english, chinese, thing.measure, thing.plural, thing.shape
    )


def _insert(table: dict[str, dict[str, list[Thing]]], noun: str, size: str, thing: Thing) -> None:
    things = table.setdefault(noun.lower(), {}).setdefault(size, [])
    if thing not in things:
        things.append(thing)


@functools.cache
def vocabulary() -> Vocabulary:
    return Vocabulary(read_things())
