"""Judge what a model draws: whether the thing, its color, number, place and pairs are as asked for.

    python judge.py --icons work/icons.zip --out work/judge [--model FILE] [--share 0.1] [--seeds 1 2 3]

A thing is right if its picture, cropped to what is not white and scaled to 16 x 16 pixels, is closest to that
thing among the whole vocabulary (mirror images count as well). Numbers are counted as connected components,
places are the middle of what is not white, pairs are the things in both halves. Writes ``report.json`` and
contact sheets, and draws ``ordinary_prompts.txt`` for a reader to name.
"""

from __future__ import annotations

import argparse
import colorsys
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from evaluate import sheet, signature
from icons import TINTS
from PIL import Image
from scenes import SIZE, Icons, draw, standard
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


class References:
    """The look of every thing and its mirror image: (things, 2, 16, 16, 3) in 0..1."""

    def __init__(self, things: list[Thing], icons: Icons) -> None:
        self.things = things
        pictures = [draw((standard(thing),), icons) for thing in things]
        plain = np.stack([signature(picture) for picture in pictures])
        self.signatures = np.stack([plain, plain[:, :, ::-1]], 1)
        self.whole = {t.id: len(components(p)) == 1 for t, p in zip(things, pictures, strict=True)}

    def is_nearest(self, picture: Image.Image, thing: Thing) -> bool:
        """Whether nothing is closer to the picture, except things that look like this one."""
        return self.name(picture) in self._alike(thing)

    def name(self, picture: Image.Image) -> str:
        """The id of the nearest thing."""
        distances = ((self.signatures - signature(picture)) ** 2).mean((2, 3, 4)).min(1)
        return self.things[int(distances.argmin())].id

    def _alike(self, thing: Thing) -> set[str]:
        own = self.signatures[self.things.index(thing), 0]
        distances = np.sqrt(((self.signatures - own) ** 2).mean((2, 3, 4))).min(1)
        return {self.things[int(i)].id for i in np.flatnonzero(distances < 0.05)}


def foreground(picture: Image.Image) -> np.ndarray:
    return (255 - np.asarray(picture.convert("RGB"), np.int16)).max(2) > 24


def components(picture: Image.Image) -> list[tuple[int, int, int, int]]:
    """Boxes (left, top, width, height) of the connected parts, without specks."""
    scale = picture.width / SIZE
    kernel = np.ones((max(1, round(5 * scale)),) * 2, np.uint8)
    mask = cv2.dilate(foreground(picture).astype(np.uint8), kernel)
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask)
    areas = stats[1:, cv2.CC_STAT_AREA]
    return [
        tuple(int(v) for v in box[:4])
        for box, area in zip(stats[1:], areas, strict=True)
        if area > 0.15 * areas.max()
    ]


def middle(picture: Image.Image) -> tuple[float, float]:
    """The middle of what is not white, as fractions of the picture."""
    rows, columns = np.nonzero(foreground(picture))
    if len(rows) == 0:
        return 0.5, 0.5
    height, width = foreground(picture).shape
    return (columns.min() + columns.max()) / 2 / width, (rows.min() + rows.max()) / 2 / height


