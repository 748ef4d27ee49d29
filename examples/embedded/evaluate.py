"""Measure what a small model draws: is the picture closest to the thing that was asked for?

    python evaluate.py --out work/eval [--model FILE]
    python evaluate.py --twemoji node_modules/@iconify-json/twemoji --write-signatures

Pictures are cropped to what is not white, scaled to 16 x 16 pixels and compared with every concept (and its
mirror image) by color distance, so that position and size do not count. Writes ``report.json`` and contact
sheets. ``signatures.npz`` holds the concepts at that size, so that no icon package is needed.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import numpy as np
from icons import HERE, Concept, IconSet, on_white, read_concepts, render
from PIL import Image, ImageChops, ImageDraw, ImageFont

import hydit_core

GRID = 16
SIGNATURES = HERE / "signatures.npz"


def crop_to_content(picture: Image.Image) -> Image.Image:
    """What is not white, centered on a square white canvas of ``GRID`` pixels."""
    difference = ImageChops.difference(picture, Image.new("RGB", picture.size, "white")).convert("L")
    box = difference.point(lambda v: 255 if v > 40 else 0).getbbox() or (0, 0, *picture.size)
    content = picture.crop(box)
    side = max(content.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(content, ((side - content.width) // 2, (side - content.height) // 2))
    return square.resize((GRID, GRID), Image.Resampling.BOX)


def signature(picture: Image.Image) -> np.ndarray:
    return np.asarray(crop_to_content(picture), np.float32) / 255


class References:
    """Every concept's signature, mirrored too: (concepts, 2, GRID, GRID, 3) in 0..1."""

    def __init__(self, concepts: list[Concept], path: Path = SIGNATURES) -> None:
        self.concepts = concepts
        with np.load(path) as stored:
            if stored["ids"].tolist() != [concept.id for concept in concepts]:
                raise SystemExit(f"{path} was made for other concepts; run with --write-signatures")
            plain = stored["signatures"].astype(np.float32) / 255
        self.signatures = np.stack([plain, plain[:, :, ::-1]], 1)

    @staticmethod
    def write(concepts: list[Concept], icons: IconSet, path: Path = SIGNATURES) -> None:
        """Store what the icons look like."""
        drawn = [signature(on_white(render(concept, icons, 128))) for concept in concepts]
        pixels = (np.stack(drawn) * 255).round().astype(np.uint8)
        np.savez_compressed(path, ids=[concept.id for concept in concepts], signatures=pixels)

    def distances(self, picture: Image.Image) -> np.ndarray:
        """(concepts,) root mean square color distance, the better of plain and mirrored."""
        return np.sqrt(((self.signatures - signature(picture)) ** 2).mean((2, 3, 4))).min(1)

    def nearest(self, picture: Image.Image) -> Concept:
        return self.concepts[int(self.distances(picture).argmin())]

    def alike(self, one: Concept, other: Concept) -> bool:
        """Whether two concepts are one picture under two names, as "t-shirt" and "blue shirt" are."""
        a, b = (self.signatures[self.concepts.index(concept)] for concept in (one, other))
        return bool(np.sqrt(((a[0] - b) ** 2).mean((1, 2, 3))).min() < 0.05)


@functools.cache
def _judge() -> tuple[References, dict[str, Concept]]:
    concepts = read_concepts()
    names = {name: concept for concept in concepts for name in (*concept.english, *concept.chinese)}
    return References(concepts), names


def right(picture: Image.Image, prompt: str) -> bool | None:
    """Whether nothing is closer to the picture than what was asked for; None for prompts of other things.

    ``hydit compare --judge evaluate.py:right`` counts with it.
    """
    references, names = _judge()
    if (wanted := names.get(prompt)) is None:
        return None
    return references.alike(references.nearest(picture), wanted)


def chosen(concepts: list[Concept], count: int = 30) -> list[Concept]:
    """Every n-th trained concept, so that the easy ones are not picked."""
    trained = [concept for concept in concepts if not concept.held_out]
    return [trained[round(i * (len(trained) - 1) / (count - 1))] for i in range(count)]


def sheet(pictures: list[Image.Image], titles: list[str], columns: int, path: Path) -> None:
    """A contact sheet; a title line under each picture unless all titles are empty."""
    cell, line = pictures[0].width, 18 if any(titles) else 0
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * (cell + 4), rows * (cell + line + 4)), "white")
    draw = ImageDraw.Draw(canvas)
    font = cjk_font(13)
    for i, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        x, y = (i % columns) * (cell + 4), (i // columns) * (cell + line + 4)
        canvas.paste(picture, (x, y))
        while draw.textlength(title, font) > cell and len(title) > 4:
            title = title.removesuffix("…")[:-1] + "…"
        draw.text((x + 2, y + cell + 1), title, fill="black", font=font)
    canvas.save(path)


def cjk_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in ("wqy-microhei.ttc", "NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "DejaVuSans.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--twemoji", type=Path, help="with --write-signatures: the unpacked icon package")
    parser.add_argument("--write-signatures", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("work/eval"))
    parser.add_argument("--model", default=None, help="default: the embedded model")
    parser.add_argument("--all", action="store_true", help="every concept, not only 30")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--cfg", type=float, default=None)
    args = parser.parse_args()
    concepts = read_concepts()
    if args.write_signatures:
        References.write(concepts, IconSet(args.twemoji))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    references = References(concepts)
    pipeline = hydit_core.load(args.model)
    groups = {
        "trained": [c for c in concepts if not c.held_out] if args.all else chosen(concepts),
        "held_out": [c for c in concepts if c.held_out],
    }
    report: dict[str, object] = {"seed": args.seed}
    for name, group in groups.items():
        pairs = []
        for language in ("en", "zh"):
            prompts = [c.english[0] if language == "en" else c.chinese[0] for c in group]
            pictures = []
            for start in range(0, len(prompts), 16):
                part = prompts[start : start + 16]
                seeds = {"seed": args.seed, "steps": args.steps, "cfg": args.cfg}
                pictures += pipeline(part, **{k: v for k, v in seeds.items() if v is not None})
            found = [references.nearest(picture) for picture in pictures]
            wrong = [
                f"{p} -> {f.english[0]}"
                for p, f, c in zip(prompts, found, group, strict=True)
                if not references.alike(f, c)
            ]
            right = len(group) - len(wrong)
            report[f"{name}_{language}"] = {"right": right, "of": len(group), "wrong": wrong}
            print(f"{name} {language}: {right} of {len(group)}; wrong: {wrong}", flush=True)
            sheet(pictures, prompts, 10, args.out / f"{name}_{language}.png")
            sheet(pictures, [""] * len(pictures), 10, args.out / f"{name}_{language}_untitled.png")
            pairs.append([signature(picture) for picture in pictures])
        english, chinese = (np.stack(side) for side in pairs)
        between = np.sqrt(((english[:, None] - chinese[None]) ** 2).mean((2, 3, 4)))
        closest = int((between.argmin(1) == np.arange(len(group))).sum())
        report[f"{name}_languages_agree"] = {"right": closest, "of": len(group)}
    (args.out / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
