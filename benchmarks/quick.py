"""`train quick` against AdamW with settings by hand: learning rate x rank x steps, on five small data sets.

    python examples/quick/draw.py --out examples/quick/work/data
    python benchmarks/quick.py run
    python benchmarks/quick.py table

``run`` trains on every set of examples/quick, with every seed, as `train quick` chooses, and then every pair
of learning rate and rank, with the same pictures held out, constant learning rate and the same averages; that
run's steps are those at which validation is lowest, and it ends after as many steps without a lower one as
quick does. A line of the log is one run; what is in it already is not run again, and a run that was
interrupted goes on. It takes hours; --sets, --seeds, --rates and --ranks make it smaller.

Test pictures are seen by neither: their loss, at 16 timesteps each with fixed noise, is that of the weights
that each run keeps as its best. ``table`` prints (base - quick) / (base - best of the grid), where the grid's
best is the run with the lowest validation loss, and how often quick took more steps than that. ``prior`` is
the loss on what the model itself draws, which grows as it forgets.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hydit_core.train import distributed
from hydit_core.train.config import TrainConfig, checked
from hydit_core.train.launch import open_data, prepare_data, train, with_posterior
from hydit_core.train.objectives.table import make_objective
from hydit_core.train.parts import build
from hydit_core.train.quick.plan import plan
from hydit_core.train.quick.wish import Wish
from hydit_core.train.validation import validate
from hydit_core.untrusted import parse_toml

ROOT = Path(__file__).resolve().parents[1]
SETS = {"robot": "subject", "night": "style", "stitch": "style", "dusk": "concept", "gear": "concept"}
RATES, RANKS, SEEDS = (3e-4, 1e-3, 3e-3, 1e-2), (4, 16, 32), (0, 1, 2)
GRID_STEPS, EVERY, DRAWS = 300, 10, 16


def planned(name: str, data: Path, out: Path, model: Path | None) -> dict[str, Any]:
    """What quick chooses, as a table; without sample and prior pictures, which change nothing."""
    wish = Wish(data / name, "ohwx", model, SETS[name], out, device="cpu")
    table = parse_toml(plan(wish).toml, name)
    table["samples"]["every"] = 0
    table.get("validation", {}).pop("prior", None)
    table["data"]["cache"]["dir"] = str(out.parent / "cache")
    table["run"]["threads"] = 1
    table["metrics"] = {"tensorboard": False}
    return table


def by_hand(table: dict[str, Any], lr: float, rank: int, steps: int) -> dict[str, Any]:
    """The same with AdamW, a learning rate, a rank and so many steps, of the pictures alone."""
    changed = {**table, "optimizer": {"lr": lr}, "schedule": {"warmup_steps": 10}}
    changed["data"] = {key: value for key, value in table["data"].items() if key != "prior"}
    changed["lora"] = {**table["lora"], "rank": rank}
    changed["run"] = {**table["run"], "steps": steps}
    share = table["data"].get("prior", {}).get("share", 0.0)  # without which an epoch has fewer steps
    patience = table["validation"]["patience"] / (1 - share)
    changed["validation"] = {**table["validation"], "every": EVERY, "patience": patience}
    changed["validation"] |= {"min_epochs": 0.0, "min_improvement": 0.0}
    return changed


def test_loss(table: dict[str, Any], lora: Path | None, rows: Path, out: Path) -> float:
    """The loss of a LoRA, or of the base, on pictures that were not trained."""
    asked = {**table, "data": {**table["data"]}, "lora": {**table["lora"]}}
    apart = {"path": str(rows), "prior": True, "validation": True}
    asked["data"] |= {"sources": [*table["data"]["sources"], apart], "validation": 0}
    asked["validation"] = asked["checkpoint"] = {}
    if lora is not None:
        asked["lora"]["init_from"] = str(lora)
    config = checked(asked, out / "quick.toml")
    processes = distributed.start("cpu", config.run.answer_within)
    data, parts = open_data(config), build(config)
    prepare_data(config, data, parts, processes)
    config = with_posterior(config, data, parts, processes, lambda text: None)
    found = validate(
        make_objective(config, parts, processes.device),
        data,
        processes,
        contextlib.nullcontext,
        count=DRAWS,
        sample_posterior=config.data.posterior == "sample",
    )
    return found["val_prior_loss"]


def run_one(table: dict[str, Any], out: Path, data: Path, name: str) -> dict[str, Any]:
    """Train, or go on, and measure the best that the run kept."""
    config: TrainConfig = checked(table, out / "quick.toml")
    drawn = out.parent / "drawn"  # by the base, the same in all runs
    if drawn.exists():
        shutil.copytree(drawn, out, dirs_exist_ok=True)
    begun = time.process_time()
    if not train(config, resume="auto"):
        raise SystemExit("interrupted: the same command goes on")
    seconds = time.process_time() - begun
    best = out / "best.safetensors"
    lora = best if best.is_file() else out / "lora.safetensors"
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    looks = [(r["val_loss_ema"], r["step"]) for r in records if "val_loss_ema" in r]
    val, step = min(looks) if looks else (None, records[-1]["step"])
    found = {
        "best_step": step,
        "steps": records[-1]["step"],
        "val": val,
        "test": test_loss(table, lora, data / "test" / f"{name}.jsonl", out),
        "prior": test_loss(table, lora, data / "test" / "prior.jsonl", out),
        "cpu_seconds": round(seconds),
        "curve": [[step, loss] for loss, step in looks],
    }
    shutil.rmtree(out / "checkpoints")
    for folder in out.glob("prior-*"):
        shutil.copytree(folder, drawn / folder.name, dirs_exist_ok=True)
    return found


def jobs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What identifies a run, in the order in which a log that is not complete says most."""
    for seed in options.seeds:
        for name in options.sets:
            yield {"set": name, "seed": seed, "kind": "quick"}
        for lr in options.rates:
            for rank in options.ranks:
                for name in options.sets:
                    yield {"set": name, "seed": seed, "kind": "grid", "lr": lr, "rank": rank}


