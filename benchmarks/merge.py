"""Merging a LoRA into a full-size HunyuanDiT on the CPU: time and memory, ours compared with peft's.

Random fp16 weights of DiT-g/2 v1.2 and a rank-64 LoRA of its 201 attention projections, in PEFT's folder, are
written once. Each measurement is a process of its own that starts when the libraries are imported:

* copy: the base is only read, written and fsynced, tensor by tensor: what every merge has to do.
* ours: ``hydit_core.lora.merge_files``, from file to file. It fsyncs too.
* peft: the DiT is loaded, ``PeftModel.from_pretrained(...).merge_and_unload()``, ``save_file``, fsync.

Memory is peak RssAnon above that of the same process before it starts: what the system cannot drop, as it
can pages of mapped files.

    python benchmarks/merge.py --threads 1 --write docs/benchmarks.md

needs 9 GB of disk; --blocks makes it smaller.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from load import PeakMemory, RandomWeights
from peft import PeftModel
from report import machine, publish, table
from safetensors.torch import save_file

from hydit_core.facts import ModelInfo
from hydit_core.lora import reading, writing
from hydit_core.lora.adapter import Adapter, Patch, changed
from hydit_core.lora.merge import merge_files
from hydit_core.model.config import DiTConfig
from hydit_core.weights.files import open_tensors
from hydit_core.weights.load import load_dit
from hydit_core.weights.save import save_checkpoint
from hydit_core.weights.writer import save_safetensors

WHO = ("copy", "ours", "peft")
RANK = 64
STRENGTH = 1.0
ENDS = ("Wqkv.weight", "q_proj.weight", "kv_proj.weight", "out_proj.weight")


def write_files(folder: Path, config: DiTConfig) -> None:
    """base.safetensors and lora/, in PEFT's format."""
    weights, generator = RandomWeights(config), torch.Generator().manual_seed(1)
    save_checkpoint(folder / "base.safetensors", dit=weights, info=ModelInfo.published(config.version))
    modules = {}
    for key in weights:
        if key.endswith(ENDS):
            out, columns = weights.shape(key)
            down = torch.randn(RANK, columns, generator=generator).half() / 64
            up = torch.randn(out, RANK, generator=generator).half() / 64
            modules[f"dit.{key.removesuffix('.weight')}"] = [Patch("lora", {"down": down, "up": up})]
    writing.write(Adapter(modules), folder / "lora", format="peft")


def measure(who: str, folder: Path, out: Path) -> dict[str, float]:
    """One merge in this process: seconds, CPU seconds, and bytes of peak memory."""
    base, lora = folder / "base.safetensors", folder / "lora"
    with PeakMemory() as memory:
        start, start_cpu = time.perf_counter(), time.process_time()
        if who == "copy":
            save_safetensors(out, open_tensors(base))
        elif who == "ours":
            merge_files(base, [(lora, STRENGTH)], out, overwrite=True)
        else:
            model, _ = load_dit(base)
            adapted = PeftModel.from_pretrained(model, lora)  # type: ignore[arg-type]
            save_file(adapted.merge_and_unload().state_dict(), out)  # type: ignore[operator]
            with open(out, "rb+") as file:
                os.fsync(file.fileno())
        elapsed, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    return {"seconds": elapsed, "cpu": cpu, "peak": memory.peak}


def check(folder: Path, out: Path) -> float:
    """The largest difference between a merged weight and W + B A in float32, in fp16 steps at its size."""
    base, merged, adapter = (
        open_tensors(folder / "base.safetensors"),
        open_tensors(out),
        reading.read(folder / "lora"),
    )
    worst = 0.0
    for module, patches in list(adapter.modules.items())[::20]:
        key = module.removeprefix("dit.") + ".weight"
        exact = changed(base.get(key), patches, STRENGTH, dtype=torch.float32)
        # The step of the number's binade, or of numbers below the smallest normal one.
        step = (2.0 ** (torch.frexp(exact)[1] - 1) * torch.finfo(torch.float16).eps).clamp_min(2.0**-24)
        worst = max(worst, float(((merged.get(key).float() - exact).abs() / step).max()))
    return worst


def in_process(who: str, folder: Path, threads: int) -> dict[str, float]:
    """:func:`measure` in a new process; its output is checked and removed."""
    out = folder / f"{who}.safetensors"
    line = [sys.executable, __file__, "--measure", who, str(folder), str(out), "--threads", str(threads)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    if who != "copy":
        found["error"] = check(folder, out)
    out.unlink()
    return found


def rows_of(found: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """One row for each way; ratios are medians of pairs."""
    rows = []
    for who, runs in found.items():
        ratios = [run["seconds"] / copy["seconds"] for run, copy in zip(runs, found["copy"], strict=True)]
        rows.append(
            [
                {"copy": "read, write, fsync", "ours": "ours", "peft": "peft, in memory"}[who],
                f"{statistics.median(run['seconds'] for run in runs):.1f}",
                f"{statistics.median(ratios):.2f}",
                f"{statistics.median(run['cpu'] for run in runs):.1f}",
                f"{max(run['peak'] for run in runs) / 2**20:.0f}",
                f"{max(run['error'] for run in runs):.2f}" if who != "copy" else "",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=40, help="depth of the model, even")
    parser.add_argument("--runs", type=int, default=3, help="processes of each kind")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where to write the files (a temporary folder)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the section of this document")
    parser.add_argument("--measure", nargs=3, metavar=("WHO", "FOLDER", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        who, folder, out = args.measure
        print(json.dumps(measure(who, Path(folder), Path(out))))
        return

    config = DiTConfig(depth=args.blocks)
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, float]]] = {who: [] for who in WHO}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_files(Path(folder), config)
        size = (Path(folder) / "base.safetensors").stat().st_size
        for i in range(args.runs):
            for who in WHO if i % 2 == 0 else WHO[::-1]:
                found[who].append(in_process(who, Path(folder), args.threads))
                print(who, found[who][-1], flush=True)
    setting = (
        f"A file of {size / 2**30:.2f} GiB in fp16 and a LoRA of rank {RANK} on its attention projections. "
        f"Seconds are medians of {args.runs} processes each, in turn; ratio: the median of the pairs. "
        "CPU s: what the process itself computed, whatever else ran. MiB: "
        "the highest peak RssAnon above the process before the merge. Error: the largest distance from W + BA"
        " in float32, in steps of fp16 at the number's size (rounding once gives up to 0.5)."
    )
    header = ("way", "s", "ratio", "CPU s", "peak MiB", "error, fp16 steps")
    text = f"{setting}\n\nMachine: {machine()}.\n\n{table(header, rows_of(found))}"
    publish(args.write, "merge", "Merging a LoRA: from file to file, and with peft", text)


if __name__ == "__main__":
    main()
