"""Prepare the embedded model's data: pictures, captions in two languages, and the two tokenizers.

    npm install @iconify-json/twemoji@1.2.5
    python prepare.py --twemoji node_modules/@iconify-json/twemoji --out work/data

Writes ``plain.jsonl`` (each concept in the middle of the canvas, and mirrored), ``varied.jsonl`` (smaller and
elsewhere, which half of the captions say), their pictures, ``vocab.txt`` and ``spiece.model``, and for the
IP-Adapter ``colors.jsonl``: colored things, whose captions say no color and whose prompt pictures are other
things of that color. The same packages give the same files.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from dataclasses import replace
from pathlib import Path

from icons import Concept, IconSet, read_concepts, render
from PIL import Image, ImageOps
from tokenizers_small import train_spiece, write_vocabulary

SIZE = 128
# Mirroring these would make the caption or the picture wrong.
NOT_MIRRORED = {"1F50D", "1F3B1", "1F4D6", "1F39D", "1F5D3"}

ENGLISH = ("{}", "{article} {}", "{} emoji", "a picture of {article} {}")
CHINESE = ("{}", "一个{}", "{}图标", "一张{}的图片")
SMALL = ("small", "小")
CHINESE_COLOR = re.compile("^(红|橙|黄|绿|蓝|紫|粉|棕|黑)(色的|色)?")
SIDES = {
    "left": ("on the left", "左边"),
    "right": ("on the right", "右边"),
    "top": ("at the top", "上方"),
    "bottom": ("at the bottom", "下方"),
}


def article(words: str) -> str:
    return "an" if words[0].lower() in "aeiou" else "a"


def captions(concept: Concept, small: bool = False, side: str | None = None) -> list[str]:
    """All captions for a concept, as many in English as in Chinese."""
    english, chinese = [], []
    for words in concept.english:
        said = f"{SMALL[0]} {words}" if small else words
        place = f" {SIDES[side][0]}" if side else ""
        english += [form.format(said, article=article(said)) + place for form in ENGLISH]
    for words in concept.chinese:
        said = f"{SMALL[1]}{words}" if small else words
        place = SIDES[side][1] + "的" if side else ""
        chinese += [form.format(place + said) for form in CHINESE]
    longest = max(len(english), len(chinese))
    return [group[i % len(group)] for i in range(longest) for group in (english, chinese)]


def place(icon: Image.Image, side: int, left: int, top: int, mirror: bool) -> Image.Image:
    """The icon at ``side`` pixels on a white canvas."""
    if side != icon.width:
        icon = icon.resize((side, side), Image.Resampling.LANCZOS)
    if mirror:
        icon = ImageOps.mirror(icon)
    canvas = Image.new("RGBA", (SIZE, SIZE), "white")
    canvas.alpha_composite(icon, (left, top))
    return canvas.convert("RGB")


def vary(random_: random.Random) -> tuple[int, int, int, bool, str | None]:
    """Side, left, top, whether it is small, and where the icon is (None: nowhere in particular)."""
    side = random_.randint(60, 112)
    room = SIZE - side
    left, top = random_.randint(0, room), random_.randint(0, room)
    dx, dy = (left - room / 2) / SIZE, (top - room / 2) / SIZE
    where = None
    if max(abs(dx), abs(dy)) > 0.12:
        where = ("left" if dx < 0 else "right") if abs(dx) >= abs(dy) else ("top" if dy < 0 else "bottom")
    return side, left, top, side < 80, where


def write_pictures(
    concepts: list[Concept], icons: IconSet, out: Path, variations: int, seed: int
) -> list[str]:
    """Pictures and the two JSONL files; returns every caption."""
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    plain, varied, every = [], [], []
    for concept in concepts:
        if concept.held_out:
            continue
        random_ = random.Random(f"{seed}-{concept.id}")
        icon = render(concept, icons, SIZE)
        mirrors = [False] if concept.codepoint in NOT_MIRRORED else [False, True]
        for mirror in mirrors:
            name = f"pictures/{concept.id}{'-m' if mirror else ''}.png"
            place(icon, SIZE, 0, 0, mirror).save(out / name)
            plain.append({"image": name, "captions": captions(concept), "concept": concept.id})
        for i in range(variations):
            side, left, top, small, where = vary(random_)
            told = random_.random() < 0.6
            name = f"pictures/{concept.id}-{i}.png"
            place(icon, side, left, top, random_.choice(mirrors)).save(out / name)
            said = captions(concept, small, where) if told else captions(concept)
            varied.append({"image": name, "captions": said, "concept": concept.id})
        every += captions(concept) + captions(concept, True, "left") + captions(concept, True, "right")
        every += captions(concept, True, "top") + captions(concept, True, "bottom")
    for name, rows in (("plain.jsonl", plain), ("varied.jsonl", varied)):
        with open(out / name, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{len(plain)} plain and {len(varied)} varied pictures in {out}")
    return every


def write_colors(concepts: list[Concept], out: Path, others: int, seed: int) -> None:
    """The JSONL file of things whose color is in the prompt picture alone, ``others`` of them for each."""
    colored = [concept for concept in concepts if concept.colour and not concept.held_out]
    rows = []
    for concept in colored:
        random_ = random.Random(f"{seed}-{concept.id}-color")
        alike = [o for o in colored if o.colour == concept.colour and o.thing != concept.thing]
        chinese = sorted({CHINESE_COLOR.sub("", words) for words in concept.chinese})
        silent = replace(concept, english=(concept.thing,), chinese=tuple(chinese))
        for other in random_.sample(alike, others):
            row = {"image": f"pictures/{concept.id}.png", "captions": captions(silent)}
            rows.append({**row, "image_prompt": f"pictures/{other.id}.png"})
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out / "colors.jsonl").write_text(text, encoding="utf-8")
    print(f"{len(rows)} colored things with a prompt picture of another thing")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--twemoji", type=Path, required=True, help="the unpacked @iconify-json/twemoji package"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variations", type=int, default=10, help="varied pictures of each concept")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokenizers", action="store_true", help="also train the tokenizers again")
    args = parser.parse_args()
    concepts = read_concepts()
    said = write_pictures(concepts, IconSet(args.twemoji), args.out, args.variations, args.seed)
    write_colors(concepts, args.out, 4, args.seed)
    if args.tokenizers:
        write_vocabulary(said, args.out / "vocab.txt")
        train_spiece(said, args.out / "spiece.model")


if __name__ == "__main__":
    main()
