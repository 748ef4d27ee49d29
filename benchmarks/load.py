"""Loading a full-size HunyuanDiT: time and memory, ours against diffusers' from_pretrained, on the CPU.

Random fp16 weights are written once, as Tencent's file and as diffusers' folder, in safetensors and in
torch's format. Each measurement is a process of its own, ours and diffusers' in turn; it starts when the
libraries are imported and ends when every weight has been read once in the compute dtype. The files are in
the page cache. Memory is RssAnon above that of the same process before loading: what the system cannot drop,
as it can pages of mapped files.

    python benchmarks/load.py
    python benchmarks/load.py --write docs/benchmarks.md

measures the 1.5 billion parameters of DiT-g/2 v1.2 and needs 13 GB of disk; --blocks makes it smaller.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import HunyuanDiT2DModel
from report import machine, publish, table

from hydit_core.facts import ModelInfo
from hydit_core.model.config import DiTConfig
from hydit_core.model.dit import DiT
from hydit_core.weights.convert import convert
from hydit_core.weights.files import open_tensors
from hydit_core.weights.load import load_dit
from hydit_core.weights.save import save_checkpoint
from hydit_core.weights.source import TensorSource, cast

DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}
HEADER = (
    "file, fp16",
    "loaded as",
    "ours, s",
    "diffusers, s",
    "ratio",
    "ours, peak MiB",
    "diffusers, peak MiB",
    "module, MiB",
    "ours, peak / module",
)


class Case(NamedTuple):
    """One row's comparison: the file that ours reads and the folder that diffusers reads."""

    name: str
    ours: str
    diffusers: str


CASES = (
    Case("safetensors, Tencent's names", "tencent.safetensors", "safetensors/transformer"),
    Case("safetensors, diffusers' folder", "safetensors", "safetensors/transformer"),
    Case("torch (.pt, .bin)", "tencent.pt", "torch"),
)


class RandomWeights(TensorSource):
    """Weights of a DiT that exist only while they are written."""

    def __init__(self, config: DiTConfig) -> None:
        self.path, self.metadata = Path("random"), {}
        with torch.device("meta"):
            self._shapes = {key: tuple(value.shape) for key, value in DiT(config).state_dict().items()}
        self._generator = torch.Generator().manual_seed(0)

    def keys(self) -> list[str]:
        return list(self._shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        return torch.float16

    def get(self, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = torch.empty(self._shapes[key]).uniform_(-0.05, 0.05, generator=self._generator)
        return cast(values.half(), dtype)


def write_files(folder: Path, config: DiTConfig) -> None:
    """The files of :data:`CASES`."""
    tencent = folder / "tencent.safetensors"
    save_checkpoint(tencent, dit=RandomWeights(config), info=ModelInfo.published(config.version))
    convert(tencent, folder / "safetensors", layout="diffusers")
    torch.save(_in_memory(tencent), folder / "tencent.pt")
    their_folder = folder / "safetensors" / "transformer"
    (folder / "torch").mkdir()
    torch.save(_in_memory(their_folder), folder / "torch" / "diffusion_pytorch_model.bin")
    (folder / "torch" / "config.json").write_text((their_folder / "config.json").read_text())


def _in_memory(path: Path) -> dict[str, torch.Tensor]:
    # Copies, because torch.save would write the whole mapped file for every view of it.
    return {key: value.clone() for key, value in dict(open_tensors(path)).items()}


def anonymous_memory() -> int:
    """RssAnon of this process in bytes (Linux only)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    return 0


class PeakMemory:
    """The highest RssAnon above the start, sampled every 2 ms in a thread."""

    def __enter__(self) -> PeakMemory:
        self.start = anonymous_memory()
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, anonymous_memory() - self.start)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()


def touch(model: torch.nn.Module) -> int:
    """Read every weight once, at memory speed."""
    total = 0
    for parameter in model.parameters():
        bits = torch.int16 if parameter.dtype.itemsize == 2 else torch.int32
        # In pieces that fit into the cache: torch sums small integers through a wider copy.
        for piece in parameter.detach().view(bits).reshape(-1).split(2**17):
            total += int(piece.sum())
    return total


def measure(who: str, path: Path, dtype: torch.dtype) -> dict[str, float]:
    """Load once in this process; seconds, and bytes of peak memory and of the module."""
    with PeakMemory() as memory:
        start = time.perf_counter()
        model: torch.nn.Module
        if who == "ours":
            model, _ = load_dit(path, dtype=dtype)
        else:
            use_safetensors = path.name != "torch"
            model = HunyuanDiT2DModel.from_pretrained(
                path, torch_dtype=dtype, use_safetensors=use_safetensors
            )
        touch(model)
        elapsed = time.perf_counter() - start
    if any(parameter.dtype != dtype for parameter in model.parameters()):
        raise RuntimeError(f"{who} did not load {path} as {dtype}")
    size = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    return {"seconds": elapsed, "peak": memory.peak, "module": size}


def in_process(who: str, path: Path, dtype: str, threads: int) -> dict[str, float]:
    """:func:`measure` in a new process."""
    line = [sys.executable, __file__, "--measure", who, str(path), dtype, "--threads", str(threads)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(case: Case, folder: Path, dtype: str, runs: int, threads: int) -> list[str]:
    """One row of the table: medians of alternating runs."""
    found: dict[str, list[dict[str, float]]] = {"ours": [], "diffusers": []}
    for i in range(runs):
        for who in ("ours", "diffusers") if i % 2 == 0 else ("diffusers", "ours"):
            path = folder / (case.ours if who == "ours" else case.diffusers)
            found[who].append(in_process(who, path, dtype, threads))

    def median(who: str, what: str) -> float:
        return statistics.median(run[what] for run in found[who])

    ratios = (a["seconds"] / b["seconds"] for a, b in zip(found["ours"], found["diffusers"], strict=True))
    return [
        case.name,
        dtype,
        f"{median('ours', 'seconds'):.2f}",
        f"{median('diffusers', 'seconds'):.2f}",
        f"{statistics.median(ratios):.2f}",
        f"{median('ours', 'peak') / 2**20:.0f}",
        f"{median('diffusers', 'peak') / 2**20:.0f}",
        f"{median('ours', 'module') / 2**20:.0f}",
        f"{median('ours', 'peak') / median('ours', 'module'):.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=40, help="depth of the model, even")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp16", "fp32"], help="loaded as")
    parser.add_argument("--runs", type=int, default=3, help="processes of each kind for a row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where to write the files (a temporary folder)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the section of this document")
    parser.add_argument("--measure", nargs=3, metavar=("WHO", "PATH", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        who, path, dtype = args.measure
        print(json.dumps(measure(who, Path(path), DTYPES[dtype])))
        return

    config = DiTConfig(depth=args.blocks)
    rows = []
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_files(Path(folder), config)
        for dtype in args.dtypes:
            for case in CASES:
                rows.append(compare(case, Path(folder), dtype, args.runs, args.threads))
                print(f"{case.name}, {dtype}: ratio {rows[-1][4]}", flush=True)
    count = sum(RandomWeights(config).numel(key) for key in RandomWeights(config))
    setting = (
        f"{count:,} parameters, stored in fp16. Seconds are medians of {args.runs} processes each, in turn, "
        "until every weight has been read once in the dtype that it is loaded as; the ratio is the median of "
        "the paired ratios (below 1: ours is faster). MiB: peak RssAnon above the process before loading."
    )
    text = f"{setting}\n\nMachine: {machine()}.\n\n{table(HEADER, rows)}"
    publish(args.write, "load", "Loading: our loader and diffusers' from_pretrained", text)


if __name__ == "__main__":
    main()
