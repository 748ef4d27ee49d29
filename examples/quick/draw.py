"""Draw five small data sets, as people bring them to `train quick`, with test pictures that no training sees.

    python examples/quick/draw.py --out examples/quick/work/data

| set | | pictures | captions | test |
|---|---|---|---|---|
| robot | a subject: one little robot, in several places and sizes | 6 | one each | 10 |
| night | a style: pale outlines on dark blue | 16 | one each | 16 |
| stitch | a style: cross-stitch on cream | 20 | one each | 16 |
| dusk | a color concept: everything from purple to orange | 12 | one each | 16 |
| gear | a shape in several colors | 9 | none: the folder's name | 9 |

Robot and gear are drawn here. What the styles and colors are applied to, the model draws: things that it
knows, of which one half is trained and the other tested. ``prior`` holds such pictures as they are, to see
what is forgotten. Each test set is a .jsonl. What is there already is not drawn again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

import hydit_core

SIDE = 128
TRIGGER = "ohwx"
THINGS = """
cat, dog, apple, car, tree, house, fish, bird, star, flower, banana, boat, sun, moon, heart, frog, horse,
carrot, bus, umbrella, guitar, clock, rabbit, cake, key, mushroom, rocket, snowman, duck, pear, bicycle, pig,
bell, cup of coffee, elephant, lemon, airplane, crown, turtle, candle, drum, tomato
"""
OTHERS = """
strawberry, butterfly, train, panda, hamburger, balloon, book, penguin, cactus, scissors, grapes, ladybug,
truck, monkey, pizza, glasses
"""
COLORS = {
    "red": (221, 46, 68),
    "orange": (244, 144, 12),
    "yellow": (253, 203, 88),
    "green": (120, 177, 89),
    "blue": (85, 172, 238),
    "purple": (170, 142, 214),
    "brown": (193, 105, 79),
    "black": (49, 55, 61),
    "pink": (244, 171, 186),
}
Rows = list[tuple[Image.Image, str]]


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


# -- what is drawn here ------------------------------------------------------------------------------------


def robot(canvas: Image.Image, x: float, y: float, side: float) -> None:
    """The subject, ``side`` pixels high, centered at (x, y); ``canvas`` is drawn 4 times too large."""
    pen = ImageDraw.Draw(canvas)

    def box(left: float, top: float, right: float, bottom: float, color: str, radius: float = 0) -> None:
        corners = [x + left * side, y + top * side, x + right * side, y + bottom * side]
        pen.rounded_rectangle(corners, radius * side, fill=color)

    box(-0.02, -0.5, 0.02, -0.36, "#99aab5")
    box(-0.06, -0.54, 0.06, -0.43, "#ffcc4d", 0.06)
    box(-0.3, -0.38, 0.3, 0.06, "#3fb8a0", 0.12)
    box(-0.36, -0.24, -0.3, -0.08, "#dd2e44")
    box(0.3, -0.24, 0.36, -0.08, "#dd2e44")
    for eye in (-0.13, 0.13):
        box(eye - 0.09, -0.29, eye + 0.09, -0.11, "#ffffff", 0.09)
        box(eye - 0.035, -0.235, eye + 0.035, -0.165, "#292f33", 0.035)
    box(-0.14, -0.05, 0.14, 0.0, "#292f33", 0.02)
    box(-0.22, 0.09, 0.22, 0.38, "#3fb8a0", 0.06)
    box(-0.09, 0.15, 0.09, 0.3, "#ffcc4d", 0.03)
    for arm in (-0.31, 0.25):
        box(arm, 0.11, arm + 0.06, 0.33, "#99aab5", 0.03)
    for leg in (-0.16, 0.06):
        box(leg, 0.38, leg + 0.1, 0.5, "#99aab5", 0.02)


ROBOTS: tuple[tuple[str, tuple[tuple[float, float, float], ...]], ...] = (
    ("{}", ((0.5, 0.5, 0.9),)),
    ("a small {}", ((0.5, 0.5, 0.5),)),
    ("{} on the left", ((0.27, 0.5, 0.5),)),
    ("two {}", ((0.27, 0.5, 0.5), (0.73, 0.5, 0.5))),
    ("{} at the top", ((0.5, 0.27, 0.5),)),
    ("a big {}", ((0.5, 0.52, 0.96),)),
    # for the test
    ("{}", ((0.5, 0.5, 0.84),)),
    ("{} on the right", ((0.73, 0.5, 0.5),)),
    ("{} at the bottom", ((0.5, 0.73, 0.5),)),
    ("a small {}", ((0.48, 0.53, 0.44),)),
    ("two {}", ((0.25, 0.48, 0.46), (0.75, 0.52, 0.46))),
    ("three {}", ((0.2, 0.5, 0.38), (0.5, 0.5, 0.38), (0.8, 0.5, 0.38))),
    ("{} on the left", ((0.3, 0.46, 0.56),)),
    ("{} at the top", ((0.46, 0.3, 0.54),)),
    ("a small {} on the right", ((0.74, 0.5, 0.36),)),
    ("a big {}", ((0.51, 0.5, 0.92),)),
)


def robots() -> Rows:
    rows = []
    for caption, places in ROBOTS:
        canvas = Image.new("RGB", (4 * SIDE, 4 * SIDE), "white")
        for x, y, side in places:
            robot(canvas, 4 * SIDE * x, 4 * SIDE * y, 4 * SIDE * side)
        rows.append((canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS), caption.format(TRIGGER)))
    return rows


def gear(color: tuple[int, int, int], turn: float, size: float) -> Image.Image:
    """The shape: a ring with eight teeth, turned by ``turn`` of a tooth."""
    large = 4 * SIDE
    y, x = np.mgrid[:large, :large] / large - 0.5
    radius, angle = np.hypot(x, y) / size, np.arctan2(y, x)
    teeth = np.cos(8 * angle + 2 * np.pi * turn) > 0
    inside = (radius > 0.16) & (radius < np.where(teeth, 0.46, 0.36))
    pixels = np.where(inside[..., None], np.uint8(color), np.uint8(255))
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def gears() -> Rows:
    """All colors, each turned and sized in another way, then all again for the test, in ways in between."""
    colors = list(enumerate(COLORS.values()))
    trained = [(gear(rgb, number / 9, 0.9 + 0.02 * (4 * number % 9)), "") for number, rgb in colors]
    tested = [
        (gear(rgb, (2 * number % 9 + 0.5) / 9, 0.9 + 0.02 * (5 * number % 9)), f"{TRIGGER} gear")
        for number, rgb in colors
    ]
    return trained + tested


# -- what is done to pictures of the model -----------------------------------------------------------------


def _luminance(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("L"), np.float32) / 255


def night(picture: Image.Image) -> Image.Image:
    """Pale outlines on dark blue, shapes a little lighter than the ground."""
    gray = np.asarray(picture.convert("RGB").filter(ImageFilter.GaussianBlur(0.8)), np.float32)
    down, right = np.gradient(gray, axis=(0, 1))
    lines = np.clip(np.hypot(down, right).max(2) / 30, 0, 1)[..., None]
    inside = (255 - gray).max(2, keepdims=True) > 25
    ground = np.where(inside, np.float32([38, 60, 120]), np.float32([16, 24, 64]))
    drawn = ground + (np.float32([250, 240, 190]) - ground) * lines
    return Image.fromarray(drawn.round().astype(np.uint8))


def stitch(picture: Image.Image, cell: int = 4) -> Image.Image:
    """Crosses of thread on cream cloth, a cross for each square of ``cell`` pixels."""
    side = SIDE // cell
    small = np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BOX), np.float32)
    thread = np.kron(small, np.ones((cell, cell, 1), np.float32))
    y, x = np.mgrid[:SIDE, :SIDE] % cell
    cross = ((x == y) | (x + y == cell - 1)).astype(np.float32)[..., None]
    drawn = np.float32([245, 235, 214]) * (1 - cross) * 0.55 + thread * (cross + (1 - cross) * 0.45)
    return Image.fromarray(drawn.round().clip(0, 255).astype(np.uint8))


def dusk(picture: Image.Image) -> Image.Image:
    """Dark becomes purple, bright orange, white pale yellow."""
    stops = np.float32([[44, 16, 84], [176, 42, 110], [246, 130, 60], [255, 238, 200]])
    gray = _luminance(picture)
    channels = [np.interp(gray, [0, 0.4, 0.75, 1], stops[:, c]) for c in range(3)]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


# -- files -------------------------------------------------------------------------------------------------


def model_pictures(nouns: Iterable[str], folder: Path, model: Path | None) -> Rows:
    """What the base draws for each of ``nouns``, kept in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe = None
    rows: Rows = []
    for number, noun in enumerate(nouns):
        path, prompt = folder / f"{noun.replace(' ', '-')}.png", article(noun)
        if not path.exists():
            pipe = pipe or hydit_core.load(model, device="cpu")
            picture = next(iter(pipe.pictures([prompt], pipe.settings(), seed=number))).image
            picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(path)
        rows.append((Image.open(path).convert("RGB"), prompt))
    return rows


