"""Measure how well pictures follow given edges, on pictures that the training never saw.

    python examples/controlnet/evaluate.py CONTROLNET.safetensors --config examples/controlnet/canny.toml

Edges of the drawn picture are compared with the control picture: an edge pixel counts as right if the other
picture has one within two pixels. The F1 score is printed for several strengths; strength 0 is what the
prompt alone gives. With ``--prompts other`` every picture's edges are drawn with the caption of another one,
so that only the ControlNet can know about them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from hydit_core import load
from hydit_core.control import ControlInput
from hydit_core.data.dataset import open_dataset
from hydit_core.images import canny
from hydit_core.layer_weights import LayerWeights
from hydit_core.train.config import load_config
from hydit_core.weights.load import load_controlnet

TOLERANCE = 2


def agreement(drawn: Image.Image, control: Image.Image) -> float:
    """F1 of the edges of ``drawn`` against ``control``, each within ``TOLERANCE`` pixels of the other's."""
    found, wanted = (np.asarray(picture.convert("L")) > 127 for picture in (canny(drawn), control))
    if not wanted.any() or not found.any():
        return 0.0
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * TOLERANCE + 1,) * 2)
    near_found, near_wanted = (cv2.dilate(e.astype(np.uint8), disk) > 0 for e in (found, wanted))
    precision, recall = near_wanted[found].mean(), near_found[wanted].mean()
    return 0.0 if precision + recall == 0 else float(2 * precision * recall / (precision + recall))


def held_out(config: Path, count: int) -> list[tuple[str, Image.Image]]:
    """(caption, control picture) of the configuration's validation pictures."""
    settings = load_config(config)
    data = open_dataset(settings.data, seed=0, batch_size=1)
    found = []
    for batch in data.validation_batches():
        assert batch.control is not None
        levels = ((batch.control[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        found.append((batch.captions[0], Image.fromarray(levels)))
    return found[:: max(1, len(found) // count)][:count]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("controlnet", type=Path)
    parser.add_argument(
        "--config", type=Path, required=True, help="of the training: names the held-out pictures"
    )
    parser.add_argument("--model", type=Path, help="default: the model that comes with hydit")
    parser.add_argument("--count", type=int, default=32, help="how many held-out pictures")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument(
        "--prompts", choices=("own", "other"), default="own", help="whose caption (default: %(default)s)"
    )
    parser.add_argument("--sheet", type=Path, help="write control pictures and results side by side here")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    pipe = load(args.model, device="cpu")
    net, _ = load_controlnet(args.controlnet, dtype=pipe.dit.dtype)
    pairs = held_out(args.config, args.count)
    if args.prompts == "other":
        half = len(pairs) // 2
        captions = [caption for caption, _ in pairs[half:] + pairs[:half]]
        pairs = [(caption, control) for caption, (_, control) in zip(captions, pairs, strict=True)]
    settings = pipe.settings()
    columns: list[list[Image.Image]] = [[control for _, control in pairs]]
    for strength in args.strengths:
        drawn = []
        for caption, control in pairs:
            steer = [ControlInput(net, control, LayerWeights.parse(strength))]
            drawn += [p.image for p in pipe.pictures([caption], settings, seed=args.seed, controls=steer)]
        scores = [agreement(image, control) for image, (_, control) in zip(drawn, pairs, strict=True)]
        record = {
            "prompts": args.prompts,
            "strength": strength,
            "f1": round(float(np.mean(scores)), 4),
            "pictures": len(scores),
        }
        print(json.dumps(record), flush=True)
        columns.append(drawn)
    if args.sheet is not None:
        width, height = columns[0][0].size
        sheet = Image.new("RGB", (width * len(columns), height * len(pairs)))
        for x, column in enumerate(columns):
            for y, image in enumerate(column):
                sheet.paste(image, (x * width, y * height))
        sheet.save(args.sheet)


if __name__ == "__main__":
    main()
