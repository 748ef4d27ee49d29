"""Train the whole second edition on one GPU in minutes: autoencoder, DiT and text encoders, ControlNet.

    python gpu_run.py --out OUT --trial             speeds, and whether everything works; about 200 s
    python gpu_run.py --out OUT --seconds 520 [--vae stages/vae.safetensors]

Every stage has its share of the time and leaves its results in OUT: ``vae.safetensors``,
``model.safetensors`` (copied at every checkpoint), ``canny.safetensors``, ``judge.zip``, ``logs.txt``,
``records.zip``. A stage that fails or takes too long does not stop the others.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = HERE / "work"


@dataclass
class Job:
    """A stage's process, its log and its results."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    exports: dict[Path, Path]
    started: float = field(default_factory=time.monotonic)
    copied: dict[Path, float] = field(default_factory=dict)

    def copy_new(self) -> None:
        for source, target in self.exports.items():
            if source.exists() and source.stat().st_mtime != self.copied.get(source):
                self.copied[source] = source.stat().st_mtime
                shutil.copyfile(source, target.with_suffix(".part"))
                os.replace(target.with_suffix(".part"), target)


class Driver:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out
        self.begin = time.monotonic()
        self.jobs: list[Job] = []
        self.out.mkdir(parents=True, exist_ok=True)
        for folder in ("scenes", "vae", "cache", "run", "canny", "judge", "logs"):
            shutil.rmtree(WORK / folder, ignore_errors=True)  # of an earlier trial
        (WORK / "logs").mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self.args.seconds - (time.monotonic() - self.begin)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begin:6.1f} s] {text}", flush=True)

    def start(self, name: str, command: list[str], exports: dict[Path, Path] | None = None) -> Job:
        log = WORK / "logs" / f"{name}.log"
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": self._path(),
            "TQDM_MININTERVAL": "5",
        }
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=HERE,
            env=environment,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
        )
        self.say(f"{name}: {' '.join(command)}")
        self.jobs.append(job := Job(name, process, log, exports or {}))
        return job

    def _path(self) -> str:
        return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

    def wait(self, job: Job, limit: float) -> bool:
        """Wait at most ``limit`` seconds for its end, copying its results; True if it succeeded."""
        end = time.monotonic() + max(limit, 1)
        while job.process.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
            job.copy_new()
        if job.process.poll() is None:  # the trainer saves and exports on SIGINT
            self.say(f"{job.name}: out of time, asked to stop")
            job.process.send_signal(signal.SIGINT)
            try:
                job.process.wait(15)
            except subprocess.TimeoutExpired:
                job.process.kill()
                job.process.wait()
        job.copy_new()
        code = job.process.returncode
        result = f"FAILED ({code})" if code else "done"
        self.say(f"{job.name}: {result} in {time.monotonic() - job.started:.1f} s")
        if code:
            print(job.log.read_text("utf-8", "replace")[-3000:], flush=True)
        self.collect()
        return code == 0

    def collect(self) -> None:
        """Logs and records as they are now."""
        text = "".join(f"=== {j.name}\n{j.log.read_text('utf-8', 'replace')[-200_000:]}\n" for j in self.jobs)
        (self.out / "logs.txt").write_text(text.replace("\r", "\n"), "utf-8")
        records = [WORK / "vae" / "vae.jsonl", WORK / "vae" / "vae_report.json"]
        records += [WORK / run / "metrics.jsonl" for run in ("run", "canny")]
        with zipfile.ZipFile(self.out / "records.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in records:
                if path.exists():
                    archive.write(path, f"{path.parent.name}-{path.name}")

    # -- stages ------------------------------------------------------------------------------

    def scenes(self) -> Job:
        share = ["--share", str(self.args.share)] if self.args.share < 1 else []
        command = ["scenes.py", "draw", "--icons", "work/icons.zip", "--out", "work/scenes", *share]
        return self.start("scenes", command)

    def vae(self) -> bool:
        args = self.args
        if args.vae:
            (WORK / "vae").mkdir(parents=True)
            shutil.copyfile(args.vae, WORK / "vae" / "vae.safetensors")
            return True
        command = ["train_vae.py", "--icons", "work/icons.zip", "--out", "work/vae", "--device", args.device]
        command += ["--seconds", str(args.vae_seconds), *args.vae_options.split()]
        job = self.start("vae", command, {WORK / "vae" / "vae.safetensors": self.out / "vae.safetensors"})
        return self.wait(job, args.vae_seconds + args.vae_grace)

    def train(self, name: str, config: str, steps: int, limit: float, export: str) -> bool:
        run = WORK / name
        sets = [f"run.steps={steps}", f"run.device={self.args.device}", *self.args.sets]
        command = ["-m", "hydit_core.train", config, *(x for s in sets for x in ("--set", s))]
        return self.wait(self.start(name, command, {run / "model.safetensors": self.out / export}), limit)

    def train_until(self, name: str, config: str, seconds: float, export: str) -> bool:
        """Train for ``seconds`` in all, the learning rate's decay included.

        The first steps, at a constant rate, show how many there is time for; if that differs from what the
        run was started with, it is stopped and continues with the new number.
        """
        end = time.monotonic() + seconds
        metrics = WORK / name / "metrics.jsonl"
        exports = {WORK / name / "model.safetensors": self.out / export}
        guess = self.args.guess_steps
        sets = [f"run.device={self.args.device}", *self.args.sets]
        command = ["-m", "hydit_core.train", config, *(x for s in sets for x in ("--set", s))]
        job = self.start(name, [*command, "--set", f"run.steps={guess}"], exports)
        while job.process.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
            last = last_record(metrics)
            if last["seconds"] >= self.args.measure_seconds and last["step"] >= 50:
                break
        step, pace = last_record(metrics)["step"], guarded_rate(metrics, 20)
        if job.process.poll() is not None or not pace:
            return self.wait(job, end - time.monotonic())
        steps = step + int(pace * 0.96 * (end - time.monotonic() - self.args.restart_seconds))
        self.say(f"{name}: {pace:.2f} steps/s at step {step}, time for {steps} steps")
        if abs(steps / guess - 1) > 0.05 and step < 0.4 * min(guess, steps):
            self.wait(job, 0)
            more = ["--resume", "auto", "--set", f"run.steps={steps}"]
            job = self.start(f"{name}-on", [*command, *more], exports)
        return self.wait(job, end - time.monotonic())

    def cache(self, config: str) -> bool:
        sets = [f"run.device={self.args.device}", *self.args.sets]
        command = ["-m", "hydit_core.train", "cache", config, *(x for s in sets for x in ("--set", s))]
        command += ["--set", f"data.workers={min(16, os.cpu_count() or 1)}"]
        return self.wait(self.start("cache", command), max(self.left() - 100, 60))

    def judge(self) -> Job:
        args = self.args
        command = ["judge.py", "--icons", "work/icons.zip", "--out", "work/judge", "--device", args.device]
        command += ["--model", str(self.out / "model.safetensors"), "--batch", str(args.judge_batch)]
        return self.start("judge", [*command, *args.judge_options.split()])

    def pack_judge(self) -> None:
        with zipfile.ZipFile(self.out / "judge.zip", "w") as archive:
            for path in sorted((WORK / "judge").glob("*")):
                archive.write(path, path.name)


def last_record(metrics: Path) -> dict[str, float]:
    """The last line with a time; zeros if there is none yet."""
    lines = metrics.read_text("utf-8").splitlines() if metrics.exists() else []
    for line in reversed(lines):
        if '"seconds"' in line and line.endswith("}"):
            return json.loads(line)
    return {"step": 0, "seconds": 0.0}


def rate(metrics: Path, skip: int) -> float:
    """Steps per second after the first ``skip``, without the time that validation took at the beginning."""
    records = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    timed = [(r["step"], r["seconds"]) for r in records if "seconds" in r and r["step"] >= skip]
    (first, before), (last, after) = timed[0], timed[-1]
    return (last - first) / max(after - before, 1e-9)


def guarded_rate(metrics: Path, skip: int) -> float:
    try:
        return rate(metrics, skip)
    except (OSError, IndexError, ValueError):
        return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=470, help="for everything")
    parser.add_argument("--trial", action="store_true", help="few pictures and steps, to measure the rates")
    parser.add_argument("--share", type=float, default=1.0, help="of the pictures")
    parser.add_argument("--vae", type=Path, help="a finished autoencoder, instead of training one")
    parser.add_argument("--vae-seconds", type=float, default=100)
    parser.add_argument("--vae-grace", type=float, default=60, help="seconds for its start and its end")
    parser.add_argument("--vae-options", default="")
    parser.add_argument("--dit-steps", type=int, default=0, help="default: as many as there is time for")
    parser.add_argument("--guess-steps", type=int, default=6000, help="until the pace is known")
    parser.add_argument("--measure-seconds", type=float, default=35, help="of training, to know the pace")
    parser.add_argument("--restart-seconds", type=float, default=25, help="what going on costs")
    parser.add_argument("--control-steps", type=int, default=0, help="default: as many as there is time for")
    parser.add_argument("--reserve", type=float, default=105, help="seconds kept for ControlNet and judge")
    parser.add_argument("--judge-options", default="")
    parser.add_argument("--judge-batch", type=int, default=64)
    parser.add_argument("--set", dest="sets", action="append", default=[], help="for the trainer, both runs")
    args = parser.parse_args()
    if args.trial:
        args.share, args.vae_seconds = min(args.share, 0.08), min(args.vae_seconds, 14)
        args.dit_steps, args.control_steps = args.dit_steps or 320, args.control_steps or 80
        args.judge_options = args.judge_options or "--share 0.1"
    driver = Driver(args)
    try:
        everything(driver)
    finally:
        driver.collect()
        for job in driver.jobs:
            if job.process.poll() is None:
                job.process.kill()
    driver.say(
        "files: " + ", ".join(f"{p.name} {p.stat().st_size / 1e6:.2f} MB" for p in sorted(args.out.iterdir()))
    )


