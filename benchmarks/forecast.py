"""What forecasts cost: pictures of fewer network calls against those of a run of 200 steps.

Draws prompts with the embedded model, by the command line's own pipeline, and compares float pictures:

* plain: ``dpmpp_2m`` in 16 to 50 steps, each against 200 steps of the same solver;
* forecast: 50 steps with many tolerances, against the same 200 steps, beside plain steps of as many calls;
* ddpm and ddim with noise: 50 steps with forecasts against 50 without, whose noise is the same; for ddpm the
  share of right pictures, too;
* with a LoRA and with a ControlNet; 25 steps; guidance in a part of the run.

Errors are averaged as MSE over the prompts and given in dB below a picture's full range (PSNR). Pictures are
drawn several at a time, with a guard of its own for each, as if it were drawn alone. They are kept in --work,
so that a run that was stopped goes on.

    python benchmarks/forecast.py --write docs/fast/forecast_counts.json
    python benchmarks/fast_pages.py

The first takes an hour and a half on one core, the second puts its tables into docs/fast.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from report import machine
from torch import Tensor

import hydit_core
from hydit_core.compare.judge import load_judge
from hydit_core.control import ControlInput
from hydit_core.diffusion.forecast import FORECASTS, Forecaster
from hydit_core.embedded import ASSETS, embedded_controlnets
from hydit_core.images import to_image
from hydit_core.model.dit import Context
from hydit_core.presets import RunSettings

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ROOT / "examples" / "embedded" / "ordinary_prompts.txt"
JUDGED = ROOT / "examples" / "compare" / "prompts.txt"
JUDGE = f"{ROOT / 'examples' / 'embedded' / 'judge.py'}:right"
STYLE = ASSETS / "lora" / "hydit-icons-128-delft.safetensors"
REFERENCE = 200
PLAIN = (50, *range(16, 41))
TOLERANCES = ("safe", "fast", 0.1, 0.03, 0.015, 0.01, 0.004, 0.003, 0.002, 0.001)
TOGETHER = 8
"""Pictures a batch."""


class Drawn(NamedTuple):
    """Pictures (prompts, 3, H, W) in 0..1, and the real calls that each prompt took."""

    pixels: Tensor
    calls: list[int]


class Each:
    """A :class:`Forecaster` for each picture of a batch: they share the network's calls, but no decision."""

    def __init__(self, forecaster: Forecaster, count: int) -> None:
        self.model = forecaster.model
        self.each = [copy.copy(forecaster) for _ in range(count)]
        self.calls = self.real = 0  # of a batch, which has no one number

    def __call__(self, x: Tensor, sigma: Tensor, *, context: Context, **extra: Any) -> Tensor:
        rows = [row for row, one in enumerate(self.each) if asks(one, x[row, None], sigma[row, None])]
        found: dict[int, Tensor] = {}
        if rows:
            halves = range(0, len(context[0]), len(x))  # the negative prompts', the prompts'
            index = [half + row for half in halves for row in rows]
            some = Context(*(part[index] for part in context))
            found = dict(zip(rows, self.model(x[rows], sigma[rows], context=some, **extra), strict=True))
        answers = []
        for row, one in enumerate(self.each):
            one.model = lambda *_, row=row, **__: found[row][None]
            answers.append(one(x[row, None], sigma[row, None]))
        return torch.cat(answers)


class Asked(Exception):
    """A forecaster calls its model."""


def asks(forecaster: Forecaster, x: Tensor, sigma: Tensor) -> bool:
    """Whether this call would be real; the forecaster stays as it is."""

    def ask(*_: Any, **__: Any) -> Tensor:
        raise Asked

    probe = copy.copy(forecaster)
    probe.model = ask
    try:
        probe(x, sigma)
    except Asked:
        return True
    return False


class Bench:
    """One pipeline and its prompts; draws what is not kept yet. ``kind`` names it among kept pictures."""

    def __init__(self, work: Path, prompts: list[str], kind: str = "plain", first_seed: int = 0) -> None:
        self.work = work
        self.prompts = prompts
        self.first_seed = first_seed
        self.kind = kind
        self.pipe: Any = None

    def _load(self) -> None:
        self.pipe = hydit_core.load(device="cpu", dtype="float32")
        self.controls = []
        if self.kind == "lora":
            self.pipe.load_lora(STYLE)
        if self.kind == "controlnet":
            net, _ = hydit_core.load_controlnet(embedded_controlnets()[0], dtype=torch.float32)
            self.controls = [ControlInput(net.eval(), outline())]

    def draw(
        self, steps: int = 50, forecast: str | float = "off", cfg_end: float = 1.0, **given: Any
    ) -> Drawn:
        """Every prompt by itself, as someone who draws one picture would, prompt i from seed i."""
        eta = given.pop("eta", None)
        key = "-".join(map(str, (self.kind, steps, forecast, cfg_end, eta, *given.values())))
        path = self.work / f"{key}-{len(self.prompts)}.pt"
        if not path.exists():
            if self.pipe is None:
                self._load()
            run = RunSettings(
                self.pipe.settings(steps=steps, **given), eta=eta, forecast=forecast, cfg_end=cfg_end
            )
            # What a ControlNet is given belongs to a whole batch.
            size = 1 if self.controls else TOGETHER
            groups = [
                self._together(self.prompts[at : at + size], run, self.first_seed + at)
                for at in range(0, len(self.prompts), size)
            ]
            pixels = torch.cat([group.pixels for group in groups])
            torch.save((pixels, [calls for group in groups for calls in group.calls]), path)
        return Drawn(*torch.load(path, weights_only=True))

    def _together(self, prompts: list[str], run: RunSettings, seed: int) -> Drawn:
        """One batch of several prompts, each with a guard of its own."""
        made: list[Each] = []
        denoiser = self.pipe._denoiser

        def with_guards(run: RunSettings, sigmas: Tensor) -> Each:
            made.append(Each(denoiser(run, sigmas), len(prompts)))
            return made[-1]

        self.pipe._denoiser = with_guards
        try:
            each = [(seed + i, run.sampling.negative) for i in range(len(prompts))]
            pictures = list(self.pipe.pictures(prompts, run, controls=self.controls, each=each))
        finally:
            self.pipe._denoiser = denoiser
        return Drawn(torch.stack([one.pixels for one in pictures]), [one.real for one in made[0].each])