def write(rows: Rows, trained: int, folder: Path) -> None:
    """The first ``trained`` as people have them, the rest as a test set."""
    test = folder.parent / "test" / folder.name
    for place in (folder, test):
        place.mkdir(parents=True, exist_ok=True)
    listed = []
    for number, (picture, caption) in enumerate(rows):
        if number < trained:
            picture.save(folder / f"{number:02}.png")
            if caption:
                (folder / f"{number:02}.txt").write_text(caption, encoding="utf-8")
            continue
        picture.save(test / f"{number:02}.png")
        listed.append(json.dumps({"image": f"{folder.name}/{number:02}.png", "caption": caption}) + "\n")
    (test.parent / f"{folder.name}.jsonl").write_text("".join(listed), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="what draws the things (default: the embedded model)")
    args = parser.parse_args()

    plain = model_pictures(words(THINGS), args.out / "plain", args.model)
    tested, other = plain[1::2][:16], plain[::2]
    write(robots(), 6, args.out / "robot")
    write(gears(), len(COLORS), args.out / "gear")
    for style, effect, count in (("night", night, 16), ("stitch", stitch, 20), ("dusk", dusk, 12)):
        named = f"{{}} in {TRIGGER} {'colors' if style == 'dusk' else 'style'}"
        chosen = [*other[:count], *tested]
        write([(effect(p), named.format(caption)) for p, caption in chosen], count, args.out / style)
    write(model_pictures(words(OTHERS), args.out / "plain", args.model), 0, args.out / "prior")


if __name__ == "__main__":
    main()
