"""What a process needs of the host's memory for its part of a model: read in parts, or whole and then split.

    python benchmarks/parts.py
    python benchmarks/parts.py --ranks 4 --width 1024 --depth 12

Each way starts its own processes, on the CPU. Counted is RssAnon above that of the same process before it
opened the file; pages of the mapped file, which the system may take back, are shown beside.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from pathlib import Path

import torch

from hydit_core.facts import ModelInfo
from hydit_core.model.config import DiTConfig
from hydit_core.model.dit import DiT
from hydit_core.train import distributed
from hydit_core.train.parallel.choice import make
from hydit_core.train.sections import RunSection
from hydit_core.weights.load import load_dit
from hydit_core.weights.save import save_checkpoint

MIB = 2**20


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--width", type=int, default=768)
    options.add_argument("--depth", type=int, default=8)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        size = _write(path, given.width, given.depth)
        print(
            f"a DiT of {size / 1e6:.0f} million parameters, stored in fp16, trained in fp32: "
            f"{4 * size / MIB:.0f} MiB whole, {4 * size / MIB / given.ranks:.0f} MiB a part"
        )
        for deferred in (False, True):
            peaks = _measured(given.ranks, path, deferred)
            most, mapped, seconds = (max(column) for column in zip(*peaks, strict=True))
            print(
                f"{'read in parts' if deferred else 'read whole'}: {most / MIB:.0f} MiB at most, and "
                f"{mapped / MIB:.0f} MiB of mapped pages, in {seconds:.1f} s"
            )


def _write(path: Path, width: int, depth: int) -> int:
    config = DiTConfig(hidden_size=width, depth=depth, num_heads=width // 64, mlp_hidden=4 * width)
    dit = DiT(config)
    dit.initialize(torch.Generator().manual_seed(0))
    save_checkpoint(path, dit=dit.state_dict(), info=ModelInfo.published("v1.2"), dtype=torch.float16)
    return sum(p.numel() for p in dit.parameters())


def _measured(ranks: int, path: Path, deferred: bool) -> list[tuple[float, float, float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with multiprocessing.get_context("spawn").Pool(ranks) as pool:
        return pool.starmap(_rank, [(rank, ranks, port, path, deferred) for rank in range(ranks)], 1)


def _rank(rank: int, ranks: int, port: int, path: Path, deferred: bool) -> tuple[float, float, float]:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_PORT=str(port))
    os.environ.update(MASTER_ADDR="127.0.0.1", LOCAL_WORLD_SIZE=str(ranks))
    processes = distributed.start("cpu", 240.0)
    parallel = make(RunSection.model_construct(precision="fp32"), "fsdp", processes)
    before, most = _memory(), [0.0, 0.0]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            for index, value in enumerate(_memory()):
                most[index] = max(most[index], value - before[index])

    watching = threading.Thread(target=watch)
    watching.start()
    began = time.monotonic()
    dit, _ = load_dit(path, dtype=torch.float32, deferred=deferred)
    parallel.wrap(dit)
    seconds = time.monotonic() - began
    over.set()
    watching.join()
    processes.close()
    return most[0], most[1], seconds


def _memory() -> tuple[float, float]:
    """Bytes of this process: its own, and mapped from files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (1024.0 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))
    return own, mapped


if __name__ == "__main__":
    main()
