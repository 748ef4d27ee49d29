"""How a style LoRA changes pictures with its strength, on things that its training never saw.

    python examples/lora/evaluate.py LORA.safetensors --data examples/embedded/work/scenes

Printed for each strength, over the same prompts and seed:

* ``style``: distance of the pictures to the training's. Both sets are described by mean and covariance of the
  colors of their 3 x 3 patches at 64 x 64 pixels (27 numbers a patch, in 0..1); the distance is Fréchet's.
* ``plain``: the same, to the plain icons that the style was made from.
* ``subject``: intersection over union of the silhouettes with those of strength 0, and, for comparison, with
  those of the next prompt. A silhouette is what differs from the color of the picture's border.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from delft import delft, plain_pictures
from PIL import Image

import hydit_core


def patches(pictures: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """Mean (27,) and covariance (27, 27) of the pictures' patches."""
    found = []
    for picture in pictures:
        small = np.asarray(picture.convert("RGB").resize((64, 64), Image.Resampling.BOX)) / 255
        windows = np.lib.stride_tricks.sliding_window_view(small, (3, 3), axis=(0, 1))
        found.append(windows.reshape(-1, 27))
    rows = np.concatenate(found)
    return rows.mean(0), np.cov(rows.T)


def frechet(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> float:
    """Fréchet distance of two normal distributions."""
    (m1, c1), (m2, c2) = one, other
    roots = np.sqrt(np.linalg.eigvals(c1 @ c2).astype(complex)).real.sum()
    return float(np.sqrt(max(((m1 - m2) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * roots, 0)))


def silhouette(picture: Image.Image) -> np.ndarray:
    """What differs from the border's most usual color by more than a tenth."""
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.abs(pixels - np.median(border, 0)).max(2) > 25


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / max(1, (one | other).sum()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lora", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="what examples/embedded/scenes.py drew")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5])
    parser.add_argument("--count", type=int, default=24, help="how many prompts")
    parser.add_argument("--sheet", type=Path, help="write every second prompt here, one column a strength")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    things = list(plain_pictures(args.data))
    trained = [Image.open(path) for path, _ in things[::2]]
    plain, style = patches(trained), patches([delft(picture) for picture in trained])
    unseen = [thing for i, thing in enumerate(things) if i % 6 == 3]
    prompts = [captions[0] for _, captions in unseen[:: max(1, len(unseen) // args.count)][: args.count]]

    columns: list[list[Image.Image]] = []
    for strength in args.strengths:
        pipe = hydit_core.load(device="cpu")
        if strength:
            pipe.load_lora(args.lora, strength)
        settings = pipe.settings()
        columns.append(
            [p.image for prompt in prompts for p in pipe.pictures([prompt], settings, seed=args.seed)]
        )
        shapes = [silhouette(picture) for picture in columns[-1]]
        first = [silhouette(picture) for picture in columns[0]]
        drawn = patches(columns[-1])
        record = {
            "strength": strength,
            "style": round(frechet(drawn, style), 4),
            "plain": round(frechet(drawn, plain), 4),
            "subject": round(float(np.mean([overlap(a, b) for a, b in zip(shapes, first, strict=True)])), 3),
            "another": round(
                float(np.mean([overlap(a, b) for a, b in zip(shapes, first[1:] + first[:1], strict=True)])), 3
            ),
            "pictures": len(prompts),
        }
        print(json.dumps(record), flush=True)
    if args.sheet is not None:
        rows = range(0, len(prompts), 2)
        width, height = columns[0][0].size
        sheet = Image.new("RGB", (width * len(rows), height * len(columns)))
        for y, column in enumerate(columns):
            for x, row in enumerate(rows):
                sheet.paste(column[row], (x * width, y * height))
        sheet.save(args.sheet)


if __name__ == "__main__":
    main()
