"""Measure what an IP-Adapter of the small model does, against its weight.

    python likeness.py work/ip_adapter/ip_adapter.safetensors --encoder work/vision/image_encoder.safetensors

Each thing's picture is the prompt, with its own caption, with none, and with the caption of another thing;
and pictures of colored things with a caption that says another thing and no color, in pairs that the training
did not have. What was drawn is named as ``judge.py`` does it, so place and size do not count. ``distance``
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
from icons import HERE
from judge import references, spread
from looks import signature
from PIL import Image
from scenes import Icons, draw, standard
from things import Thing, read_things

import hydit_core
from hydit_core.image_prompts.encoder import encoder_beside, load_image_encoder
from hydit_core.image_prompts.run import ImagePrompt
from hydit_core.weights.load import load_ip_adapter

WORK = HERE / "work"
PLAIN = 3
"""Pictures of each thing in ``plain.jsonl``, one after the other."""


@dataclass(frozen=True)
class Case:
    """A prompt picture with a caption, of ``asked`` if it says something."""

    group: str
    shown: Thing
    caption: str
    asked: Thing | None

    def right(self, drawn: Image.Image) -> tuple[bool, bool]:
        """Whether the picture, and the text, are in what was drawn."""
        look = references()
        if self.group == "color" and self.asked is not None:
            named = {thing.id: thing for thing in look.things}[look.name(drawn)]
            return named.color == self.shown.color, named.name == self.asked.name
        by_text = self.asked is not None and look.is_nearest(drawn, self.asked)
        return look.is_nearest(drawn, self.shown), by_text


def cases(trained: list[Thing], count: int, known: set[tuple[str, str]]) -> Iterator[Case]:
    things = spread(trained, count)
    for thing, other in zip(things, [*things[count // 2 :], *things[: count // 2]], strict=True):
        yield Case("own", thing, _caption(thing), thing)
        yield Case("none", thing, "", None)
        yield Case("another", thing, _caption(other), other)
    colored = [thing for thing in trained if thing.id in references().tinted]
    pairs = [
        (shown, asked)
        for shown in colored
        for asked in colored
        if shown.color == asked.color and shown.name != asked.name and (asked.id, shown.id) not in known
    ]
    for i in range(count):
        shown, asked = pairs[round(i * (len(pairs) - 1) / max(1, count - 1))]
        yield Case("color", shown, asked.name, asked)


def _caption(thing: Thing) -> str:
    return f"{thing.color} {thing.name}".strip()


def known_pairs(trained: list[Thing], colors: Path) -> set[tuple[str, str]]:
    """Ids of (thing, thing of its prompt picture) that the training had."""

    def drawn(name: str) -> str:
        return trained[int(Path(name).stem.removeprefix("plain-")) // PLAIN].id

    rows = [json.loads(line) for line in colors.read_text("utf-8").splitlines()]
    return {(drawn(row["image"]), drawn(row["image_prompt"])) for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--encoder", type=Path, help="default: the one in or beside the adapter's file")
    parser.add_argument("--model", type=Path, help="default: the model that comes with hydit")
    parser.add_argument("--icons", type=Path, default=WORK / "icons.zip", help="what scenes.py icons wrote")
    parser.add_argument("--data", type=Path, default=WORK / "scenes", help="what scenes.py draw wrote")
    parser.add_argument("--count", type=int, default=12, help="how many things")
    parser.add_argument("--groups", nargs="+", default=["own", "none", "another", "color"])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sheet", type=Path, help="write prompt pictures and results side by side here")
    args = parser.parse_args()

    trained = [thing for thing in read_things() if not thing.held_out]
    known = known_pairs(trained, args.data / "colors.jsonl")
    asked = [case for case in cases(trained, args.count, known) if case.group in args.groups]
    pipe = hydit_core.load(args.model, device="cpu")
    adapter = load_ip_adapter(args.adapter, dtype=pipe.dit.dtype)
    encoder = load_image_encoder(args.encoder or encoder_beside(args.adapter))
    icons = Icons(args.icons)
    pictures = [draw((standard(case.shown),), icons) for case in asked]
    columns = [pictures]
    for weight in args.weights:
        found: dict[str, list[tuple[float, bool, bool]]] = {}
        columns.append([])
        for case, shown in zip(asked, pictures, strict=True):
            given = [ImagePrompt(adapter, encoder, shown, weight)]
            (drawn,) = pipe(case.caption, steps=args.steps, seed=args.seed, images=given)
            columns[-1].append(drawn)
            distance = float(((signature(drawn) - signature(shown)) ** 2).mean() ** 0.5)
            found.setdefault(case.group, []).append((distance, *case.right(drawn)))
        for group, values in found.items():
            distances, by_picture, by_text = zip(*values, strict=True)
            record = {"caption": group, "weight": weight, "distance": round(float(np.mean(distances)), 4)}
            print(
                json.dumps({**record, "picture": sum(by_picture), "text": sum(by_text), "of": len(values)}),
                flush=True,
            )
    if args.sheet is not None:
        width, height = columns[-1][0].size
        sheet = Image.new("RGB", (width * len(columns), height * len(asked)))
        for x, column in enumerate(columns):
            for y, image in enumerate(column):
                sheet.paste(image.resize((width, height)), (x * width, y * height))
        sheet.save(args.sheet)


if __name__ == "__main__":
    main()
