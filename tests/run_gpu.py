"""Run the tests of tests/gpu and benchmarks/gpu.py, on a CUDA device or the one that is named.

    python tests/run_gpu.py [--device cpu]

The Python that runs it must have torch. Wheels of other packages may be in `.whl/` (from `make gpu-wheels`):
they are unpacked into `.gpu-site/`, and nothing is installed. Logs and JSON go into the folder OUT if that
variable is set, else into outputs/gpu. The tables are printed last.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS, SITE = ROOT / ".whl", ROOT / ".gpu-site"
COMMANDS = {
    "tests": ["-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "--tb=short"],
    "speed": ["benchmarks/gpu.py"],
}
SHOWN = 9000
"""Characters of the tests' output that are printed at the end, where the tables stand."""


def unpack_wheels() -> None:
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    if wheels:
        install = ["install", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(SITE)]
        subprocess.run([sys.executable, "-m", "pip", "-q", *install, *wheels], check=True)


def environment(device: str, out: Path) -> dict[str, str]:
    threads = "1" if device == "cpu" else str(os.cpu_count())
    path = [str(ROOT), *([str(SITE)] if SITE.exists() else []), os.environ.get("PYTHONPATH", "")]
    return {
        "OMP_NUM_THREADS": threads,
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONUNBUFFERED": "1",
        "HYDIT_GPU_DEVICE": device,
        "HYDIT_GPU_OUT": str(out),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--device", default="cuda", help="cuda, cuda:1, or cpu to try the tests (default: cuda)"
    )
    args = parser.parse_args()
    out = Path(os.environ.get("OUT") or ROOT / "outputs" / "gpu").resolve()
    out.mkdir(parents=True, exist_ok=True)
    unpack_wheels()
    failed, shown = False, []
    for name, command in COMMANDS.items():
        log = out / f"{name}.log"
        with log.open("w", encoding="utf-8") as file:
            done = subprocess.run(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment(args.device, out),
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
        failed |= done.returncode != 0
        shown.append(
            log.read_text(encoding="utf-8", errors="replace")[-SHOWN if name == "tests" else -2500 :]
        )
    print("\n".join(shown))
    print(f"logs and JSON: {out}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
