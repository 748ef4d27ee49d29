"""Large data: how long a training takes to know its pictures, and what of memory, by their number.

A Parquet table of N rows (path, caption, width, height) is listed once by `train prepare`; then processes
open it, one after the other, in several ways:

* mapped: what a training does with prepared rows, the check for changes included;
* kept: what it does with few rows, a list in each process's memory;
* datasets: Hugging Face's, the same columns from `save_to_disk`, shuffled by a seed, if it is installed.

    python benchmarks/data.py
    python benchmarks/data.py --write docs/benchmarks.md

needs 8 GB of disk for ten million rows. Memory is RssAnon above that of the same process before opening: what
the system cannot drop, as it can pages of mapped files.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from PIL import Image
from report import machine, publish, table

from hydit_core.data.config import DataConfig
from hydit_core.data.dataset import TrainData, open_dataset
from hydit_core.data.prepared import open_many, prepare_again, prepared_layout

BATCH = 32
LOOKUPS = 200
HEADER = (
    "rows",
    "way",
    "open, s",
    "of the processor, s",
    "first batch, s",
    "a step's lookup, median ms",
    "worst ms",
    "RssAnon, MiB",
)
BUILDS = ("rows", "prepare, s", "microseconds of processor time a row", "bytes a row", "peak, MiB")


def write_table(path: Path, rows: int) -> None:
    """N rows with sizes of all shapes and captions of 40 to 120 bytes."""
    random = np.random.default_rng(0)
    schema = pa.schema(
        [("image", pa.string()), ("caption", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
    )
    with pa.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 1 << 17):
            count = min(1 << 17, rows - start)
            words = random.integers(4, 12, count)
            columns = [
                [f"pictures/{number // 1000:06}/{number:010}.jpg" for number in range(start, start + count)],
                [f"picture {start + i}: " + " ".join(["a caption"] * int(n)) for i, n in enumerate(words)],
                random.integers(512, 2048, count).astype(np.int32),
                random.integers(512, 2048, count).astype(np.int32),
            ]
            writer.write_table(pa.table(columns, schema=schema))


def config(folder: Path) -> DataConfig:
    return DataConfig(
        sources=[{"path": folder / "rows.parquet"}],
        resolution=1024,
        buckets={"enabled": True},
        cache={"dir": folder / "cache"},
    )


def anonymous_memory(field: str = "RssAnon") -> float:
    """RssAnon of this process in MiB (Linux only)."""
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    return 0.0


def opened(way: str, folder: Path) -> TrainData:
    settings = config(folder)
    if way == "kept":
        return open_dataset(settings, seed=0, batch_size=BATCH)
    rows = open_many(settings)
    layout = prepared_layout(settings, rows)
    return TrainData(settings, rows, rows.findings, seed=0, batch_size=BATCH, layout=layout)


def rows_of(data: TrainData, step: int) -> list[int]:
    passes = data.order.passes(step)
    return [data.samples.row(int(i), int(e)) for i, e in zip(data.order.samples(step), passes, strict=True)]


def measure_ours(way: str, folder: Path) -> dict[str, float]:
    """Open, look up random steps, read the first batch; in this process."""
    idle = anonymous_memory()
    start, processor = time.perf_counter(), time.process_time()
    data = opened(way, folder)
    data.fingerprint()
    assert len(data.manifest) == len(data.samples), "every row is shown once"
    found = {"open": time.perf_counter() - start, "processor": time.process_time() - processor}
    steps = np.random.default_rng(1).integers(0, data.steps_per_epoch, LOOKUPS).tolist()
    seconds = []
    for step in steps:
        start = time.perf_counter()
        for row in rows_of(data, step):
            _ = data.manifest.picture(row), data.manifest.size(row), data.manifest.caption(row, 0)
        seconds.append(time.perf_counter() - start)
    found["lookup"], found["worst"] = 1000 * float(np.median(seconds)), 1000 * max(seconds)
    found["memory"] = anonymous_memory() - idle
    for row in rows_of(data, 0):  # making them is no part of this
        path = data.manifest.picture(row).path
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", data.manifest.size(row), "gray").save(path)
    start = time.perf_counter()
    data.batch(0)
    found["first"] = time.perf_counter() - start
    return found


def measure_datasets(folder: Path) -> dict[str, float]:
    """As :func:`measure_ours`, but for the decoding of a batch, which is not theirs."""
    import datasets

    idle = anonymous_memory()
    start, processor = time.perf_counter(), time.process_time()
    data = datasets.load_from_disk(str(folder / "datasets")).shuffle(seed=0)
    found = {"open": time.perf_counter() - start, "processor": time.process_time() - processor}
    found["first"] = math.nan
    steps = np.random.default_rng(1).integers(0, len(data) // BATCH, LOOKUPS).tolist()
    seconds = []
    for step in steps:
        start = time.perf_counter()
        _ = data[step * BATCH : (step + 1) * BATCH]
        seconds.append(time.perf_counter() - start)
    found["lookup"], found["worst"] = 1000 * float(np.median(seconds)), 1000 * max(seconds)
    found["memory"] = anonymous_memory() - idle
    return found


def build(folder: Path) -> dict[str, float]:
    """List all rows."""
    settings = config(folder)
    idle = anonymous_memory()
    start, processor = time.perf_counter(), time.process_time()
    rows, _ = prepare_again(settings)
    layout = prepared_layout(settings, rows)
    found: dict[str, float] = {"first": time.perf_counter() - start, "count": len(rows)}
    assert layout.folder is not None
    files = [*rows.folder.rglob("*.arrow"), *layout.folder.iterdir()]
    found["bytes"] = sum(path.stat().st_size for path in files) / len(rows)
    found["peak"] = anonymous_memory("VmHWM") - idle  # with the pages of mapped files, so a bound
    found["processor"] = time.process_time() - processor
    return found


def repeat(folder: Path, times: int) -> None:
    """Repeat all prepared rows, which would take long to list, and prepare how they are arranged."""
    settings = config(folder)
    rows = open_many(settings)
    source, target = rows.folder / "rows.arrow", rows.folder / "repeated.arrow"
    with pa.memory_map(str(source)) as mapped, pa.OSFile(str(target), "wb") as file:
        reader = pa.ipc.open_file(mapped)
        with pa.ipc.new_file(file, reader.schema) as writer:
            for number in range(times * reader.num_record_batches):
                writer.write_batch(reader.get_batch(number % reader.num_record_batches))
    note_path = rows.folder.parent / "prepared.json"
    note = json.loads(note_path.read_text("utf-8"))
    note |= {
        "rows": times * len(rows),
        "bytes": target.stat().st_size,
        "digest": f"{times} x {note['digest']}",
    }
    del rows
    target.replace(source)
    for layout in source.parent.glob("layout-*"):
        shutil.rmtree(layout)
    note_path.write_text(json.dumps(note), encoding="utf-8")
    prepared_layout(settings, open_many(settings))


def save_for_datasets(folder: Path, times: int) -> None:
    import datasets

    data = datasets.Dataset.from_parquet(str(folder / "rows.parquet"), cache_dir=str(folder / "hf"))
    datasets.concatenate_datasets([data] * times).save_to_disk(str(folder / "datasets"))


def in_process(what: str, folder: Path) -> dict[str, float]:
    line = [sys.executable, __file__, "--measure", what, str(folder)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(what: str, folder: Path) -> dict[str, float]:
    torch.set_num_threads(1)
    if what == "build":
        return build(folder)
    what, _, times = what.partition(" ")
    if times:
        (save_for_datasets if what == "save" else repeat)(folder, int(times))
        return {}
    return measure_datasets(folder) if what == "datasets" else measure_ours(what, folder)


def law(counts: list[int], values: list[float]) -> str:
    """The exponent b of the line value = a * rows ** b through all points, by least squares of logarithms."""
    slope, _ = np.polyfit(np.log(counts), np.log(np.maximum(values, 1e-9)), 1)
    return f"rows^{slope:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[10**5, 10**6, 10**7])
    parser.add_argument(
        "--listed", type=int, default=10**6, help="of how many rows the largest table is; more repeat these"
    )
    parser.add_argument("--kept", type=int, default=10**6, help="up to how many rows to keep in memory, too")
    parser.add_argument(
        "--runs", type=int, default=3, help="processes of each kind, of which the fastest counts"
    )
    parser.add_argument("--folder", type=Path, help="where to write the files (a temporary folder)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the section of this document")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], Path(args.measure[1]))))
        return
    try:
        import datasets

        peer = f"Hugging Face datasets {datasets.__version__}"
    except ImportError:
        peer = ""

    builds: list[list[str]] = []
    rows: list[list[str]] = []
    mapped: dict[str, list[float]] = {}
    built: list[dict[str, float]] = []
    for count in args.rows:
        with tempfile.TemporaryDirectory(dir=args.folder) as place:
            folder = Path(place)
            listed = min(count, args.listed)
            write_table(folder / "rows.parquet", listed)
            told = in_process("build", folder)
            if listed == count:
                built.append(told)
                values = (told["first"], 1e6 * told["processor"] / count, told["bytes"], told["peak"])
                builds.append([f"{count:,}", *(f"{value:.1f}" for value in values)])
                print("prepare", *builds[-1], flush=True)
            else:
                in_process(f"repeat {count // listed}", folder)
            ways = ["mapped", *(["kept"] if count <= args.kept else []), *(["datasets"] if peer else [])]
            if peer:
                in_process(f"save {count // listed}", folder)
            for way in ways:
                runs = [in_process(way, folder) for _ in range(args.runs)]
                found = {name: min(run[name] for run in runs) for name in runs[0]}
                rows.append([f"{count:,}", way, *_cells(found)])
                print(*rows[-1], flush=True)
                if way == "mapped":
                    for name, value in found.items():
                        mapped.setdefault(name, []).append(value)
    text = _text(args.rows, builds, rows, mapped, built, peer, args.runs, args.listed)
    publish(args.write, "data", "Large data", text)


def _cells(found: dict[str, Any]) -> list[str]:
    first = "" if math.isnan(found["first"]) else f"{found['first']:.2f}"
    return [
        f"{found['open']:.2f}",
        f"{found['processor']:.2f}",
        first,
        f"{found['lookup']:.2f}",
        f"{found['worst']:.2f}",
        f"{found['memory']:.0f}",
    ]


def _text(
    counts: list[int],
    builds: list[list[str]],
    rows: list[list[str]],
    mapped: dict[str, list[float]],
    built: list[dict[str, float]],
    peer: str,
    runs: int,
    listed: int,
) -> str:
    more = f" (of more than {listed:,} rows, which are repeated for it)" if counts[-1] > listed else ""
    setting = (
        "A table of paths, captions of about 90 bytes, widths and heights, in the 33 sizes of 1024 px; one "
        "process each. `train prepare` lists it once (bytes: rows and layout on disk; peak: of resident "
        "memory above the process before, with pages of mapped files):"
    )
    ways = (
        f"Opened by a training, the fastest of {runs} processes{more}: mapped, or kept in its "
        "memory, the fingerprint included"
        f"{f'; by {peer}, shuffled' if peer else ''}. First batch: {BATCH} pictures of 0.3 to 4 megapixels, "
        f"read and scaled. A step's lookup: where {BATCH} pictures are, their sizes and captions, at "
        f"{LOOKUPS} random steps. RssAnon: after these, above the process before."
    )
    parts = [setting, table(BUILDS, builds), ways, table(HEADER, rows)]
    if len(built) > 1:
        laws = {
            "prepare": law(counts[: len(built)], [told["processor"] for told in built]),
            "open": law(counts, mapped["processor"]),
            "a step's lookup": law(counts, mapped["lookup"]),
            "RssAnon": law(counts, mapped["memory"]),
        }
        grown = ", ".join(f"{name} as {text}" for name, text in laws.items())
        parts.append(f"Growth of what is mapped, by least squares: {grown}.")
    return "\n\n".join([*parts, f"Machine: {machine()}."])


if __name__ == "__main__":
    main()