def run(options: argparse.Namespace) -> None:
    """Every job that the log lacks."""
    torch.set_num_threads(1)
    done = [json.loads(line) for line in _lines(options.log)]
    bases = {record["set"]: record for record in done if record["kind"] == "base"}
    for job in jobs(options):
        name = job["set"]
        out = options.work / "-".join(str(value) for value in job.values())
        if any(job.items() <= record.items() for record in done):
            continue
        table = planned(name, options.data, out, options.model)
        if name not in bases:
            losses = {
                kind: test_loss(table, None, options.data / "test" / f"{rows}.jsonl", out)
                for kind, rows in (("test", name), ("prior", "prior"))
            }
            bases[name] = {"set": name, "kind": "base", **losses}
            _add(options.log, bases[name])
        table["run"]["seed"] = job["seed"]
        if job["kind"] == "grid":
            table = by_hand(table, job["lr"], job["rank"], options.steps)
        _add(options.log, {**job, **run_one(table, out, options.data, name)})


def table(log: Path) -> str:
    """The result in Markdown, of what the log holds."""
    records = [json.loads(line) for line in _lines(log)]
    lines = [
        "| set | seed | base | quick | best of the grid | runs | share | steps | grid's | prior, after |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for quick in (r for r in records if r["kind"] == "quick"):
        same = [r for r in records if r["kind"] == "grid" and all(r[k] == quick[k] for k in ("set", "seed"))]
        base = next(r for r in records if r["kind"] == "base" and r["set"] == quick["set"])
        if not same:
            continue
        best = min(same, key=lambda r: r["val"])
        share = (base["test"] - quick["test"]) / (base["test"] - best["test"])
        lines.append(
            f"| {quick['set']} | {quick['seed']} | {base['test']:.4f} | {quick['test']:.4f} | "
            f"{best['test']:.4f} (lr {best['lr']:g}, rank {best['rank']}) | {len(same)} | {share:.2f} | "
            f"{quick['steps']} | {best['best_step']} | {base['prior']:.4f}, {quick['prior']:.4f} |"
        )
    return "\n".join(lines)


def _lines(log: Path) -> list[str]:
    return log.read_text("utf-8").splitlines() if log.exists() else []


def _add(log: Path, record: dict[str, Any]) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k != "curve"}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--data", type=Path, default=ROOT / "examples/quick/work/data")
    parser.add_argument("--work", type=Path, default=ROOT / "examples/quick/work/runs")
    parser.add_argument("--log", type=Path, default=ROOT / "examples/quick/log.jsonl")
    parser.add_argument("--model", type=Path, help="default: the embedded model")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=[*SETS])
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--steps", type=int, default=GRID_STEPS, help="of a run of the grid")
    options = parser.parse_args()
    options.data, options.work = options.data.resolve(), options.work.resolve()  # configurations name them
    if options.command == "run":
        run(options)
    else:
        print(table(options.log))


if __name__ == "__main__":
    main()