def outline() -> Image.Image:
    """A control picture: the edge of a circle."""
    picture = Image.new("RGB", (128, 128))
    ImageDraw.Draw(picture).ellipse((24, 24, 104, 104), outline="white")
    return picture


def decibels(mse: Tensor | float) -> float:
    return round(-10 * math.log10(max(float(mse), 1e-12)), 2)


def compared(drawn: Drawn, reference: Drawn) -> dict[str, Any]:
    """The error of the mean and of the worst 5 % of the prompts (at least one), in dB, and the mean calls."""
    errors = (drawn.pixels - reference.pixels).square().mean((1, 2, 3)).sort(descending=True).values
    worst = errors[: max(1, round(len(errors) * 0.05))]
    return {
        "calls": round(sum(drawn.calls) / len(drawn.calls), 1),
        "mse": float(f"{errors.mean():.4g}"),
        "mean_dB": decibels(errors.mean()),
        "median_dB": decibels(errors.median()),
        "worst_dB": decibels(worst.mean()),
    }


def prompts(count: int) -> list[str]:
    lines = PROMPTS.read_text(encoding="utf-8").split("\n")[:-1]
    return [lines[i * len(lines) // count] for i in range(count)]


def measure(work: Path, count: int, save: Any) -> None:
    """All comparisons; ``save(name, rows)`` after each."""
    plain = Bench(work, prompts(count))
    reference = plain.draw(REFERENCE)

    def against(reference: Drawn, bench: Bench, forecasts: Any, **given: Any) -> list[dict[str, Any]]:
        return [
            {"forecast": forecast, **compared(bench.draw(forecast=forecast, **given), reference)}
            for forecast in forecasts
        ]

    save("plain steps, against 200", [compared(plain.draw(steps), reference) for steps in PLAIN])
    save("dpmpp_2m, 50 steps, against 200", against(reference, plain, ("off", *TOLERANCES)))
    save("40 steps, against 200", against(reference, plain, (0.1,), steps=40))
    # Patterns and tolerances were chosen by looking at the pictures above: here are others.
    rest = [prompt for prompt in prompts(2 * count) if prompt not in plain.prompts][: count // 2]
    other = Bench(work, rest, "other", first_seed=1000)
    rows = against(other.draw(REFERENCE), other, ("off", "safe", "fast"))
    save("other prompts and seeds, against 200", rows)
    few = prompts(max(1, count // 3))
    for kind in ("lora", "controlnet"):
        bench = Bench(work, few, kind)
        reference_here = bench.draw(REFERENCE)
        rows = against(reference_here, bench, ("off", "safe", "fast"))
        save(f"with a {kind}, 50 steps, against 200", rows)
        rows = [compared(bench.draw(steps), reference_here) for steps in (24, 30)]
        save(f"with a {kind}, plain steps, against 200", rows)
    full = plain.draw(sampler="ddpm")
    save("ddpm, 50 steps, against all calls", against(full, plain, ("safe", "fast"), sampler="ddpm"))
    for eta in (1.0, 0.5):
        given: dict[str, Any] = {"sampler": "ddim", "eta": eta}
        full = plain.draw(**given)
        rows = against(full, plain, ("safe", "fast"), **given)
        save(f"ddim, eta {eta:g}, 50 steps, against all calls", rows)
    save("25 steps, against 200", against(reference, plain, ("off", "safe", "fast"), steps=25))
    rows = [{"cfg_end": end, **compared(plain.draw(cfg_end=end), plain.draw())} for end in (0.8, 0.6, 0.4)]
    save("guidance in a part of 50 steps, against all of them", rows)
    save("ddpm, 50 steps, drawn right", judged(work))


def judged(work: Path) -> list[dict[str, Any]]:
    """How many prompts of things that the model was taught ddpm draws right, in both languages."""
    right = load_judge(JUDGE)
    bench = Bench(work, JUDGED.read_text(encoding="utf-8").split("\n")[:-1], "judged")
    rows = []
    for forecast in ("off", "safe", "fast"):
        drawn = bench.draw(forecast=forecast, sampler="ddpm")
        found = [right(to_image(one), text) for one, text in zip(drawn.pixels, bench.prompts, strict=True)]
        calls = round(sum(drawn.calls) / len(drawn.calls), 1)
        rows.append({"forecast": forecast, "calls": calls, "right": sum(map(bool, found)), "of": len(found)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--work", type=Path, default=Path("outputs/forecast"))
    parser.add_argument("--write", type=Path, metavar="FILE", help="JSON")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {"prompts": args.prompts, "presets": FORECASTS, "machine": machine()}

    def save(name: str, rows: list[dict[str, Any]]) -> None:
        told[name] = rows
        print(name, *rows, sep="\n  ", flush=True)
        if args.write:
            args.write.parent.mkdir(parents=True, exist_ok=True)
            args.write.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")

    measure(args.work, args.prompts, save)


if __name__ == "__main__":
    main()
