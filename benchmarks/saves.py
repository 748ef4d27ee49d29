"""How long training stands still for a checkpoint: written while it waits, and beside it; 1 and 2 processes.

A model of random weights takes a few steps and is saved after every fifth, with its export. The stall is
what metrics.jsonl says (`save_stall`), the mean of all saves but the first, which allocates the copies. Steps
between two saves should take longer than writing does.

    python benchmarks/saves.py
    python benchmarks/saves.py --width 1024 --depth 24 --ranks 2
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from report import machine, table

from hydit_core.embedded import embedded_model
from hydit_core.weights.bundle import bundle
from hydit_core.weights.load import load_dit

ROOT = Path(__file__).resolve().parents[1]
TEXT = ("text_dim", "text_len", "t5_dim", "t5_len", "t5_hidden", "pooled_dim", "pooler_heads")
"""What the DiT has to know of the embedded model's text encoders."""
HEADER = ("processes", "run.parallel", "checkpoint.background", "size, MiB", "stall, s", "a step, s")
CONFIG = """
[model]
vae = "{embedded}"
text_encoders = "{embedded}"
[model.from_scratch]
hidden_size = {width}
depth = {depth}
num_heads = {heads}
mlp_hidden = {mlp}
{text}
[data]
sources = [{{ path = "pictures" }}]
resolution = 64
min_side = 32
cache = {{ text = true }}
[run]
output_dir = "run"
steps = {steps}
batch_size = {batch}
threads = 1
device = "cpu"
[checkpoint]
every = 5
export_all_in_one = false
[metrics]
every = 1
tensorboard = false
"""


def prepare(folder: Path, width: int, depth: int, batch: int, steps: int) -> Path:
    """Pictures and a configuration."""
    (folder / "pictures").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
            folder / f"pictures/{number}.png"
        )
        (folder / f"pictures/{number}.txt").write_text(f"picture {number}", "utf-8")
    path = folder / "config.toml"
    embedded = embedded_model()
    dit = load_dit(bundle(embedded))[0].config.to_dict()
    text = "\n".join(f"{name} = {dit[name]}" for name in TEXT)
    values = {"width": width, "depth": depth, "heads": width // 64, "mlp": 4 * width, "text": text}
    path.write_text(CONFIG.format(embedded=embedded, batch=batch, steps=steps, **values), "utf-8")
    return path


def measured(config: Path, ranks: int, parallel: str, background: str) -> list[str]:
    """A row of the table."""
    out = config.parent / f"{parallel}-{ranks}-{background}"
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "hydit_core.train", str(config)]
    for value in (f"run.output_dir={out}", f"run.parallel={parallel}", f"checkpoint.background={background}"):
        command += ["--set", value]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    begun = time.monotonic()
    subprocess.run(command, env=environment, check=True, stdout=sys.stderr)
    print(f"{out.name}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    stalls = [record["save_stall"] for record in records if "save_stall" in record][1:]
    newest = max((out / "checkpoints").iterdir())
    size = sum(path.stat().st_size for path in newest.rglob("*.safetensors")) / 2**20
    works = (records[-1]["seconds"] - records[0]["seconds"] - sum(stalls)) / (
        records[-1]["step"] - records[0]["step"]
    )
    stall = sum(stalls) / len(stalls)
    return [str(ranks), parallel, background, f"{size:.0f}", f"{stall:.2f}", f"{works:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--parallel", nargs="+", default=["ddp", "fsdp"], help="of two processes or more")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="saves-") as work:
        config = prepare(Path(work) / "data", args.width, args.depth, args.batch, args.steps)
        for ranks in args.ranks:
            for parallel in args.parallel if ranks > 1 else ("ddp",):
                for background in ("never", "always"):
                    rows.append(measured(config, ranks, parallel, background))
                    print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    print(machine())
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
