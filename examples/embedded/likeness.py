"""Measure what an IP-Adapter of the small model does, against its weight.

    python likeness.py work/ip_adapter/ip_adapter.safetensors --encoder work/vision/image_encoder.safetensors

Each thing's picture is the prompt, with its own caption, with none, and with the caption of another thing;
and pictures of colored things with a caption that says another thing and no color, in pairs that the training
did not have. What was drawn is named as ``evaluate.py`` does it, so place and size do not count. ``distance``
is the mean color distance to the prompt picture; ``picture`` and ``text`` are how often the name is what the
picture and the caption said (in the last group: the color, and the thing). Prints a line of JSON for each row
of the table; ``--sheet`` shows the pictures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from evaluate import References, chosen, signature
from icons import HERE, Concept, read_concepts
from PIL import Image

import hydit_core
from hydit_core.image_prompts.encoder import encoder_beside, load_image_encoder
from hydit_core.image_prompts.run import ImagePrompt
from hydit_core.weights.load import load_ip_adapter

DATA = HERE / "work" / "data"


@dataclass(frozen=True)
class Case:
    """A prompt picture with a caption, of ``asked`` if it says something."""

    group: str
    shown: Concept
    caption: str
    asked: Concept | None

    def right(self, drawn: Concept, references: References) -> tuple[bool, bool]:
        """Whether the picture, and the text, are in what was drawn."""
        if self.group == "color" and self.asked is not None:
            named = any(self.asked.thing in name.split() for name in drawn.english)
            return drawn.colour == self.shown.colour, named
        by_text = self.asked is not None and references.alike(drawn, self.asked)
        return references.alike(drawn, self.shown), by_text


def cases(concepts: list[Concept], count: int, trained: Path) -> Iterator[Case]:
    things = chosen(concepts, count)
    for thing, other in zip(things, [*things[count // 2 :], *things[: count // 2]], strict=True):
        yield Case("own", thing, thing.english[0], thing)
        yield Case("none", thing, "", None)
        yield Case("another", thing, other.english[0], other)
    rows = [json.loads(line) for line in trained.read_text("utf-8").splitlines()]
    known = {(Path(row["image"]).stem, Path(row["image_prompt"]).stem) for row in rows}
    colored = [c for c in concepts if c.colour and not c.held_out]
    pairs = [
        (shown, asked)
        for shown in colored
        for asked in colored
        if shown.colour == asked.colour and shown.thing != asked.thing and (asked.id, shown.id) not in known
    ]
    for i in range(count):
        shown, asked = pairs[round(i * (len(pairs) - 1) / max(1, count - 1))]
        yield Case("color", shown, asked.thing, asked)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--encoder", type=Path, help="default: the one in or beside the adapter's file")
    parser.add_argument("--model", type=Path, help="default: the model that comes with hydit")
    parser.add_argument("--data", type=Path, default=DATA, help="what prepare.py wrote")
    parser.add_argument("--count", type=int, default=12, help="how many things")
    parser.add_argument("--groups", nargs="+", default=["own", "none", "another", "color"])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sheet", type=Path, help="write prompt pictures and results side by side here")
    args = parser.parse_args()

    concepts = read_concepts()
    references = References(concepts)
    asked = [c for c in cases(concepts, args.count, args.data / "colors.jsonl") if c.group in args.groups]
    pipe = hydit_core.load(args.model, device="cpu")
    adapter = load_ip_adapter(args.adapter, dtype=pipe.dit.dtype)
    encoder = load_image_encoder(args.encoder or encoder_beside(args.adapter))
    pictures = [Image.open(args.data / "pictures" / f"{case.shown.id}.png").convert("RGB") for case in asked]
    columns = [pictures]
    for weight in args.weights:
        found: dict[str, list[tuple[float, bool, bool]]] = {}
        columns.append([])
        for case, shown in zip(asked, pictures, strict=True):
            given = [ImagePrompt(adapter, encoder, shown, weight)]
            (drawn,) = pipe(case.caption, steps=args.steps, seed=args.seed, images=given)
            columns[-1].append(drawn)
            distance = float(((signature(drawn) - signature(shown)) ** 2).mean() ** 0.5)
            right = case.right(references.nearest(drawn), references)
            found.setdefault(case.group, []).append((distance, *right))
        for group, values in found.items():
            distances, by_picture, by_text = zip(*values, strict=True)
            record = {"caption": group, "weight": weight, "distance": round(float(np.mean(distances)), 4)}
            print(
                json.dumps({**record, "picture": sum(by_picture), "text": sum(by_text), "of": len(values)}),
                flush=True,
            )
    if args.sheet is not None:
        width, height = pictures[0].size
        sheet = Image.new("RGB", (width * len(columns), height * len(asked)))
        for x, column in enumerate(columns):
            for y, image in enumerate(column):
                sheet.paste(image, (x * width, y * height))
        sheet.save(args.sheet)


if __name__ == "__main__":
    main()
