"""Judge what a model draws: whether the thing, its color, size, number, place and pairs are as asked for.

    python judge.py --out work/judge [--model FILE] [--lora FILE] [--share 0.1] [--seeds 1 2 3]
    python judge.py --write-signatures work/icons.zip

A thing is right if its picture is closest to that thing among the whole vocabulary (``looks.py`` compares).
Numbers are counted as connected components, places are the middle of what is not white, pairs are the things
in both halves. The first command asks for everything in ``things.csv``, or a share of it, writes
``report.json`` and contact sheets, and draws ``ordinary_prompts.txt`` for a reader to name.

``right(picture, prompt)`` judges one picture by any prompt of the vocabulary:
``hydit compare --judge judge.py:right`` counts with it.
"""

from __future__ import annotations

import argparse
import functools
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

from asked import Asked, Part, readings, vocabulary
from looks import References, components, extent, hue_is, middle, sheet, write_references
from PIL import Image
from scenes import Icons, draw, standard
from things import (
    HELD_OUT_COUNTS,
    HELD_OUT_PAIRS,
    SIDES,
    Thing,
    chinese_counted,
    chinese_nouns,
    english_nouns,
    english_plurals,
    read_things,
    with_article,
)

import hydit_core

ORDINARY = Path(__file__).resolve().parent / "ordinary_prompts.txt"
# Left, top, right, bottom: where one of several things may be, for things that are not one connected part.
_HALVES = ((0, 0, 0.5, 1), (0.5, 0, 1, 1))
_STACKED = ((0, 0, 1, 0.5), (0, 0.5, 1, 1))
_LAYOUTS = {
    2: (_HALVES,),
    3: (
        ((0, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1)),
        ((0, 0, 1 / 3, 1), (1 / 3, 0, 2 / 3, 1), (2 / 3, 0, 1, 1)),
    ),
}


@functools.cache
def references() -> References:
    return References(vocabulary().things)


def right(picture: Image.Image, prompt: str) -> bool | None:
    """Whether a picture shows what was asked for, in every respect.

    None, with a warning, for a prompt that ``things.csv`` and ``things.py`` have no words for.
    """
    found = examine(picture, prompt)
    if not found:
        warnings.warn(f"judge.py cannot tell: not in its vocabulary: {prompt}", stacklevel=2)
        return None
    return all(found.values())


def examine(picture: Image.Image, prompt: str) -> dict[str, bool]:
    """Which of "thing", "color", "size", "number" and "place" are as asked for; only those that were.

    By the most favorable of a prompt's readings; empty if it has none.
    """
    verdicts = [_verdict(picture, asked) for asked in readings(prompt)]
    return max(verdicts, key=lambda v: sum(v.values()) / len(v), default={})


def _verdict(picture: Image.Image, asked: Asked) -> dict[str, bool]:
    first = asked.parts[0]
    if len(asked.parts) == 2:
        return {"thing": _shows_pair(picture, asked)}
    found = {"thing": _shows(picture, first)} if first.count == 1 else _count(picture, first)
    if len(first.things) == 1 and first.things[0].id in references().tinted:
        found["color"] = hue_is(picture, first.things[0].color)
    if first.size:
        usual = max(references().extents[thing.id] for thing in first.things)
        scale = extent(picture) / usual
        found["size"] = scale < 0.65 if first.size == "small" else scale > 0.9
    if asked.place:
        x, y = middle(picture)
        sides = {"left": x < 0.42, "right": x > 0.58, "top": y < 0.42, "bottom": y > 0.58}
        found["place"] = bool(sides[asked.place])
    return found


def _shows(picture: Image.Image, part: Part) -> bool:
    return any(references().is_nearest(picture, thing) for thing in part.things)


def _shows_pair(picture: Image.Image, asked: Asked) -> bool:
    boxes = _STACKED if asked.place == "column" else _HALVES
    one, other = (_cut(picture, box) for box in boxes)
    first, second = asked.parts
    as_said = _shows(one, first) and _shows(other, second)
    return as_said or (asked.place == "beside" and _shows(one, second) and _shows(other, first))


def _count(picture: Image.Image, part: Part) -> dict[str, bool]:
    """The number by components, or by the usual arrangements where a thing has several."""
    if all(thing.id in references().whole for thing in part.things):
        boxes = components(picture)
        shown = [_shows(picture.crop(box), part) for box in boxes]
        return {"thing": bool(shown) and all(shown), "number": len(boxes) == part.count}
    arranged = any(all(_shows(_cut(picture, box), part) for box in layout) for layout in _LAYOUTS[part.count])
    return {"thing": arranged, "number": arranged}


