"""Damage good files of every kind in every way, and check that each command reacts as it should.

    python tests/fuzz/fuzz.py --inputs 2000 [--seed 1] [--only TEXT] [--keep FOLDER]
    python tests/fuzz/fuzz.py --again [--keep FOLDER]      the kept inputs again, after a repair

For each input a child is forked from a warm process: a clean exit or one `error:` line, at most 2 seconds
of CPU and 200 MB beyond what the good file takes, no traceback, no crash, no control characters. What breaks
a rule is kept under ``--keep`` with a line in failures.jsonl. The same seed draws the same inputs.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
sys.path.append(str(HERE.parents[1]))

import child  # noqa: E402
import mutations  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import seed as with_seed  # noqa: E402
from seed import Seed  # noqa: E402
from seeds import Seeds  # noqa: E402

from hydit_core.lora.adapter import Adapter  # noqa: E402
from hydit_core.lora.summary import fitting  # noqa: E402

ROUND = 1000
WRITERS = ("generate.__main__", "weights.__main__", "lora.__main__")
"""What these make is one file or folder, which a refusal must not leave begun."""


class Run:
    """The inputs of one run, what the good files cost, and what went wrong."""

    def __init__(self, work: Path, keep: Path) -> None:
        self.work, self.keep = work, keep
        self.good: dict[str, child.Outcome] = {}
        self.counts: collections.Counter[str] = collections.Counter()
        self.failures: dict[tuple[str, str], str] = {}

    def try_good(self, seed: Seed) -> str | None:
        """The undamaged file must pass, or the damaged ones would tell nothing; else what it says."""
        outcome = self.good[seed.name] = self._run(seed, None)
        if outcome.code == 0:
            return None
        return f"{seed.name}: the good file fails (exit {outcome.code}):\n{outcome.text[-1000:]}"

    def try_damaged(self, seed: Seed, drawn: list[mutations.Mutation]) -> None:
        content = (seed.folder / seed.file).read_bytes()
        damaged = mutations.apply(content, drawn)
        outcome = self._run(seed, damaged)
        self.counts["accepted" if outcome.code == 0 else "refused"] += 1
        wrong = child.complaint(outcome, self.good[seed.name])
        if wrong and outcome.code is not None and child.is_costly(outcome, self.good[seed.name]):
            outcome = self._run(seed, damaged)  # on a crowded machine the same work takes more of everything
            wrong = child.complaint(outcome, self.good[seed.name])
        if wrong:
            self._record(seed, drawn, damaged, wrong, outcome)

    def try_kept(self, seeds: list[Seed]) -> None:
        """The damaged files of an earlier run."""
        lines = (self.keep / "failures.jsonl").read_text("utf-8").splitlines()
        named = {seed.name: seed for seed in seeds}
        for kept in map(json.loads, lines):
            seed = named[kept["seed"]]
            outcome = self._run(seed, (self.keep / kept["file"]).read_bytes())
            self.counts["accepted" if outcome.code == 0 else "refused"] += 1
            if wrong := child.complaint(outcome, self.good[seed.name]):
                self.counts["wrong"] += 1
                self.failures[seed.door, kept["file"]] = wrong
            print(f"{kept['file']}, {seed.name}: {wrong or outcome.text.strip()[-300:]}")

    def verdict(self) -> str:
        counts = self.counts
        told = f"{counts['accepted']} accepted, {counts['refused']} refused, {counts['wrong']} wrong"
        return f"{told} in {len(self.failures)} places"

    def _run(self, seed: Seed, content: bytes | None) -> child.Outcome:
        folder = self.work / "case"
        shutil.rmtree(folder, ignore_errors=True)
        seed.prepare(folder, content)
        return child.run(seed.command(), folder, whole=seed.door in WRITERS)

    def _record(
        self, seed: Seed, drawn: list[mutations.Mutation], damaged: bytes, wrong: str, outcome: child.Outcome
    ) -> None:
        where = next(
            (line for line in reversed(outcome.text.splitlines()) if line.startswith('  File "')), ""
        )
        place = (seed.door, where.strip() or wrong.split(":")[0])
        self.counts["wrong"] += 1
        if place in self.failures:
            return
        self.failures[place] = wrong
        self.keep.mkdir(parents=True, exist_ok=True)
        file = self.keep / f"{len(self.failures):03}-{Path(seed.file).name}"
        file.write_bytes(damaged)
        with open(self.keep / "failures.jsonl", "a", encoding="utf-8") as log:
            entry = {
                "seed": seed.name,
                "wrong": wrong,
                "file": file.name,
                "mutations": [vars(m) for m in drawn],
            }
            log.write(json.dumps({**entry, "text": outcome.text[-3000:]}) + "\n")
        print(f"WRONG {seed.name}: {wrong}\n      {where.strip()}\n      {drawn}", flush=True)


def warm(seeds: list[Seed]) -> None:
    """Import what the commands import, in this process, so that children start at once."""
    import diffusers  # noqa: F401
    import transformers  # noqa: F401

    for seed in seeds:
        seed.command()
    fitting(Adapter({}))  # builds the published models, once
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page that it counts on


def fuzz(run: Run, seeds: list[Seed], inputs: int, number: int) -> None:
    """``inputs`` inputs over the seeds, each as often as its weight says, in rounds over all of them."""
    cpu: collections.Counter[str] = collections.Counter()
    shares: collections.Counter[str] = collections.Counter()
    for start in range(0, inputs, ROUND):
        chances = random.Random(f"{number} {start}")
        drawn = chances.choices(seeds, [seed.weight for seed in seeds], k=min(ROUND, inputs - start))
        for seed, share in sorted(collections.Counter(drawn).items(), key=lambda pair: pair[0].name):
            before = _cpu()
            _inputs(run, seed, share, f"{number} {start} {seed.name}")
            cpu[seed.name] += _cpu() - before  # type: ignore[assignment]
            shares[seed.name] += share
        print(f"{shares.total()} inputs, {sum(cpu.values()):.0f} s of CPU: {run.verdict()}", flush=True)
    for name, seconds in cpu.most_common():
        print(f"{name}: {shares[name]} inputs, {seconds / shares[name] * 1000:.0f} ms of CPU each")


def _cpu() -> float:
    """Seconds of CPU, of this process and of its children."""
    return sum(os.times()[:4])


def _inputs(run: Run, seed: Seed, share: int, chances: str) -> None:
    @with_seed(chances)
    @settings(
        max_examples=share, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(mutations.mutations(seed.knowing))
    def one(drawn: list[mutations.Mutation]) -> None:
        run.try_damaged(seed, drawn)

    one()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="seeds whose name holds this")
    parser.add_argument("--keep", type=Path, default=HERE.parent / "artifacts" / "fuzz")
    parser.add_argument("--again", action="store_true", help="the kept files, not new ones")
    args = parser.parse_args()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        seeds = [seed for seed in Seeds(Path(folder) / "seeds").all if args.only in seed.name]
        warm(seeds)
        run = Run(Path(folder), args.keep)
        broken = [complaint for seed in seeds if (complaint := run.try_good(seed))]
        if broken:
            raise SystemExit("\n".join(broken))
        if args.again:
            run.try_kept(seeds)
        else:
            fuzz(run, seeds, args.inputs, args.seed)
    total = run.counts["accepted"] + run.counts["refused"]
    which = "kept" if args.again else f"seed {args.seed}"
    print(f"{which}: {total} inputs of {len(seeds)} kinds; {run.verdict()}")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
