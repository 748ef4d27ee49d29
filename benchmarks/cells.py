"""Pictures in Parquet files: what reading one costs, in any order and as a stream.

A cell cannot be read without decoding its row group. Files of random bytes in place of pictures, with row
groups of several lengths, larger and smaller than what a process keeps of decoded groups; their pictures are
read (not decoded) in the orders of a training, in one process.

    python benchmarks/cells.py --write docs/benchmarks.md

needs 1 GB of disk.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from report import machine, publish, table

from hydit_core.data.config import DataConfig
from hydit_core.data.dataset import open_dataset
from hydit_core.data.sources import arrow_table

BYTES = 100_000
BATCH = 32
HEADER = ("pictures", "of a row group", "order", "groups kept", "read", "ms of processor time a picture")


def write_file(path: Path, pictures: int, group: int) -> None:
    random = np.random.default_rng(0)
    schema = pa.schema(
        [("image", pa.binary()), ("caption", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
    )
    with pa.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, pictures, group):
            count = min(group, pictures - start)
            cells = [random.bytes(BYTES) for _ in range(count)]
            columns = [cells, ["a caption"] * count, [64] * count, [64] * count]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=group)


def measure(path: Path, count: int, *, stream: bool, kept: int, window: int) -> tuple[int, float]:
    """(pictures read, ms of processor time for each)."""
    arrow_table.HELD_BYTES = kept
    arrow_table._groups = arrow_table._Groups()
    config = DataConfig(sources=[{"path": path, "stream": stream}], resolution=64, window=window)
    data = open_dataset(config, seed=0, batch_size=BATCH)
    read, begun = 0, time.process_time()
    for step in range(data.steps_per_epoch):
        for sample in data.order.samples(step)[data.order.passes(step) == 0]:
            assert len(data.manifest.picture(data.samples.row(int(sample), 0)).read()) == BYTES
            read += 1
        if read >= count:
            break
    return read, 1000 * (time.process_time() - begun) / read


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pictures", nargs="+", type=int, default=[2000, 8000], help="in a file")
    parser.add_argument("--groups", nargs="+", type=int, default=[100, 1000], help="pictures of a row group")
    parser.add_argument("--window", type=int, default=2048, help="data.window")
    parser.add_argument("--few", type=int, default=192, help="pictures to read where each costs a row group")
    parser.add_argument("--folder", type=Path, help="where to write the files (a temporary folder)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the section of this document")
    args = parser.parse_args()
    torch.set_num_threads(1)
    held = arrow_table.HELD_BYTES
    found: list[list[str]] = []
    for pictures in args.pictures:
        for group in args.groups:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                path = Path(folder) / "t.parquet"
                write_file(path, pictures, group)
                fits = pictures * BYTES < held
                for order, kept, count in (
                    ("any", 0, args.few),
                    ("any", held, pictures if fits else args.few),
                    ("stream", held, pictures),
                ):
                    read, ms = measure(path, count, stream=order == "stream", kept=kept, window=args.window)
                    keeps = f"{kept >> 20} MiB" if kept else "the last one"
                    found.append([f"{pictures:,}", f"{group:,}", order, keeps, f"{read:,}", f"{ms:.2f}"])
                    print(*found[-1], flush=True)
    told = (
        f"Parquet files of {BYTES // 1000} KB a picture, read (not decoded) in the order of a training with "
        f"batches of {BATCH}: shuffled as a whole, or as a stream (`data.window` = {args.window}). A "
        f"process keeps {held >> 20} MiB of the groups that it decoded last; for comparison, one alone."
    )
    text = f"{told}\n\n{table(HEADER, found)}\n\nMachine: {machine()}."
    publish(args.write, "cells", "Pictures in Parquet files", text)


if __name__ == "__main__":
    main()
