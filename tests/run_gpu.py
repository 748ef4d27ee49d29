"""Run the tests of tests/gpu and the figures of benchmarks/gpu.py, on a CUDA device or the one that is named.

    python tests/run_gpu.py [--device cpu] [--tiny] [--only ROW] [--minutes 8]

Each row is a process of its own with a time budget, the most valuable first; on a CPU
there are two at a time. What a row found is in JSON when it ends. The Python that runs it must have torch.
Wheels of other packages may be in `.whl/` (from `make gpu-wheels`): they are unpacked into `.gpu-site/`, and
nothing is installed. Logs and JSON go into the folder OUT if that variable is set, else into outputs/gpu. The
tables are printed last.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
WHEELS, SITE = ROOT / ".whl", ROOT / ".gpu-site"
SHOWN = 4000
"""Characters of each row's output that are printed at the end, where the tables stand."""


class Row(NamedTuple):
    """One process: a name, what Python runs, and how many seconds it may take on a card."""

    name: str
    command: Sequence[str]
    budget: float


def _tests(name: str) -> list[str]:
    return ["-m", "pytest", f"tests/gpu/test_gpu_{name}.py", "-q", "-p", "no:cacheprovider", "--tb=short"]


def _speed(*names: str) -> list[str]:
    return ["benchmarks/gpu.py", *(part for name in names for part in ("--only", name))]


ROWS = (
    Row("drawing", _speed("drawing"), 60),
    Row("networks", _tests("networks"), 90),
    Row("offload", _speed("offload"), 90),
    Row("compiled", _speed("compiled"), 100),
    Row("pictures", _tests("pictures"), 120),
    Row("quantised", _speed("quantised", "forecast"), 90),
    Row("training", _speed("training", "adapters"), 90),
    Row("runs", _tests("training"), 150),
    Row("parts", _tests("parts"), 60),
    Row("vae", _speed("vae"), 40),
)
"""The most valuable first: time may run out."""


@dataclass
class Result:
    """How a row ended: "passed", "failed", "took too long", or "left out" for want of time."""

    row: str
    outcome: str
    seconds: float = 0.0


def run_rows(
    rows: Sequence[Row],
    out: Path,
    env: dict[str, str],
    *,
    seconds: float,
    patience: float = 1.0,
    at_once: int = 1,
) -> list[Result]:
    """Run rows, ``at_once`` at a time, for up to ``seconds``; their logs and ``rows.json`` are in ``out``.

    ``patience`` multiplies the rows' budgets.
    """
    results: list[Result] = []
    end = time.monotonic() + seconds

    def run(row: Row) -> Result:
        left = end - time.monotonic()
        budget = min(row.budget * patience, left)
        return _run(row, out, env, budget) if left > 5 else Result(row.name, "left out")

    with ThreadPoolExecutor(at_once) as pool:
        for result in map(run, rows) if at_once == 1 else pool.map(run, rows):
            results.append(result)
            print(f"{result.outcome}: {result.row}, {result.seconds:.0f} s", flush=True)
            (out / "rows.json").write_text(json.dumps([asdict(one) for one in results], indent=1), "utf-8")
    return results


def _run(row: Row, out: Path, env: dict[str, str], budget: float) -> Result:
    begun = time.monotonic()
    with (out / f"{row.name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, *row.command],
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=os.name == "posix",
        )
        try:
            outcome = "passed" if process.wait(budget) == 0 else "failed"
        except subprocess.TimeoutExpired:
            _end(process)
            outcome = "took too long"
    return Result(row.name, outcome, round(time.monotonic() - begun, 1))


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started."""
    if os.name == "posix":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def unpack_wheels() -> None:
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    if wheels:
        install = ["install", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(SITE)]
        subprocess.run([sys.executable, "-m", "pip", "-q", *install, *wheels], check=True)


def environment(device: str, out: Path, *, tiny: bool) -> dict[str, str]:
    threads = "1" if device == "cpu" else str(os.cpu_count())
    path = [str(ROOT), *([str(SITE)] if SITE.exists() else []), os.environ.get("PYTHONPATH", "")]
    return {
        "OMP_NUM_THREADS": threads,
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONUNBUFFERED": "1",
        "HYDIT_GPU_DEVICE": device,
        "HYDIT_GPU_OUT": str(out),
        **({"HYDIT_GPU_TINY": "1"} if tiny else {}),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--device", default="cuda", help="cuda, cuda:1, or cpu to try the tests (default: cuda)"
    )
    parser.add_argument("--tiny", action="store_true", help="shrunken, to try the rows; always so on a CPU")
    parser.add_argument(
        "--only",
        action="append",
        choices=[row.name for row in ROWS],
        help="a row; may be given several times",
    )
    parser.add_argument("--minutes", type=float, help="for all rows together (default: 8; on a CPU 20)")
    args = parser.parse_args(argv)
    cpu = args.device == "cpu"
    out = Path(os.environ.get("OUT") or ROOT / "outputs" / "gpu").resolve()
    out.mkdir(parents=True, exist_ok=True)
    unpack_wheels()
    rows = [row for row in ROWS if not args.only or row.name in args.only]
    minutes = args.minutes or (20 if cpu else 8)
    env = environment(args.device, out, tiny=args.tiny)
    for_cpu = {"patience": 5, "at_once": 2} if cpu else {}
    results = run_rows(rows, out, env, seconds=60 * minutes, **for_cpu)
    for result in results:
        log = out / f"{result.row}.log"
        if log.is_file() and result.outcome != "left out":
            print(f"\n== {result.row}\n{log.read_text(encoding='utf-8', errors='replace')[-SHOWN:]}")
    print("\n".join(f"{one.outcome}: {one.row}, {one.seconds:.0f} s" for one in results))
    print(f"logs and JSON: {out}")
    return int(any(result.outcome != "passed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
