"""Draw pictures as on Delft tiles: dark blue lines, pale blue shapes, on white. Makes the data of style.toml.

    python examples/lora/delft.py --data examples/embedded/work/scenes --out examples/lora/work/data

Every second of the plain icons and shapes of examples/embedded is taken, one picture a thing, with its
captions. They do not name the style: with the LoRA everything is drawn in it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

SIZE = 128
GROUND, SHAPE, LINE = (255, 255, 255), (196, 216, 244), (20, 52, 140)


def delft(picture: Image.Image) -> Image.Image:
    """A picture on white in the style, ``SIZE`` pixels large; edges of color become lines."""
    picture = picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    doubled = np.asarray(picture.resize((2 * SIZE, 2 * SIZE)))
    edges = cv2.Canny(cv2.GaussianBlur(doubled, (0, 0), 1.5), 30, 80)
    edges = cv2.dilate(edges, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (6, 6)))
    lines = np.asarray(Image.fromarray(edges).resize(picture.size, Image.Resampling.BOX)) / 255
    subject = (255 - np.asarray(picture, np.float32)).max(2) > 25
    shape = cv2.GaussianBlur(subject.astype(np.float32), (0, 0), 0.7)
    drawn = np.broadcast_to(np.float32(GROUND), (*shape.shape, 3))
    for color, weight in ((SHAPE, shape), (LINE, lines)):
        drawn = drawn + (np.float32(color) - drawn) * weight[..., None]
    return Image.fromarray(drawn.round().astype(np.uint8))


def plain_pictures(data: Path) -> Iterator[tuple[Path, list[str]]]:
    """(file, captions) of the things, each once: ``scenes.py`` draws three of each, one after the other."""
    for line in (data / "plain.jsonl").read_text(encoding="utf-8").splitlines()[::3]:
        row = json.loads(line)
        yield data / row["image"], row["captions"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="what examples/embedded/scenes.py drew")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--every", type=int, default=2)
    args = parser.parse_args()

    (args.out / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for path, captions in list(plain_pictures(args.data))[:: args.every]:
        delft(Image.open(path)).save(args.out / "pictures" / path.name)
        rows.append({"image": f"pictures/{path.name}", "captions": captions})
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (args.out / "delft.jsonl").write_text(text, encoding="utf-8")
    print(f"{len(rows)} pictures in {args.out}")


if __name__ == "__main__":
    main()
