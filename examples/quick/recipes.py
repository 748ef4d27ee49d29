"""Train three of the data sets as `train quick` chooses, and draw what docs/recipes.md shows of them.

    python examples/quick/draw.py --out examples/quick/work/data
    python examples/quick/recipes.py --out examples/quick/work/recipes

Of each it makes the run (on one thread) and a sheet: recipe_KIND.png, two of the training pictures, then two
prompts without the LoRA and with that of several steps, all with one seed. It prints steps, time, memory and
losses. The last column of the subject's sheet is of a run on the robot alone.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

import hydit_core
from hydit_core.embedded import embedded_model
from hydit_core.train.config import checked
from hydit_core.train.launch import train
from hydit_core.train.quick.plan import plan
from hydit_core.train.quick.wish import Wish
from hydit_core.train.samples import contact_sheet
from hydit_core.untrusted import parse_toml


class Recipe(NamedTuple):
    """What is trained, and what is drawn with it at which steps, before the best."""

    name: str
    kind: str
    shown: tuple[int, int]
    prompts: tuple[str, str]
    steps: tuple[int, ...]


RECIPES = (
    Recipe("robot", "subject", (0, 3), ("ohwx on the right", "a monkey"), (15,)),
    Recipe("stitch", "style", (1, 4), ("a cat in ohwx style", "an apple in ohwx style"), (15, 30)),
    Recipe("dusk", "concept", (1, 4), ("a cat in ohwx colors", "an apple in ohwx colors"), (15, 30)),
)


def trained(recipe: Recipe, data: Path, out: Path, *, alone: bool = False) -> dict[str, Any]:
    """Make the run, or go on with it; what its records say."""
    wish = Wish(data / recipe.name, "ohwx", None, recipe.kind, out, device="cpu")
    table = parse_toml(plan(wish).toml, recipe.name)
    table["run"]["threads"] = 1
    table["samples"]["every"] = 0
    table["checkpoint"]["keep_every"] = table["validation"]["every"]
    if alone:
        table["data"].pop("prior")
    begun = time.process_time()
    if not (out / "lora.safetensors").exists() and not train(
        checked(table, out / "quick.toml"), resume="auto"
    ):
        raise SystemExit("interrupted: the same command goes on")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    looks = {r["step"]: r for r in records if "val_loss" in r}
    losses = {step: r.get("val_loss_ema", r["val_loss"]) for step, r in looks.items()}
    known = {step: r.get("val_prior_loss_ema", r.get("val_prior_loss")) for step, r in looks.items()}
    best = min(losses, key=lambda step: losses[step])
    last = [r for r in records if "seconds" in r][-1]
    return {
        "run": out.name,
        "steps": f"{max(r['step'] for r in records)} of at most {table['run']['steps']}, best {best}",
        "processor_seconds": round(time.process_time() - begun),
        "rss_mib": last["rss_mib"],
        "losses": {step: round(loss, 4) for step, loss in losses.items()},
        "known": {step: known[step] for step in (0, best)},
    }


def drawn(prompts: tuple[str, str], lora: Path | None) -> list[Image.Image]:
    pipeline = hydit_core.load(embedded_model(), device="cpu")
    if lora is not None:
        pipeline.load_lora(lora)
    return pipeline(list(prompts), steps=20, seed=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("examples/quick/work/data"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for recipe in RECIPES:
        run = options.out / recipe.name
        print(json.dumps(trained(recipe, options.data, run)), flush=True)
        files = [
            None,
            *(run / f"lora-{step:08d}.safetensors" for step in recipe.steps),
            run / "best.safetensors",
        ]
        if recipe.kind == "subject":
            alone = options.out / f"{recipe.name}-alone"
            print(json.dumps(trained(recipe, options.data, alone, alone=True)), flush=True)
            files.append(alone / "best.safetensors")
        pictures = sorted((options.data / recipe.name).glob("*.png"))
        columns = [[Image.open(pictures[i]).convert("RGB") for i in recipe.shown]]
        columns += [drawn(recipe.prompts, file) for file in files]
        sheet = contact_sheet([column[row] for row in (0, 1) for column in columns], len(columns))
        sheet.save(options.out / f"recipe_{recipe.kind}.png")


if __name__ == "__main__":
    main()
