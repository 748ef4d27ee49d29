"""How much of the encoding of pictures and captions a training hides behind its steps.

A LoRA of the embedded model is trained without caches, on pictures of noise; the model is slowed, by waiting
for a multiple of what encoding a micro-batch took, so that steps are the longer part. Encoding is seen as far
as a micro-batch is still being encoded when its step asks for it.

    python benchmarks/ahead.py --write docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from report import machine, publish, table

from hydit_core.embedded import embedded_model
from hydit_core.train import launch
from hydit_core.train.config import TrainConfig
from hydit_core.train.encoding import Prepared
from hydit_core.train.loop import Trainer

HEADER = (
    "a step waits, in times of encoding",
    "encoding, s a step",
    "a step, s",
    "encoding seen, s a step",
    "hidden",
    "waits for data, s a step",
)


class Slowed(Trainer):
    """A trainer whose model waits before each forward pass, and that notes when it encodes and asks."""

    times = 1.5
    spans: list[tuple[float, float]]
    asked: list[float]

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.spans, self.asked = [], []
        Slowed.last = self
        self.encoding.ahead = True
        encode = self.objective.inputs

        def inputs(*batch: Any) -> dict[str, Any]:
            begun = time.monotonic()
            found = encode(*batch)
            self.spans.append((begun, time.monotonic()))
            return found

        self.objective.inputs = inputs  # type: ignore[method-assign]
        self.objective.module.register_forward_pre_hook(self._wait)

    def _wait(self, *given: Any) -> None:
        begun, ended = self.spans[-1]
        time.sleep(self.times * (ended - begun))

    def _next(self, batches: Iterator[Prepared]) -> list[Prepared]:
        self.asked.append(time.monotonic())
        return super()._next(batches)

    last: Slowed


def settings(folder: Path, steps: int, batch: int) -> TrainConfig:
    """A run on pictures of noise, each with a caption of its own."""
    generator = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for number in range(batch * steps):
        noise = generator.integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "pictures" / f"{number}.png")
        (folder / "pictures" / f"{number}.txt").write_text(
            f"picture {number} of noise, in all colors", "utf-8"
        )
    return TrainConfig.model_validate(
        {
            "model": {"init_from": embedded_model()},
            "data": {"sources": [{"path": folder / "pictures"}], "resolution": 128},
            "objective": {"kind": "lora"},
            "run": {"output_dir": folder / "run", "steps": steps, "batch_size": batch, "device": "cpu"},
            "metrics": {"every": 1, "tensorboard": False},
            "schedule": {"warmup_steps": 0},
        }
    )


def measure(times: float, steps: int, batch: int) -> list[str]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        Slowed.times = times
        launch.Trainer = Slowed  # type: ignore[misc]
        launch.train(settings(folder, steps, batch))
        lines = (folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    waits = [record["data_wait"] for record in map(json.loads, lines) if "data_wait" in record][1:]
    run = Slowed.last
    pairs = [*zip(run.spans, run.asked, strict=True)][1:]  # nothing is computed before the first
    took = sum(end - begun for (begun, end), _ in pairs)
    seen = sum(max(0.0, end - max(begun, asked)) for (begun, end), asked in pairs)
    each = (run.asked[-1] - run.asked[1]) / (len(pairs) - 1)
    values = (took / len(pairs), each, seen / len(pairs))
    return [
        f"{times:g}",
        *(f"{value:.3f}" for value in values),
        f"{1 - seen / took:.1%}",
        f"{sum(waits) / len(waits):.4f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--times", nargs="+", type=float, default=[1.5, 3.0], help="how long a step waits")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2, help="pictures a step")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the section of this document")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for times in args.times:
        rows.append(measure(times, args.steps, args.batch))
        print(*rows[-1], flush=True)
    setting = (
        f"LoRA of the embedded model at 128 px, {args.batch} pictures a step, {args.steps} steps, no caches, "
        "one thread; a step is slowed by waiting. What is encoded before its step asks for it is hidden."
    )
    text = f"{setting}\n\n{table(HEADER, rows)}\n\nMachine: {machine()}."
    publish(args.write, "ahead", "Encoding behind the steps", text)


if __name__ == "__main__":
    main()
