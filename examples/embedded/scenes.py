"""Pictures of scenes with their captions: one thing, smaller or elsewhere, two or three of it, two things.

    python scenes.py icons --twemoji node_modules/@iconify-json/twemoji --out work/icons.zip
    python scenes.py draw --icons work/icons.zip --out work/scenes

``icons`` renders the icon package once (resvg-py is needed for that alone). ``draw`` composes the training
pictures on every core and writes their captions: ``plain.jsonl``, ``varied.jsonl``, ``counts.jsonl``,
``pairs.jsonl``, ``control.jsonl`` for a ControlNet, and for an IP-Adapter ``colors.jsonl``: colored things,
whose captions say no color and whose prompt pictures are other things of that color. The same icons and
numbers give the same files.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import random
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np
from icons import IconSet, rasterize, shape_svg, tint
from PIL import Image, ImageOps
from things import (
    Thing,
    chinese_nouns,
    describe,
    describe_count,
    describe_pair,
    english_nouns,
    pair_held_out,
    read_things,
)

SIZE = 256
# Letters, numbers, clocks, maps, hands and arrows that point somewhere: their mirror image would be wrong.
_ONE_WAY = """
1f4af 1f4a4 1f448 1f449 2b05 27a1 1f504 25b6 2753 2757 1f3b1 1f3b5 1f3b6 1f3bc 1f4c5 1f4c8 1f4c9
1f4ca 231a 23f0 23f1 1f570 1f552 1f30d 1f30f 1f5fa 1f9ed 1f4f0 1f4b5 1f4b4 1f4b8 1f004 1f0cf 267f
262f 1f6bb 1f513 1f50d 1f4d6 1f6d1 26d4 1f6ab 1f6ad 2705 1f4dd 1f4bb 1f3f4-200d-2620-fe0f 1f313
1f31b 1f319 1f947 1f948 1f949 1f9ee
"""
NOT_MIRRORED = frozenset(_ONE_WAY.split())


@dataclass(frozen=True)
class Place:
    """Where a thing is drawn: its side and its left and upper edge, in pixels."""

    thing: Thing
    side: int
    left: int
    top: int
    mirror: bool = False


@dataclass(frozen=True)
class Scene:
    places: tuple[Place, ...]
    captions: tuple[str, ...]


# -- icons -------------------------------------------------------------------------------


def write_icons(package: IconSet, path: Path) -> None:
    """All icons of the vocabulary, all shapes, and under ``other/`` those that only the autoencoder sees."""
    wanted = {thing.code for thing in read_things() if thing.code}
    names = {package.name_of(code) for code in wanted}
    others = [n for n in sorted(package.icons) if n not in names and not re.search("skin-tone", n)]
    drawn = [(f"{code}.webp", package.svg(code)) for code in sorted(wanted)]
    drawn += [
        (f"{thing.id}.webp", shape_svg(thing.name, thing.color)) for thing in read_things() if thing.shape
    ]
    drawn += [(f"other/{name}.webp", package.named(name)) for name in others]
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, svg in drawn:
            content = io.BytesIO()
            rasterize(svg, SIZE).save(content, "webp", lossless=True, quality=60)
            archive.writestr(name, content.getvalue())
    print(f"{len(drawn)} icons, {path.stat().st_size / 1e6:.1f} MB")


class Icons:
    """The rendered icons, tinted as asked; kept in memory once used."""

    def __init__(self, path: Path) -> None:
        self.archive = zipfile.ZipFile(path)
        self.of = lru_cache(maxsize=2000)(self._of)

    def _of(self, thing: Thing) -> Image.Image:
        """RGBA, ``SIZE`` pixels wide."""
        if thing.shape:
            return self.read(f"{thing.id}.webp")
        icon = self.read(f"{thing.code}.webp")
        return tint(icon, thing.color) if thing.color else icon

    def read(self, name: str) -> Image.Image:
        return Image.open(io.BytesIO(self.archive.read(name))).convert("RGBA")

    def others(self) -> Iterator[Image.Image]:
        for name in sorted(self.archive.namelist()):
            if name.startswith("other/"):
                yield self.read(name)


def draw(places: tuple[Place, ...], icons: Icons) -> Image.Image:
    """The things on a white ground."""
    canvas = Image.new("RGBA", (SIZE, SIZE), "white")
    for place in places:
        icon = icons.of(place.thing)
        if place.side != SIZE:
            icon = icon.resize((place.side, place.side), Image.Resampling.LANCZOS)
        canvas.alpha_composite(ImageOps.mirror(icon) if place.mirror else icon, (place.left, place.top))
    return canvas.convert("RGB")


# -- scenes ------------------------------------------------------------------------------


def centered(thing: Thing, side: int, x: float, y: float, mirror: bool) -> Place:
    """A place with its middle at (x, y), moved into the canvas if it would stick out."""
    left, top = (min(max(round(v - side / 2), 0), SIZE - side) for v in (x, y))
    return Place(thing, side, left, top, mirror)


def mirrored(thing: Thing, r: random.Random) -> bool:
    return thing.code not in NOT_MIRRORED and r.random() < 0.25


def plain(thing: Thing, r: random.Random) -> Scene:
    """In the middle, nearly filling the canvas."""
    side = r.randint(206, 236)
    x, y = (SIZE / 2 + r.uniform(-8, 8) for _ in range(2))
    return Scene((centered(thing, side, x, y, mirrored(thing, r)),), tuple(describe(thing)))


def standard(thing: Thing) -> Place:
    """How a thing is shown for comparison: as large as :func:`plain` shows it on average."""
    return centered(thing, 220, SIZE / 2, SIZE / 2, False)


def varied(thing: Thing, r: random.Random) -> Scene:
    """Small or big, at one side of the canvas, or both; some captions do not say so."""
    kind = r.choice(("small", "small", "big", "side", "side", "side", "small side"))
    size = "small" if "small" in kind else "big" if kind == "big" else ""
    side = r.choice(("left", "right", "top", "bottom")) if "side" in kind else ""
    pixels = {"small": r.randint(84, 112), "big": r.randint(246, 256), "": r.randint(118, 142)}[size]
    x, y = (SIZE / 2 + r.uniform(-10, 10) for _ in range(2))
    room = (SIZE - pixels) / 2
    if side in ("left", "right"):
        x += room * r.uniform(0.8, 1.0) * (-1 if side == "left" else 1)
    elif side:
        y += room * r.uniform(0.8, 1.0) * (-1 if side == "top" else 1)
    return Scene((centered(thing, pixels, x, y, mirrored(thing, r)),), tuple(describe(thing, size, side)))


# Middles of two and three things as fractions of the canvas, and the largest side that keeps them apart.
LAYOUTS: dict[int, tuple[tuple[tuple[tuple[float, float], ...], int], ...]] = {
    2: ((((0.26, 0.5), (0.74, 0.5)), 116),),
    3: ((((0.5, 0.26), (0.26, 0.74), (0.74, 0.74)), 112), (((0.17, 0.5), (0.5, 0.5), (0.83, 0.5)), 78)),
}


def counted(thing: Thing, count: int, r: random.Random) -> Scene:
    middles, largest = r.choice(LAYOUTS[count])
    side, mirror = r.randint(round(0.88 * largest), largest), mirrored(thing, r)
    spots = [(SIZE * x + r.uniform(-3, 3), SIZE * y + r.uniform(-3, 3)) for x, y in middles]
    places = tuple(centered(thing, side, x, y, mirror) for x, y in spots)
    return Scene(places, tuple(describe_count(thing, count)))


def pair(first: Thing, second: Thing, r: random.Random) -> Scene:
    stacked = r.random() < 0.2
    spots = ((0.5, 0.26), (0.5, 0.74)) if stacked else ((0.26, 0.5), (0.74, 0.5))
    places = tuple(
        centered(
            t, r.randint(104, 118), SIZE * x + r.uniform(-3, 3), SIZE * y + r.uniform(-3, 3), mirrored(t, r)
        )
        for t, (x, y) in zip((first, second), spots, strict=True)
    )
    said: list[str] = []
    for _ in range(2):
        nouns = [r.choice(english_nouns(t)) for t in (first, second)]
        nouns += [r.choice(chinese_nouns(t)) for t in (first, second)]
        said += describe_pair(first, second, stacked, (nouns[0], nouns[1], nouns[2], nouns[3]))
    return Scene(places, tuple(said))


def scenes(numbers: argparse.Namespace) -> dict[str, list[Scene]]:
    """All scenes of a training, by file; none of them is held out."""
    things = [thing for thing in read_things() if not thing.held_out]
    countable = [thing for thing in things if thing.plural]
    found: dict[str, list[Scene]] = {"plain": [], "varied": [], "counts": [], "pairs": []}
    for thing in things:
        r = random.Random(f"{numbers.seed} {thing.id}")
        found["plain"] += [plain(thing, r) for _ in range(numbers.plain)]
        found["varied"] += [varied(thing, r) for _ in range(numbers.varied)]
        for i in range(numbers.counts if thing.plural else 0):
            count = 2 + i % 2
            if not thing.count_held_out(count):
                found["counts"].append(counted(thing, count, r))
    found["plain"] += _shapes_of_any_color(things, numbers)
    r = random.Random(f"{numbers.seed} pairs")
    while len(found["pairs"]) < numbers.pairs:
        first, second = r.choice(countable), r.choice(countable)
        if first.name != second.name and not pair_held_out(first, second):
            found["pairs"].append(pair(first, second, r))
    return found


def _shapes_of_any_color(things: list[Thing], numbers: argparse.Namespace) -> list[Scene]:
    """ "a circle" of any color."""
    found = []
    for thing in things:
        if thing.shape and thing.name not in ("star", "moon"):  # these have an icon of their own
            r = random.Random(f"{numbers.seed} any {thing.id}")
            colorless = Thing(thing.id, "", "", thing.name, thing.english, thing.chinese, thing.measure, "s")
            captions = tuple(describe(colorless))
            if thing.name != "heart" or thing.color == "red":
                found += [
                    Scene(plain(thing, r).places, captions) for _ in range(4 if thing.name == "heart" else 1)
                ]
    return found


# -- files -------------------------------------------------------------------------------

_icons: Icons


def _open(path: Path) -> None:
    global _icons
    _icons = Icons(path)


def icon_pool(icons: Path, processes: int | None = None) -> Pool:
    """Processes that have the icons open; make it before a GPU is used."""
    return multiprocessing.get_context("fork").Pool(processes, _open, (icons,))


def standard_picture(thing: Thing) -> np.ndarray:
    """In a process of the pool: (256, 256, 3) uint8."""
    return np.asarray(draw((standard(thing),), _icons))


def _write(job: tuple[Path, tuple[Place, ...]]) -> None:
    path, places = job
    draw(places, _icons).save(path, compress_level=1)


def write_scenes(found: dict[str, list[Scene]], icons: Path, out: Path, processes: int) -> None:
    """The pictures under ``pictures/``, then one JSONL file per group."""
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    jobs, lines = [], {}
    for group, members in found.items():
        names = [f"pictures/{group}-{i:05}.png" for i in range(len(members))]
        jobs += [(out / name, scene.places) for name, scene in zip(names, members, strict=True)]
        rows = [{"image": n, "captions": some_of(s.captions, n)} for n, s in zip(names, members, strict=True)]
        lines[group] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with icon_pool(icons, processes) as pool:
        for _ in pool.imap_unordered(_write, jobs, chunksize=32):
            pass
    lines["control"] = control_rows(found)
    lines["colors"] = color_rows(found["plain"])
    for group, text in lines.items():
        (out / f"{group}.jsonl").write_text(text, encoding="utf-8")
    print({group: len(members) for group, members in found.items()}, "in", out)


def control_rows(found: dict[str, list[Scene]]) -> str:
    """Pictures for a ControlNet with one short caption per language: the edges say the rest."""
    rows = []
    for group, step in (("varied", 2), ("counts", 8), ("pairs", 10)):
        for i, scene in list(enumerate(found[group]))[::step]:
            said = describe(scene.places[0].thing) if group == "varied" else scene.captions
            rows.append({"image": f"pictures/{group}-{i:05}.png", "captions": list(said[:2])})
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def color_rows(plain_scenes: list[Scene], others: int = 4) -> str:
    """Things whose color is in the prompt picture alone, ``others`` of them for each."""
    pictures: dict[Thing, list[str]] = {}
    for i, scene in enumerate(plain_scenes):
        thing = scene.places[0].thing
        if thing.color and any(thing.color in said for said in scene.captions):
            pictures.setdefault(thing, []).append(f"pictures/plain-{i:05}.png")
    rows = []
    for thing, own in pictures.items():
        r = random.Random(f"{thing.id} color")
        alike = [o for o in pictures if o.color == thing.color and o.name != thing.name]
        captions = list(some_of(tuple(describe(replace(thing, color=""))), own[0]))
        for i, other in enumerate(r.sample(alike, others)):
            row = {"image": own[i % len(own)], "captions": captions}
            rows.append({**row, "image_prompt": pictures[other][i % len(pictures[other])]})
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def some_of(captions: tuple[str, ...], name: str, most: int = 16) -> list[str]:
    """At most ``most`` captions of a picture, as many in each language."""
    half, r = most // 2, random.Random(name)
    sides = (captions[::2], captions[1::2])  # English and Chinese alternate
    if len(captions) <= most:
        return list(captions)
    return [said for side in sides for said in r.sample(side, half)]


def every_caption(found: dict[str, list[Scene]]) -> list[str]:
    """All sentences of the vocabulary, for the tokenizers; each scene's and those of what is held out."""
    said = [caption for members in found.values() for scene in members for caption in scene.captions]
    for thing in read_things():
        for size in ("small", "big"):
            for side in ("left", "right", "top", "bottom"):
                said += describe(thing, size, side)
        for count in (2, 3) if thing.plural else ():
            said += describe_count(thing, count)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    icons = commands.add_parser("icons", help="render the icon package")
    icons.add_argument(
        "--twemoji", type=Path, required=True, help="the unpacked @iconify-json/twemoji package"
    )
    icons.add_argument("--out", type=Path, required=True)
    drawing = commands.add_parser("draw", help="compose the training pictures")
    drawing.add_argument("--icons", type=Path, required=True)
    drawing.add_argument("--out", type=Path, required=True)
    drawing.add_argument("--plain", type=int, default=3, help="pictures of each thing in the middle")
    drawing.add_argument("--varied", type=int, default=5, help="smaller, bigger or elsewhere")
    drawing.add_argument("--counts", type=int, default=4, help="of two or three")
    drawing.add_argument("--pairs", type=int, default=8000, help="pictures of two things, in all")
    drawing.add_argument(
        "--share", type=float, default=1.0, help="below 1: only that fraction of it, for a trial"
    )
    drawing.add_argument("--seed", type=int, default=1)
    drawing.add_argument("--processes", type=int, default=os.cpu_count())
    drawing.add_argument("--tokenizers", type=Path, help="also train the tokenizers, into this folder")
    args = parser.parse_args()
    if args.command == "icons":
        write_icons(IconSet(args.twemoji), args.out)
        return
    found = scenes(args)
    if args.tokenizers:
        from tokenizers_small import train_spiece, write_vocabulary

        args.tokenizers.mkdir(parents=True, exist_ok=True)
        said = every_caption(found)
        said = sorted(set(said))
        write_vocabulary(said, args.tokenizers / "vocab.txt")
        train_spiece(said, args.tokenizers / "spiece.model")
    if args.share < 1:
        found = {group: members[:: round(1 / args.share)] for group, members in found.items()}
    write_scenes(found, args.icons, args.out, args.processes)


if __name__ == "__main__":
    main()