def _cut(picture: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    width, height = picture.size
    left, top, far, low = box
    return picture.crop((round(left * width), round(top * height), round(far * width), round(low * height)))


# -- questions ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A prompt in both languages, and the respect in which its group is judged."""

    group: str
    english: str
    chinese: str
    respect: str = "thing"


def spread(items: list[Thing], count: int) -> list[Thing]:
    """Every n-th item, so that the easy ones are not picked."""
    count = min(count, len(items))
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def questions(things: list[Thing]) -> list[Question]:
    trained = [thing for thing in things if not thing.held_out]
    asked = [_one(thing, "thing") for thing in spread(trained, 200)]
    tinted = [thing for thing in trained if thing.id in references().tinted]
    asked += [_one(thing, "color", "color") for thing in spread(tinted, 60)]
    asked += [_one(thing, "held-out color") for thing in things if thing.held_out]
    countable = [t for t in trained if t.plural and t.id in references().whole]
    seen = [t for t in countable if not any((n, t.name) in HELD_OUT_COUNTS for n in (2, 3))]
    asked += [_several(thing, 2 + i % 2, "count") for i, thing in enumerate(spread(seen, 40))]
    by_name = {thing.name: thing for thing in reversed(trained)}
    asked += [_several(by_name[name], n, "held-out count") for n, name in sorted(HELD_OUT_COUNTS)]
    asked += [_place(thing, tuple(SIDES)[i % 4]) for i, thing in enumerate(spread(countable, 48))]
    partners = spread(countable, 61)
    asked += [_pair(a, b, "pair") for a, b in zip(partners[:30], partners[30:60], strict=True)]
    for names in sorted(sorted(pair) for pair in HELD_OUT_PAIRS):
        asked.append(_pair(by_name[names[0]], by_name[names[1]], "held-out pair"))
    return asked


def _one(thing: Thing, group: str, respect: str = "thing") -> Question:
    noun = english_nouns(thing)[0]
    return Question(group, with_article(thing, noun), chinese_counted(thing, 1)[0], respect)


def _several(thing: Thing, count: int, group: str) -> Question:
    return Question(group, english_plurals(thing, count)[0], chinese_counted(thing, count)[0], "number")


def _place(thing: Thing, side: str) -> Question:
    one = _one(thing, "place", "place")
    (english, *_), (chinese, *_) = SIDES[side]
    return Question("place", f"{one.english} {english}", f"{one.chinese}在{chinese}", "place")


def _pair(first: Thing, second: Thing, group: str) -> Question:
    a, b = (with_article(t, english_nouns(t)[0]) for t in (first, second))
    c, d = (f"一{t.measure}{chinese_nouns(t)[0]}" for t in (first, second))
    return Question(group, f"{a} and {b}", f"{c}和{d}")


# -- reports -----------------------------------------------------------------------------


class Report:
    """What was right, by group and language: in the group's respect, and in every respect."""

    def __init__(self, path: Path, seeds: list[int]) -> None:
        self.path, self.seeds = path, seeds
        self.right: dict[str, list[bool]] = {}
        self.wholly: dict[str, list[bool]] = {}
        self.wrong: list[str] = []

    def add(self, question: Question, language: str, picture: Image.Image, seed: int) -> None:
        prompt = getattr(question, language)
        found = examine(picture, prompt)
        name = f"{question.group}, {language}"
        self.right.setdefault(name, []).append(found[question.respect])
        self.wholly.setdefault(name, []).append(all(found.values()))
        if not all(found.values()):
            missing = ", ".join(respect for respect, good in found.items() if not good)
            self.wrong.append(f"{seed} {name}: {prompt} ({missing}) -> {references().name(picture)}")

    def write(self) -> str:
        """To the file; returns the counts as one line."""
        counts = {
            key: {name: f"{sum(v)} of {len(v)}" for name, v in groups.items()}
            for key, groups in (("right", self.right), ("in every respect", self.wholly))
        }
        text = json.dumps({"seeds": self.seeds, **counts, "wrong": self.wrong}, ensure_ascii=False, indent=1)
        self.path.write_text(text + "\n", encoding="utf-8")
        return json.dumps(counts)


class Drawer:
    """A model, with a LoRA if one was named, and its settings."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.pipeline = hydit_core.load(args.model, device=args.device)
        if args.lora is not None:
            self.pipeline.load_lora(args.lora)
        given = {name: getattr(args, name) for name in ("steps", "cfg", "sampler", "spacing")}
        self.settings = {name: value for name, value in given.items() if value is not None}
        self.batch = args.batch

    def __call__(self, prompts: list[str], seed: int) -> list[Image.Image]:
        found: list[Image.Image] = []
        for start in range(0, len(prompts), self.batch):
            found += self.pipeline(prompts[start : start + self.batch], seed=seed, **self.settings)
        return found


def judge(args: argparse.Namespace) -> None:
    drawn, report = Drawer(args), Report(args.out / "report.json", args.seeds)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.share == 1:
        ordinary = ORDINARY.read_text(encoding="utf-8").split("\n")[:-1]
        for seed in args.seeds:
            pictures = drawn(ordinary, seed)
            sheet(pictures, ordinary, 10, args.out / f"ordinary_{seed}.png")
            sheet(pictures, [""] * len(pictures), 10, args.out / f"ordinary_{seed}_untitled.png")
            print("ordinary prompts drawn", flush=True)
    asked = questions(list(vocabulary().things))[:: round(1 / args.share)]
    for seed in args.seeds:
        for language in ("english", "chinese"):
            prompts = [getattr(question, language) for question in asked]
            pictures = drawn(prompts, seed)
            for question, picture in zip(asked, pictures, strict=True):
                report.add(question, language, picture, seed)
            if seed == args.seeds[0]:
                sheet(pictures, prompts, 20, args.out / f"asked_{language}.jpg")
            print(seed, language, report.write(), flush=True)


def write_signatures(icons: Path) -> None:
    """From what ``scenes.py icons`` wrote."""
    things, opened = read_things(), Icons(icons)
    write_references(things, (draw((standard(thing),), opened) for thing in things))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("work/judge"))
    parser.add_argument("--write-signatures", type=Path, metavar="ICONS", help="what scenes.py icons wrote")
    parser.add_argument("--model", default=None, help="default: the embedded model")
    parser.add_argument("--lora", type=Path, help="draw with this LoRA, as it recommends")
    parser.add_argument("--share", type=float, default=1.0, help="of the questions")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--cfg", type=float, default=None)
    parser.add_argument("--sampler", default=None)
    parser.add_argument("--spacing", default=None)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.write_signatures:
        write_signatures(args.write_signatures)
    else:
        judge(args)


if __name__ == "__main__":
    main()