def everything(driver: Driver) -> None:
    args = driver.args
    scenes = driver.scenes()
    if not (driver.vae() and driver.wait(scenes, 120)):
        return
    report = WORK / "vae" / "vae_report.json"
    if report.exists():
        driver.say("vae: " + " ".join(report.read_text("utf-8").split()))
    driver.cache("icons256.toml")
    seconds = driver.left() - args.reserve
    if args.dit_steps:
        driver.train("run", "icons256.toml", args.dit_steps, seconds, "model.safetensors")
    else:
        driver.train_until("run", "icons256.toml", seconds, "model.safetensors")
    pace = guarded_rate(WORK / "run" / "metrics.jsonl", 100)
    driver.say(f"DiT: {pace:.2f} steps/s")
    if not (driver.out / "model.safetensors").exists():
        return
    judge = driver.judge()
    # A step of the ControlNet takes about as long as one of the whole DiT.
    steps = args.control_steps or int(0.8 * pace * max(0.0, driver.left() - 45))
    if steps > 100 or args.control_steps:
        driver.say(f"ControlNet: {steps} steps")
        driver.train("canny", "../controlnet/canny256.toml", steps, driver.left() - 14, "canny.safetensors")
        driver.say(f"ControlNet: {guarded_rate(WORK / 'canny' / 'metrics.jsonl', 30):.2f} steps/s")
    driver.wait(judge, driver.left() - 5)
    driver.pack_judge()


if __name__ == "__main__":
    main()
