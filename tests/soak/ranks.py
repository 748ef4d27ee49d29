"""Train the embedded model on 1, 2 and 4 processes with one global batch: losses and exports have to agree.

    python tests/soak/ranks.py            # 20 steps of each objective in fp32, with ddp and with fsdp
    python tests/soak/ranks.py --only lora --steps 5

The pictures are those of examples/first. A run's checkpoint of two processes with fsdp is also continued by
one and by four. Losses may differ by 1e-5, those of Muon by 1e-3; of exports it is told how far apart they
are. It takes some minutes at rest. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
GLOBAL_BATCH = 4
WAYS = ((2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp"))
CONFIG = """
[model]
init_from = "{embedded}"
[data]
resolution = 128
sources = [{{ path = "{pictures}", caption_lines = true }}]
{control}
[data.cache]
latents = true
text = true
dir = "{cache}"
[objective]
kind = "{kind}"
[optimizer]
name = "{optimizer}"
lr = {lr}
[ema]
enabled = false
[run]
steps = {steps}
output_dir = "unset"
threads = 1
device = "cpu"
[checkpoint]
every = {half}
keep_last = 2
[metrics]
every = 1
tensorboard = false
"""


class Kind(NamedTuple):
    """What is trained, how, and how far losses may be apart."""

    objective: str
    optimizer: str
    lr: float
    close: float
    export: str


KINDS = {
    "full": Kind("full", "adamw", 1e-4, 1e-5, "model.safetensors"),
    "lora": Kind("lora", "adamw", 1e-3, 1e-5, "lora.safetensors"),
    "controlnet": Kind("controlnet", "adamw", 1e-4, 1e-5, "model.safetensors"),
    "muon": Kind("full", "muon", 1e-4, 1e-3, "model.safetensors"),
}


def write_config(folder: Path, name: str, kind: Kind, steps: int) -> Path:
    from hydit_core.embedded import embedded_model

    embedded = embedded_model()
    path = folder / f"{name}.toml"
    text = CONFIG.format(
        embedded=embedded,
        pictures=embedded.parent / "pictures" / "hexagon",
        control='control = { kind = "canny" }' if kind.objective == "controlnet" else "",
        cache=folder / "cache",
        kind=kind.objective,
        optimizer=kind.optimizer,
        lr=kind.lr,
        steps=steps,
        half=steps // 2,
    )
    path.write_text(text, "utf-8")
    return path


def trained(config: Path, out: Path, ranks: int, way: str, resume: Path | None = None) -> dict[int, float]:
    """The losses of each step of a run, which is made unless it is there."""
    if not any(out.glob("*.safetensors")):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        sets = [f"run.output_dir={out}", f"run.batch_size={GLOBAL_BATCH // ranks}", f"run.parallel={way}"]
        command = [sys.executable, *(launcher if ranks > 1 else []), "-m", "hydit_core.train", str(config)]
        command += [word for value in sets for word in ("--set", value)]
        command += ["--resume", str(resume)] if resume else []
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{config.stem}, {ranks} x {way}: {done.stderr[-3000:]}")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def apart(found: Path, expected: Path) -> float:
    """The norm of the difference of two exports, relative to that of one."""
    mine, theirs = load_file(found), load_file(expected)
    assert mine.keys() == theirs.keys()
    different = sum(_square(mine[key].double() - tensor.double()) for key, tensor in theirs.items())
    return (different / sum(_square(tensor.double()) for tensor in theirs.values())) ** 0.5


def _square(tensor: Tensor) -> float:
    return float(tensor.square().sum())


def check(name: str, work: Path, steps: int) -> bool:
    kind = KINDS[name]
    config = write_config(work, name, kind, steps)
    alone = work / f"{name}-1"
    expected = trained(config, alone, 1, "ddp")
    runs = [(ranks, way, None) for ranks, way in WAYS]
    middle = work / f"{name}-2-fsdp/checkpoints/step_{steps // 2:08d}"
    runs += [(1, "ddp", middle), (4, "fsdp", middle)]
    passed = True
    for ranks, way, resume in runs:
        out = work / f"{name}-{ranks}-{way}{'-resumed' if resume else ''}"
        losses = trained(config, out, ranks, way, resume)
        wanted = {step: loss for step, loss in expected.items() if resume is None or step > steps // 2}
        worst = max(abs(losses[step] - loss) for step, loss in wanted.items())
        share = apart(out / kind.export, alone / kind.export)
        good = losses.keys() == wanted.keys() and worst <= kind.close
        passed &= good
        how = f"{ranks} x {way}" + (", continued from 2 x fsdp" if resume else "")
        told = "" if good else ": MORE THAN ALLOWED"
        print(f"{name}, {how}: losses {worst:.1e} apart, exports {share:.1e}{told}", flush=True)
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--work", type=Path, help="keep the runs there, and go on with them")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="ranks-"))
    work.mkdir(parents=True, exist_ok=True)
    results = [check(name, work.resolve(), options.steps) for name in options.only]
    passed = all(results)
    if passed and options.work is None:
        shutil.rmtree(work)
    raise SystemExit(0 if passed else f"kept in {work}")


if __name__ == "__main__":
    main()
