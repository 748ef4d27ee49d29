"""What the fast modes cost: each against the full run, with the embedded model, by ``hydit compare``.

    python benchmarks/fast.py                       # all sets, hours
    python benchmarks/fast.py forecast --prompts 16   # one set, every fourth prompt

Pictures are kept in outputs/fast, so a run that broke off goes on, and one with more prompts draws only the
new ones. Each set leaves docs/fast/SET.json (the sides' figures) and docs/fast/SET.png (worst and median
pairs); the pages are in outputs/fast/SET. Then

    python benchmarks/fast_pages.py

puts their tables into docs/fast.md and docs/zh/fast.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ROOT / "examples/compare/prompts.txt"
JUDGE = ROOT / "examples/embedded/judge.py:right"
SHAPES = ("128x128", "160x96", "96x160")
MODEL = ROOT / "hydit_core/assets/hydit-icons-128.safetensors"
TURBO = ROOT / "hydit_core/assets/lora/hydit-icons-128-turbo.safetensors"
FORMATS = ("int8_convrot", "fp8_scaled")


@dataclass(frozen=True)
class EvidenceSet:
    """One comparison: the sides' options by letter, the first being the reference; with a noise floor?"""

    sides: dict[str, str]
    floor: bool = False


def sets(out: Path) -> dict[str, EvidenceSet]:
    """All sets; quantised files are in ``out``."""
    long = "--sampler dpmpp_2m --steps"
    ddpm = "--sampler ddpm --steps 50"
    files = [f"--model '{out / name}.safetensors'" for name in FORMATS]
    return {
        # The yardstick is a run of 200 steps: 50 plain steps differ from it themselves.
        "forecast": EvidenceSet(
            {
                "a": f"{long} 200",
                "b": f"{long} 50",
                "c": f"{long} 50 --forecast safe",
                "d": f"{long} 50 --forecast fast",
                "e": "--peer-steps c",
                "f": "--peer-steps d",
            }
        ),
        # The same noise in both, so it is compared with the full run, and there is no peer.
        "forecast_ddpm": EvidenceSet(
            {"a": ddpm, "b": f"{ddpm} --forecast safe", "c": f"{ddpm} --forecast fast"}
        ),
        "cfg_end": EvidenceSet(
            {
                "a": "",
                "b": "--cfg-end 0.8",
                "c": "--cfg-end 0.6",
                "d": "--peer-steps b",
                "e": "--peer-steps c",
            }
        ),
        "quantised": EvidenceSet({"a": "", "b": files[0], "c": files[1]}, floor=True),
        "few_steps": EvidenceSet(
            {
                "a": "",
                "b": f"--lora '{TURBO}' --steps 8",
                "c": f"--lora '{TURBO}' --steps 4",
                "d": "--peer-steps b",
                "e": "--peer-steps c",
            },
            floor=True,
        ),
    }


def chosen_prompts(count: int, out: Path) -> Path:
    """Prompts spread evenly over the file, in both languages, as a file."""
    lines = PROMPTS.read_text("utf-8").splitlines()
    pairs = [lines[i : i + 2] for i in range(0, len(lines), 2)]  # English, Chinese
    wanted = max(1, count // 2)
    picked = [pairs[round(i * (len(pairs) - 1) / max(1, wanted - 1))] for i in range(wanted)]
    path = out / f"prompts-{2 * wanted}.txt"
    path.write_text("".join(f"{line}\n" for pair in picked for line in pair), "utf-8")
    return path


def quantise(out: Path) -> None:
    """Write the embedded model in each 8-bit format, unless it is there."""
    for name in FORMATS:
        if not (path := out / f"{name}.safetensors").exists():
            words = ["weights", "quantize", str(MODEL), "--format", name, "-o", str(path)]
            subprocess.run([sys.executable, "-m", f"hydit_core.{words[0]}", *words[1:]], cwd=ROOT, check=True)


def draw(name: str, one: EvidenceSet, prompts: Path, seeds: int, floor: str, out: Path) -> None:
    """Draw and compare one set."""
    words = ["--prompts", str(prompts), "--seeds", str(seeds), "--batch", str(seeds), "--size", *SHAPES]
    words += ["--judge", str(JUDGE), "--overwrite", "-o", str(out / name)]
    words += ["--noise-floor", floor] if one.floor else []
    for letter, text in one.sides.items():
        words += [f"--{letter}", text]
    subprocess.run([sys.executable, "-m", "hydit_core.compare", *words], cwd=ROOT, check=True)


def publish(name: str, out: Path, docs: Path) -> None:
    """Copy a set's figures, without those of single pairs, and its picture."""
    found = json.loads((out / name / "compare.json").read_text("utf-8"))
    found["pairs"] = len(found["pairs"])
    for side in found["sides"].values():
        # not the places of this machine
        side["given"] = side["given"].replace(f"{ROOT}/", "").replace(f"{out}/", "")
        side.pop("options", None)
        side.pop("files", None)
    docs.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, ensure_ascii=False, indent=1)
    (docs / f"{name}.json").write_text(f"{text}\n", "utf-8")
    with Image.open(out / name / "sheet.png") as sheet:  # 255 colors are enough to look at
        sheet.convert("RGB").quantize(255, dither=Image.Dither.NONE).save(docs / f"{name}.png", optimize=True)


def main() -> None:
    out = ROOT / "outputs/fast"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of: {', '.join(sets(out))}; default: all")
    parser.add_argument(
        "--prompts", type=int, default=64, help="how many, half in each language (default: 64)"
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--floor", default="bf16", help="the noise floor; bf16 takes a minute a picture on a CPU without it"
    )
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/fast")
    args = parser.parse_args()
    out = args.out.resolve()
    known = sets(out)
    if wrong := [name for name in args.sets if name not in known]:
        parser.error(f"no set {wrong[0]!r}, only: {', '.join(known)}")
    os.nice(10)
    out.mkdir(parents=True, exist_ok=True)
    prompts = chosen_prompts(args.prompts, out)
    for name in args.sets or known:
        if name == "quantised":
            quantise(out)
        draw(name, known[name], prompts, args.seeds, args.floor, out)
        publish(name, out, args.docs)


if __name__ == "__main__":
    main()
