"""Kill `train prepare`, bulk `generate` and training at random moments, and compare what they end with.

    python tests/soak/soak.py          # 20 times each alone, 5 under torchrun, 5 each on Ray, 10 kills
    python tests/soak/soak.py --only alone --times 100 --seed 7

Every trial begins in an empty folder, is killed with SIGKILL one to three times, each time after a random
part of the time that an uninterrupted run takes, then runs to its end. Nothing may differ from what the
uninterrupted run left: neither names nor bytes, hidden and temporary files included; of caches, the entries,
which come to lie in other files after an interruption. For training see :mod:`training`. Needs Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import training

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
ROWS, SHARD = 12, 3
TIMES = {"alone": 20, "prepare": 20, "torchrun": 5, "ray": 5, "prepare-ray": 5, "training": 10}
FEATURES = ("data.cache.latents=true", "data.cache.text=true")
_LIMIT = 900
"""Seconds that a run may take to its end."""


# -- what is run --------------------------------------------------------------------------------------


def write_rows(path: Path) -> None:
    """Prompts of two sizes and of different negative prompts."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(ROWS):
            row = {"prompt": f"a {('red', 'blue', 'green')[number % 3]} {('apple', 'car')[number % 2]}"}
            if number % 5 == 0:
                row |= {"width": 96, "height": 128}
            if number % 4 == 0:
                row |= {"negative": "gray"}
            file.write(json.dumps(row) + "\n")


def write_data(folder: Path, pictures: int = 300) -> Path:
    """Pictures with captions, and the configuration of a training on them."""
    import numpy as np
    from PIL import Image

    from hydit_core.embedded import embedded_model

    (folder / "pictures").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(pictures):
        size = (64 + 8 * (number % 5), 64, 3)
        picture = Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8))
        picture.save(folder / "pictures" / f"{number:04d}.png")
        (folder / "pictures" / f"{number:04d}.txt").write_text(f"picture {number}", "utf-8")
    config = folder / "config.toml"
    model = {"init_from": str(embedded_model())}
    data = {"resolution": 128, "min_side": 32}
    run = {"output_dir": str(folder / "run"), "steps": 1, "batch_size": 4}
    lines = [
        f"[{name}]\n{_toml(values)}" for name, values in (("model", model), ("data", data), ("run", run))
    ]
    config.write_text("".join(lines) + '[[data.sources]]\npath = "pictures"\n', "utf-8")
    return config


def _toml(values: dict[str, object]) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def bulk_arguments(work: Path, out: Path) -> list[str]:
    given = ["--prompts", work / "rows.jsonl", "--out", out, "--shard-size", SHARD, "--steps", 2]
    return [str(word) for word in (*given, "--device", "cpu", "--together", 2)]