def hue_is(picture: Image.Image, color: str) -> bool:
    """Whether the saturated pixels have a color's hue, within 30 degrees on the median."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)[foreground(picture)] / 255
    if len(pixels) == 0:
        return False
    value, chroma = pixels.max(1), pixels.max(1) - pixels.min(1)
    if color == "black":
        return float(np.median(value)) < 0.4
    saturated = pixels[chroma > 0.2]
    if len(saturated) < 0.2 * len(pixels):
        return False
    wanted = np.exp(2j * np.pi * TINTS[color][0] / 360)
    hues = np.array([colorsys.rgb_to_hsv(*p)[0] for p in saturated[:: max(1, len(saturated) // 500)]])
    return float(np.median(np.abs(np.angle(np.exp(2j * np.pi * hues) / wanted, deg=True)))) < 30


@dataclass(frozen=True)
class Question:
    """A prompt in both languages and what its picture must show."""

    group: str
    english: str
    chinese: str
    right: Callable[[Image.Image], bool]


def spread(items: list[Thing], count: int) -> list[Thing]:
    """Every n-th item, so that the easy ones are not picked."""
    count = min(count, len(items))
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def one(thing: Thing, group: str, right: Callable[[Image.Image], bool]) -> Question:
    noun = english_nouns(thing)[0]
    return Question(group, with_article(thing, noun), chinese_counted(thing, 1)[0], right)


def questions(references: References, things: list[Thing]) -> list[Question]:
    trained = [thing for thing in things if not thing.held_out]
    asked = [one(t, "thing", lambda p, t=t: references.is_nearest(p, t)) for t in spread(trained, 200)]
    colored = [thing for thing in trained if thing.color]
    asked += [one(t, "color", lambda p, t=t: hue_is(p, t.color)) for t in spread(colored, 60)]
    unseen = [thing for thing in things if thing.held_out]
    asked += [one(t, "held-out color", lambda p, t=t: references.is_nearest(p, t)) for t in unseen]
    countable = [t for t in trained if t.plural and references.whole[t.id]]
    seen = [t for t in countable if not any((n, t.name) in HELD_OUT_COUNTS for n in (2, 3))]
    for i, thing in enumerate(spread(seen, 40)):
        asked.append(_count(thing, 2 + i % 2, "count"))
    by_name = {thing.name: thing for thing in reversed(trained)}
    asked += [_count(by_name[name], n, "held-out count") for n, name in sorted(HELD_OUT_COUNTS)]
    for i, thing in enumerate(spread(countable, 48)):
        asked.append(_place(thing, tuple(SIDES)[i % 4]))
    partners = spread(countable, 61)
    for first, second in zip(partners[:30], partners[30:60], strict=True):
        asked.append(_pair(first, second, "pair", references))
    for names in sorted(sorted(pair) for pair in HELD_OUT_PAIRS):
        asked.append(_pair(by_name[names[0]], by_name[names[1]], "held-out pair", references))
    return asked


def _count(thing: Thing, count: int, group: str) -> Question:
    english, chinese = english_plurals(thing, count)[0], chinese_counted(thing, count)[0]
    return Question(group, english, chinese, lambda p: len(components(p)) == count)


def _place(thing: Thing, side: str) -> Question:
    noun = english_nouns(thing)[0]
    english = f"{with_article(thing, noun)} {SIDES[side][0][0]}"

    def right(picture: Image.Image) -> bool:
        x, y = middle(picture)
        return {"left": x < 0.42, "right": x > 0.58, "top": y < 0.42, "bottom": y > 0.58}[side]

    return Question("place", english, f"{chinese_counted(thing, 1)[0]}在{SIDES[side][1][0]}", right)


def _pair(first: Thing, second: Thing, group: str, references: References) -> Question:
    a, b = (with_article(t, english_nouns(t)[0]) for t in (first, second))
    c, d = (f"一{t.measure}{chinese_nouns(t)[0]}" for t in (first, second))

    def right(picture: Image.Image) -> bool:
        half = picture.width // 2
        sides = (
            picture.crop((0, 0, half, picture.height)),
            picture.crop((half, 0, picture.width, picture.height)),
        )
        return references.is_nearest(sides[0], first) and references.is_nearest(sides[1], second)

    return Question(group, f"{a} and {b}", f"{c}和{d}", right)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--icons", type=Path, required=True, help="what scenes.py icons wrote")
    parser.add_argument("--out", type=Path, required=True)
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
    args.out.mkdir(parents=True, exist_ok=True)
    things = read_things()
    pipeline = hydit_core.load(args.model, device=args.device)
    if args.lora is not None:
        pipeline.load_lora(args.lora)
    given = {name: getattr(args, name) for name in ("steps", "cfg", "sampler", "spacing")}
    settings = {name: value for name, value in given.items() if value is not None}

    def drawn(prompts: list[str], seed: int) -> list[Image.Image]:
        found: list[Image.Image] = []
        for start in range(0, len(prompts), args.batch):
            found += pipeline(prompts[start : start + args.batch], seed=seed, **settings)
        return found

    ordinary = ORDINARY.read_text(encoding="utf-8").split("\n")[:-1]
    if args.share == 1:
        for seed in args.seeds:
            pictures = drawn(ordinary, seed)
            sheet(pictures, ordinary, 10, args.out / f"ordinary_{seed}.png")
            sheet(pictures, [""] * len(pictures), 10, args.out / f"ordinary_{seed}_untitled.png")
            print("ordinary prompts drawn", flush=True)
    references = References(things, Icons(args.icons))
    asked = questions(references, things)[:: round(1 / args.share)]
    right: dict[str, list[bool]] = {}
    wrong: list[str] = []
    for seed in args.seeds:
        for language in ("english", "chinese"):
            prompts = [getattr(question, language) for question in asked]
            pictures = drawn(prompts, seed)
            for question, prompt, picture in zip(asked, prompts, pictures, strict=True):
                good = question.right(picture)
                right.setdefault(f"{question.group}, {language}", []).append(good)
                if not good:
                    wrong.append(f"{seed} {question.group}: {prompt} -> {references.name(picture)}")
            if seed == args.seeds[0]:
                sheet(pictures, prompts, 20, args.out / f"asked_{language}.jpg")
            report = {
                "seeds": args.seeds,
                "right": {name: f"{sum(v)} of {len(v)}" for name, v in right.items()},
            }
            text = json.dumps({**report, "wrong": wrong}, ensure_ascii=False, indent=1)
            (args.out / "report.json").write_text(text + "\n", encoding="utf-8")
            print(seed, language, json.dumps(report["right"]), flush=True)


if __name__ == "__main__":
    main()
