"""A training of two processes under torchrun, one of which is killed (-9) again and again.

It has to end as one that nothing disturbed: weights, averages, optimizer states, exported model and records,
to the last bit.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import psutil

PARALLEL = ("ddp", "fsdp")
CONFIG = """
[model]
vae = "{embedded}"
text_encoders = "{embedded}"
[model.from_scratch]
hidden_size = 64
depth = 4
num_heads = 4
mlp_hidden = 128
{text}
[data]
sources = [{{ path = "{pictures}" }}]
resolution = 64
min_side = 32
cache = {{ latents = true, text = true }}
[run]
output_dir = "run"
steps = {steps}
batch_size = 2
threads = 1
device = "cpu"
answer_within = 120
[checkpoint]
every = 7
export_all_in_one = false
[metrics]
every = 1
tensorboard = false
"""
TEXT = ("text_dim", "text_len", "t5_dim", "t5_len", "t5_hidden", "pooled_dim", "pooler_heads")
"""What the DiT has to know of the embedded model's text encoders."""
_MEASURED = ("seconds", "data_wait", "data_share", "save_stall", "rss_mib", "device_peak_mib")
_LIMIT = 1800


class Running(Protocol):
    """A command with its processes."""

    process: Any

    def ended(self) -> bool: ...


def write_config(folder: Path, pictures: Path, steps: int) -> Path:
    """Of a small model, whose steps take some milliseconds."""
    from hydit_core.embedded import embedded_model
    from hydit_core.weights.bundle import bundle
    from hydit_core.weights.load import load_dit

    path, embedded = folder / "training.toml", embedded_model()
    dit = load_dit(bundle(embedded))[0].config.to_dict()
    text = "\n".join(f"{name} = {dit[name]}" for name in TEXT)
    path.write_text(CONFIG.format(embedded=embedded, pictures=pictures, steps=steps, text=text), "utf-8")
    return path


def command(config: Path, out: Path, parallel: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ours = ["-m", "hydit_core.train", str(config), "--resume", "auto"]
    sets = [f"run.output_dir={out}", f"run.parallel={parallel}"]
    more = [word for value in sets for word in ("--set", value)]
    return [*launcher, "--max-restarts=20", *ours, *more]


def result(out: Path) -> dict[str, Any]:
    """What has to be the same: the last checkpoint's tensors, the export, and the records."""
    newest = max(path for path in (out / "checkpoints").iterdir() if path.name.startswith("step_"))
    files = {f"{path.relative_to(newest)}": path.read_bytes() for path in newest.rglob("*.safetensors")}
    lines = map(json.loads, (out / "metrics.jsonl").read_text("utf-8").splitlines())
    records = [{key: value for key, value in line.items() if key not in _MEASURED} for line in lines]
    return {**files, "export": (out / "model.safetensors").read_bytes(), "records": records}


def ranks(run: Running) -> list[psutil.Process]:
    """The processes that train, once both are there."""
    try:
        found = psutil.Process(run.process.pid).children()
        mine = [one for one in found if "hydit_core.train" in one.cmdline()]
    except psutil.NoSuchProcess:
        return []
    return mine if len(mine) == 2 else []


def killed(run: Running, seconds: float, most: int, chance: random.Random) -> int:
    """Kill one of two at random moments until the run ends; gives how often."""
    before: set[int] = set()
    kills, until = 0, time.monotonic() + _LIMIT
    while not run.ended():
        there = ranks(run)
        now = {one.pid for one in there}
        if now and not now & before and kills < most:
            moment = time.monotonic() + chance.uniform(0, seconds)
            while time.monotonic() < moment and not run.ended():
                time.sleep(0.02)
            victim = chance.choice(there)
            if victim.is_running():
                victim.kill()
                kills, before = kills + 1, now
        if time.monotonic() > until:
            raise SystemExit(f"a training did not end within {_LIMIT} s")
        time.sleep(0.05)
    return kills


def soak(start: Callable[[list[str]], Running], work: Path, times: int, seed: int, steps: int) -> bool:
    """Kill as often as ``times``, in as many trainings as it takes; whether all ended as they should."""
    passed = True
    config = write_config(work, work / "data" / "pictures", steps)
    for parallel in PARALLEL:
        whole = work / f"training-{parallel}-whole"
        begun = time.monotonic()
        killed(start(command(config, whole, parallel)), 0, 0, random.Random(0))
        seconds = time.monotonic() - begun
        wanted, total, number = result(whole), 0, 0
        print(f"training, {parallel}: undisturbed {seconds:.0f} s", flush=True)
        while total < times:
            out = work / f"training-{parallel}-{number}"
            chance = random.Random(f"{seed} {parallel} {number}")
            run = start(command(config, out, parallel))
            total += killed(run, seconds, min(5, times - total), chance)
            found = result(out)
            differ = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
            told = f"DIFFERS in {', '.join(differ[:5])}; kept in {out}" if differ else "the same"
            print(f"training, {parallel} {number}: {told} after {total} kills in all", flush=True)
            passed, number = passed and not differ, number + 1
            if not differ:
                shutil.rmtree(out)
    return passed