class Forked:
    """A command of ours in a fork of this process, in which torch is imported already: only for speed."""

    def __init__(self, run: Callable[[], int]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            code = 70
            try:
                code = run()
            finally:
                os._exit(code)

    def ended(self) -> bool:
        """Whether it has; then with exit code 0."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid and os.waitstatus_to_exitcode(status) != 0:
            raise SystemExit(f"a run ended with {os.waitstatus_to_exitcode(status)}")
        return pid != 0

    def kill(self, chance: random.Random) -> bool:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return True


class Command:
    """A command with all its processes, in a session of its own."""

    def __init__(self, words: list[str], victims: str = "") -> None:
        self.victims = victims
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            words, env=environment, start_new_session=True, stdout=self.log, stderr=self.log
        )
        self.seen: dict[int, psutil.Process] = {}

    def _look(self) -> list[psutil.Process]:
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            found = []
        self.seen |= {one.pid: one for one in found}
        return found

    def ended(self) -> bool:
        self._look()
        if self.process.poll() is None:
            return False
        if self.process.returncode:
            self.log.seek(0)
            raise SystemExit(
                f"a run ended with {self.process.returncode}:\n{self.log.read().decode()[-2000:]}"
            )
        return True

    def kill(self, chance: random.Random) -> bool:
        """Kill one of the victims, which are to be replaced, or all processes. Gives whether all are dead."""
        some = [one for one in self._look() if self.victims and self.victims in _line(one)]
        if some and chance.random() < 0.5:
            _kill(chance.choice(some))
            return False
        self.process.kill()
        self.process.wait()
        for one in self.seen.values():
            _kill(one)
        psutil.wait_procs(self.seen.values(), timeout=60)
        return True


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


# -- the kinds of runs --------------------------------------------------------------------------------


def starters(work: Path, config: Path, small: Path) -> dict[str, Callable[[Path], Forked | Command]]:
    """How each kind of run is started, for a folder."""
    from hydit_core.generate.__main__ import main as generate
    from hydit_core.train.__main__ import main as train

    def prepared(out: Path) -> Forked:
        return Forked(lambda: train(["prepare", str(config), "--set", f"data.cache.dir={out}"]))

    def alone(out: Path) -> Forked:
        return Forked(lambda: generate(bulk_arguments(work, out)))

    def torchrun(out: Path) -> Command:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        ranks = ["--max-restarts=5", "-m", "hydit_core.generate"]
        return Command([*launcher, *ranks, *bulk_arguments(work, out)], "-m hydit_core.generate --prompts")

    def on_ray(out: Path) -> Command:
        command = [sys.executable, "-m", "hydit_core.generate", *bulk_arguments(work, out)]
        return Command([*command, "--engine", "ray", "--workers", "2"], "ray::Worker")

    def prepared_on_ray(out: Path) -> Command:
        sets = [f"--set={name}" for name in (f"data.cache.dir={out}", *FEATURES)]
        command = [sys.executable, "-m", "hydit_core.train", "prepare", str(small), *sets, "--features"]
        return Command([*command, "--engine", "ray", "--workers", "2"], "ray::")

    return {
        "prepare": prepared,
        "alone": alone,
        "torchrun": torchrun,
        "ray": on_ray,
        "prepare-ray": prepared_on_ray,
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def prepared_contents(folder: Path) -> dict[str, bytes]:
    """What the note names, whose folder has a new name each time. What was killed goes after ten minutes."""
    (note,) = folder.glob("rows-*/prepared.json")
    told = json.loads(note.read_text("utf-8"))
    build = told.pop("build")
    return {
        "note": json.dumps(told, sort_keys=True).encode(),
        **contents(note.parent / build),
        **cached(folder),
    }


def cached(folder: Path) -> dict[str, bytes]:
    """Every entry of the caches."""
    from safetensors import safe_open

    found = {}
    for shard in folder.glob("*/shard-*.safetensors"):
        with safe_open(shard, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                found[f"{shard.parent.name}/{key}"] = file.get_tensor(key).numpy().tobytes()
    return found


def wait(run: Forked | Command, seconds: float) -> bool:
    """Whether it ended within so many seconds."""
    until = time.monotonic() + seconds
    while not run.ended():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def trial(start: Callable[[], Forked | Command], seconds: float, chance: random.Random) -> int:
    """Kill runs at random moments, then let one end; gives how often something was killed."""
    kills = 0
    for _ in range(chance.randint(1, 3)):
        run = start()
        dead = False
        while not dead:
            if wait(run, chance.uniform(0, seconds)):
                return kills
            dead = run.kill(chance)
            kills += 1
    run = start()
    if not wait(run, _LIMIT):
        run.kill(chance)
        raise SystemExit(f"a run did not end within {_LIMIT} s")
    return kills


def soak(kind: str, start: Callable[[Path], Forked | Command], work: Path, times: int, seed: int) -> bool:
    """All trials of a kind; whether all were the same."""
    look = prepared_contents if kind.startswith("prepare") else contents
    whole = work / f"{kind}-whole"
    begun = time.monotonic()
    if not wait(start(whole), _LIMIT):
        raise SystemExit(f"{kind}: an uninterrupted run did not end within {_LIMIT} s")
    seconds = time.monotonic() - begun
    wanted = look(whole)
    print(f"{kind}: uninterrupted {seconds:.1f} s, {len(wanted)} files", flush=True)
    kills = same = 0
    for number in range(times):
        out = work / f"{kind}-{number}"
        kills += trial(lambda out=out: start(out), seconds, random.Random(f"{seed} {kind} {number}"))
        found = look(out)
        if found == wanted:
            same += 1
            print(f"{kind}: {same} of {number + 1} the same after {kills} kills", flush=True)
            shutil.rmtree(out)
        else:
            names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            print(f"{kind} {number} DIFFERS in {', '.join(names[:5])}; kept in {out}", flush=True)
    return same == times


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=TIMES, default=list(TIMES))
    parser.add_argument("--times", type=int, help=f"trials of each kind, or kills (default: {TIMES})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300, help="of a training")
    parser.add_argument("--work", type=Path, help="folder to work in (default: a temporary one)")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    work = Path(args.work or tempfile.mkdtemp(prefix="soak-")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    write_rows(work / "rows.jsonl")
    start = starters(work, write_data(work / "data"), write_data(work / "small", pictures=40))
    import hydit_core.pipeline  # before the forks
    import hydit_core.text.encoders
    import hydit_core.vae  # noqa: F401

    passed = [
        training.soak(Command, work, args.times or TIMES[kind], args.seed, args.steps)
        if kind == "training"
        else soak(kind, start[kind], work, args.times or TIMES[kind], args.seed)
        for kind in args.only
    ]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    raise SystemExit(main())
