"""What forecasts cost: pictures of fewer network calls against those of a run of 200 steps.

Draws prompts with the embedded model, by the command line's own pipeline, and compares float pictures:

* plain: ``dpmpp_2m`` in 16 to 50 steps, each against 200 steps of the same solver;
* forecast: 50 steps with several tolerances, against the same 200 steps, beside plain steps of as many calls;
* ddpm and ddim with noise: 50 steps with forecasts against 50 without, whose noise is the same;
* with a LoRA and with a ControlNet; 25 steps; guidance in a part of the run.

Errors are averaged as MSE over the prompts and given in dB below a picture's full range (PSNR). Pictures are
kept in --work, so that a run that was stopped goes on.

    python benchmarks/forecast.py --write docs/fast/forecast.json --guide

takes an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from report import machine, table, write_section
from torch import Tensor

import hydit_core
from hydit_core.control import ControlInput
from hydit_core.diffusion.forecast import FORECASTS
from hydit_core.embedded import embedded_controlnets, embedded_loras
from hydit_core.presets import RunSettings

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ROOT / "examples" / "embedded" / "ordinary_prompts.txt"
REFERENCE = 200
PLAIN = (50, *range(16, 37, 2), 40)
TOLERANCES = ("safe", "fast", 0.1, 0.002)


class Drawn(NamedTuple):
    """Pictures (prompts, 3, H, W) in 0..1, and the real calls that each prompt took."""

    pixels: Tensor
    calls: list[int]


class Bench:
    """One pipeline and its prompts; draws what is not kept yet."""

    def __init__(self, work: Path, prompts: list[str], adapt: str = "", first_seed: int = 0) -> None:
        self.work = work
        self.prompts = prompts
        self.first_seed = first_seed
        self.adapt = adapt
        self.pipe: Any = None

    def _load(self) -> None:
        self.pipe = hydit_core.load(device="cpu", dtype="float32")
        self.controls = []
        if self.adapt == "lora":
            self.pipe.load_lora(embedded_loras()[0])
        if self.adapt == "controlnet":
            net, _ = hydit_core.load_controlnet(embedded_controlnets()[0], dtype=torch.float32)
            self.controls = [ControlInput(net.eval(), outline())]

    def draw(
        self, steps: int = 50, forecast: str | float = "off", cfg_end: float = 1.0, **given: Any
    ) -> Drawn:
        """Every prompt by itself, as someone who draws one picture would, prompt i from seed i."""
        eta = given.pop("eta", None)
        kind = self.adapt or ("other" if self.first_seed else "plain")
        key = "-".join(map(str, (kind, steps, forecast, cfg_end, eta, *given.values())))
        path = self.work / f"{key}-{len(self.prompts)}.pt"
        if not path.exists():
            if self.pipe is None:
                self._load()
            run = RunSettings(
                self.pipe.settings(steps=steps, **given), eta=eta, forecast=forecast, cfg_end=cfg_end
            )
            drawn = [
                next(self.pipe.pictures([prompt], run, seed=seed, controls=self.controls))
                for seed, prompt in enumerate(self.prompts, self.first_seed)
            ]
            pixels = torch.stack([picture.pixels for picture in drawn])
            torch.save((pixels, [picture.real_calls for picture in drawn]), path)
        return Drawn(*torch.load(path, weights_only=True))


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

    save("dpmpp_2m, 50 steps, against 200", against(reference, plain, ("off", *TOLERANCES)))
    # Patterns and tolerances were chosen by looking at the pictures above: here are others.
    rest = [prompt for prompt in prompts(2 * count) if prompt not in plain.prompts][: count // 2]
    other = Bench(work, rest, first_seed=1000)
    rows = against(other.draw(REFERENCE), other, ("off", "safe", "fast"))
    save("other prompts and seeds, against 200", rows)
    full = plain.draw(sampler="ddpm")
    save("ddpm, 50 steps, against all calls", against(full, plain, ("safe", "fast"), sampler="ddpm"))
    few = prompts(max(1, count // 3))
    for adapt in ("lora", "controlnet"):
        bench = Bench(work, few, adapt)
        save(f"with a {adapt}, 50 steps, against all calls", against(bench.draw(), bench, ("safe", "fast")))
    save("plain steps, against 200", [compared(plain.draw(steps), reference) for steps in PLAIN])
    save("25 steps, against 200", against(reference, plain, ("off", "safe", "fast"), steps=25))
    rows = [{"cfg_end": end, **compared(plain.draw(cfg_end=end), plain.draw())} for end in (0.8, 0.6, 0.4)]
    save("guidance in a part of 50 steps, against all of them", rows)
    given: dict[str, Any] = {"sampler": "ddim", "eta": 0.5}
    full = plain.draw(**given)
    save("ddim, eta 0.5, 50 steps, against all calls", against(full, plain, ("safe", "fast"), **given))


WORDS = {
    "head": (("drawn", "calls", "mean, dB", "worst, dB", "plain steps: mean, dB", "worst, dB"),
             ("画法", "调用次数", "平均（dB）", "最差（dB）", "同样次数的普通步：平均（dB）", "最差（dB）")),
    "dpmpp_2m, 50 steps, against 200": ("50 steps", "50 步"),
    "other prompts and seeds, against 200": ("other prompts, 50 steps", "另一些提示词，50 步"),
    "25 steps, against 200": ("25 steps", "25 步"),
    "ddpm, 50 steps, against all calls": ("ddpm, 50 steps ¹", "ddpm，50 步 ¹"),
    "with a lora, 50 steps, against all calls": ("with a LoRA ¹", "加 LoRA ¹"),
    "with a controlnet, 50 steps, against all calls": ("with a ControlNet ¹", "加 ControlNet ¹"),
}  # fmt: skip
"""Of the guides' table, in English and Chinese."""


def guide_table(told: dict[str, Any], language: int) -> str:
    """The table of docs/fast.md (language 0) and docs/zh/fast.md (1)."""
    plain = {row["calls"]: row for row in told.get("plain steps, against 200", [])}
    rows = []
    for name, said in list(WORDS.items())[1:]:
        for row in told.get(name, []):
            count = min((calls for calls in plain if calls >= row["calls"]), default=None)
            peer = plain[count] if count and count < 50 and name.startswith("dpmpp_2m") else None
            rows.append(
                [
                    f"{said[language]}, `{row['forecast']}`",
                    f"{row['calls']:g}",
                    f"{row['mean_dB']:.1f}",
                    f"{row['worst_dB']:.1f}",
                    f"{peer['mean_dB']:.1f} ({count:g})" if peer else "",
                    f"{peer['worst_dB']:.1f}" if peer else "",
                ]
            )
    return table(WORDS["head"][language], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--work", type=Path, default=Path("outputs/forecast"))
    parser.add_argument("--write", type=Path, metavar="FILE", help="JSON")
    parser.add_argument(
        "--guide", action="store_true", help="write the tables of docs/fast.md, in both languages"
    )
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
    if args.guide:
        for language, page in enumerate((ROOT / "docs" / "fast.md", ROOT / "docs" / "zh" / "fast.md")):
            write_section(page, "forecast", guide_table(told, language))


if __name__ == "__main__":
    main()
