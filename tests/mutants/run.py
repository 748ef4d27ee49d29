"""Wrong formulas on purpose: change sampled places of the library and see whether a test fails each time.

    python tests/mutants/run.py                 goes on until all of the sample have a result
    python tests/mutants/run.py --again         tries the survivors again, after tests were added
    python tests/mutants/run.py --report        the figure and the survivors, nothing is run

A change is tried in a copy of the tree, with the tests that run the changed lines. Results go line by line
into FOLDER/results.jsonl, so that it may be stopped at any time; earlier ones, kept in
tests/mutants/results.jsonl, count as well. What no test can tell from the right code is listed with a reason
in tests/mutants/equivalent.jsonl and left out of the figure. Python's heavy imports are made once: each
change is tried in a forked child. Linux and macOS.
"""

from __future__ import annotations

import argparse
import compileall
import difflib
import functools
import hashlib
import importlib
import json
import math
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cover import Recorder, Selection
from sites import Site, find, sample
from warm import Loop, Pairs, replacements, wait

Run = Callable[[list[str]], tuple[str, str]]
"""runs tests by name: "survived", "killed", "timeout" or "silent", and the one that failed"""
ROOT = Path(__file__).resolve().parents[2]
FIRST = 12
"""tests of a change that are run before the others are collected"""
SURE = 0.5
"""seconds of a test that fails for no other reason than the change"""
TESTS = ("tests/unit", "tests/parity")
PARTS = ("model", "diffusion", "lora", "train", "data", "text", "weights")
EQUIVALENT = Path(__file__).with_name("equivalent.jsonl")
EARLIER = Path(__file__).with_name("results.jsonl")
HEAVY = (
    "torch", "torch.utils.data", "torch.utils.checkpoint", "torch.utils.tensorboard", "numpy",
    "PIL.ImageDraw", "safetensors.torch", "pydantic", "pyarrow", "pyarrow.parquet", "transformers",
    "diffusers", "peft", "diffusers.models.transformers.hunyuan_transformer_2d", "sentencepiece", "cv2",
    "tqdm", "pytest",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "mutants")
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of tests for one change")
    parser.add_argument("--jobs", type=int, default=1, help="changes that are tried at the same time")
    parser.add_argument("--again", action="store_true", help="try survivors again")
    parser.add_argument("--report", action="store_true", help="only say what was found")
    parser.add_argument("--collect", action="store_true", help="only find out which test runs which line")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    results = args.folder / "results.jsonl"
    sites = sample(all_sites(), args.count, args.seed)
    if not args.report:
        os.nice(10)
        preload()
        with tempfile.TemporaryDirectory(prefix="mutants-") as name:
            tree = copy_tree(Path(name) / "tree")
            covered = cover(tree, args.folder / "lines.json")
            done = read(EARLIER) | read(results)
            todo = [
                site
                for site in sites
                if site.id not in done or (args.again and done[site.id]["verdict"] == "survived")
            ]
            if not args.collect:
                try_all(todo, tree, covered, args.budget, results, args.jobs)
    return report(sites, read(EARLIER) | read(results))


def all_sites() -> list[Site]:
    found = []
    for part in PARTS:
        for path in sorted((ROOT / "hydit_core" / part).rglob("*.py")):
            found += find(path.relative_to(ROOT).as_posix(), path.read_bytes())
    return found


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The newest entry of each site in a file of one JSON object a line."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {entry["id"]: entry for entry in map(json.loads, lines)}


# -- the copy, and children in it --------------------------------------------------------------------------


def preload() -> None:
    """Import what tests use, but nothing of the library."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in HEAVY:
        try:
            importlib.import_module(name)
        except ImportError:
            print(f"without {name}")
    import torch

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True  # a stale one would hide a change


def copy_tree(target: Path) -> Path:
    """What git knows of the working tree, compiled so that only unchanged content is taken from the cache."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    checked = py_compile.PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(target / "hydit_core", quiet=1, invalidation_mode=checked)
    # pytest keeps what it makes of the tests, which do not change here.
    collect = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-c", "tests/pytest.ini", *TESTS]
    env = {**os.environ, "PYTHONPATH": str(target), "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run(collect, cwd=target, env=env, capture_output=True, check=False)
    return target


def run_tests(
    tree: Path, files: list[str], plugin: Any, timeout: float, then: Callable[[], object]
) -> int | None:
    """pytest in a forked child, which calls ``then`` at its end: its exit code, or None after ``timeout``."""
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            os.chdir(tree)
            sys.path.insert(0, str(tree))
            null = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(null, stream)
            import pytest

            temporary = tempfile.mkdtemp(prefix="mutant-", dir=tree.parent)
            options = [
                "-x",
                "-q",
                "-p",
                "no:cacheprovider",
                "--basetemp",
                f"{temporary}/t",
                "--rootdir",
                "tests",
            ]
            code = int(pytest.main([*options, "-c", "tests/pytest.ini", *files], plugins=[plugin]))
            then()
            shutil.rmtree(temporary, ignore_errors=True)
            os._exit(code)
        finally:
            os._exit(70)
    ended, status = wait(child, timeout)
    return os.waitstatus_to_exitcode(status) if ended else None


# -- which test runs which line ----------------------------------------------------------------------------


def cover(tree: Path, store: Path) -> dict[str, dict[str, Any]]:
    """Tests by name with their seconds and lines; what ``store`` has up to date is taken from there."""
    known: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}
    prefix = f"{tree}/hydit_core/"
    files = sorted(path for folder in TESTS for path in (tree / folder).glob("test_*.py"))
    for path in files:
        name = path.relative_to(tree).as_posix()
        if name in known and _fresh(tree, name, known[name]):
            continue
        recorder, out = Recorder(prefix), tree.parent / "lines.json"
        out.unlink(missing_ok=True)

        def write(recorder: Recorder = recorder, out: Path = out) -> None:
            out.write_text(json.dumps(recorder.tests))

        start = time.monotonic()
        run_tests(tree, [name, "--maxfail=1000"], recorder, 900, write)
        tests = json.loads(out.read_text()) if out.exists() else {}
        sources = {file for test in tests.values() for file in test["lines"]}
        known[name] = {
            "hash": _hash(path),
            "sources": {file: _hash(tree / "hydit_core" / file) for file in sorted(sources)},
            "tests": tests,
        }
        store.write_text(json.dumps(known))
        print(f"{len(tests):4} tests, {time.monotonic() - start:6.1f} s  {name}", flush=True)
    return {test: entry for path in files for test, entry in _entries(known, tree, path)}


def _entries(known: dict[str, Any], tree: Path, path: Path) -> list[tuple[str, dict[str, Any]]]:
    name = path.relative_to(tree).as_posix()
    return [(test, {**entry, "file": name}) for test, entry in known[name]["tests"].items()]


def _fresh(tree: Path, name: str, entry: dict[str, Any]) -> bool:
    sources = entry["sources"].items()
    return entry["hash"] == _hash(tree / name) and all(
        _hash(tree / "hydit_core" / file) == digest for file, digest in sources
    )


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else ""


def tests_of(site: Site, covered: dict[str, dict[str, Any]], budget: float) -> list[str]:
    """The tests that run the changed lines, fast ones that run little else first, as far as time allows.

    After them come those that run other lines of the file: what a function keeps for later calls was run by
    the first test that called it, and only there. So do tests that are named after the file: they may run it
    in processes of their own.
    """
    file = site.path.removeprefix("hydit_core/")
    chosen = []
    for name, entry in covered.items():
        lines = entry["lines"].get(file, [])
        if lines or entry["file"].endswith(f"_{Path(file).name}"):
            near = site.lines is None or any(site.lines[0] <= n <= site.lines[1] for n in lines)
            breadth = sum(map(len, entry["lines"].values()))
            chosen.append((not near, entry["seconds"] * breadth**0.5, name))
    chosen.sort()
    spent, names = 0.0, []
    for _, _, name in chosen:
        spent += covered[name]["seconds"]
        if names and spent > budget:
            break
        names.append(name)
    return names


# -- the changes -------------------------------------------------------------------------------------------


def try_all(
    sites: list[Site],
    tree: Path,
    covered: dict[str, dict[str, Any]],
    budget: float,
    results: Path,
    jobs: int,
) -> None:
    """Try the sites in ``jobs`` processes, each with a tree of its own, and append to ``results``."""
    for number in range(1, jobs):
        own = shutil.copytree(tree, tree.parent / str(number) / "tree")
        if os.fork() == 0:
            try:
                try_all(sites[number::jobs], own, covered, budget, results, 1)
            finally:
                os._exit(0)
    screen = os.dup(1)

    def note(site: Site, run: Run) -> None:
        result = try_site(site, tree, covered, budget, run)
        if result["verdict"] == "silent":
            return
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
        os.write(screen, f"{result['verdict']:9} {result['seconds']:6.1f} s  {site.id}\n".encode())

    mine, warm = sites[::jobs], []
    for site in mine:
        source = (tree / site.path).read_bytes()
        pairs = replacements(str(tree / site.path), source, site.apply(source))
        if pairs is not None:
            warm.append((site, pairs))

    def work(loop: Loop) -> None:
        for site, pairs in warm:
            note(site, functools.partial(_warm, loop, pairs, covered))

    if warm:
        run_tests(tree, list(TESTS), Loop(work), math.inf, lambda: None)
    tried = read(results).keys() & {site.id for site, _ in warm}
    for site in mine:
        if site.id not in tried:
            note(site, functools.partial(_cold, tree, covered))
    for _ in range(1, jobs):
        os.wait()


def try_site(
    site: Site, tree: Path, covered: dict[str, dict[str, Any]], budget: float, run: Run
) -> dict[str, Any]:
    """Most changes are seen by the first few tests; ``run`` tells of each lot which one failed."""
    path, start = tree / site.path, time.monotonic()
    source = path.read_bytes()
    names = tests_of(site, covered, budget)
    verdict, killer = "survived", ""
    path.write_bytes(site.apply(source))
    try:
        for some in (names[:FIRST], sorted(names[FIRST:], key=lambda name: covered[name]["file"])):
            if some and verdict == "survived":
                verdict, killer = _verdict(run, covered, some)
    finally:
        path.write_bytes(source)
    seconds = round(time.monotonic() - start, 1)
    return {"id": site.id, "verdict": verdict, "by": killer, "tests": len(names), "seconds": seconds}


def _verdict(run: Run, covered: dict[str, dict[str, Any]], names: list[str]) -> tuple[str, str]:
    """What becomes of the changed tree under these tests, and the first test that failed.

    A slow one, which a busy machine may have made fail, must fail again when it runs alone.
    """
    verdict, name = run(names)
    if (
        len(names) > 1
        and name in covered
        and covered[name]["seconds"] > SURE
        and run([name])[0] == "survived"
    ):
        return _verdict(run, covered, [other for other in names if other != name])
    return verdict, name


def _seconds(covered: dict[str, dict[str, Any]], names: list[str]) -> float:
    return sum(covered[name]["seconds"] for name in names)


def _warm(loop: Loop, pairs: Pairs, covered: dict[str, dict[str, Any]], names: list[str]) -> tuple[str, str]:
    """In a child that has imported and collected everything, and gets the changed functions."""
    verdict, name = loop.try_tests(pairs, names, 20 + 3 * _seconds(covered, names))
    if name and not loop.is_sound(name):
        return _warm(loop, pairs, covered, [other for other in names if other != name])
    return verdict, name


def _cold(tree: Path, covered: dict[str, dict[str, Any]], names: list[str]) -> tuple[str, str]:
    """In a child that has imported nothing of the library: for what is run on import."""
    selection, failed = Selection(names), tree.parent / "failed"
    failed.write_text("")
    files = list(dict.fromkeys(covered[name]["file"] for name in names))
    limit = 60 + 4 * _seconds(covered, names)
    code = run_tests(tree, files, selection, limit, lambda: failed.write_text(selection.failed))
    if code is None:
        return "timeout", ""
    return ("survived", "") if code in (0, 5) else ("killed", failed.read_text())


def report(sites: list[Site], results: dict[str, dict[str, Any]]) -> int:
    """The survivors' differences and the figure; 1 if fewer than nine of ten were killed."""
    reasons = read(EQUIVALENT)
    tried = [site for site in sites if site.id in results]
    alive = [site for site in tried if results[site.id]["verdict"] == "survived"]
    open_ = [site for site in alive if site.id not in reasons]
    for site in open_:
        print(f"\n{site.id}  ({results[site.id]['tests']} tests run it)")
        print(difference(site))
    counted = len(tried) - (len(alive) - len(open_))
    killed = len(tried) - len(alive)
    share = 100 * killed / counted if counted else 0.0
    print(
        f"\n{len(tried)} of {len(sites)} sampled changes tried: {killed} killed, {len(open_)} survived, "
        f"{len(alive) - len(open_)} equivalent; {share:.1f} % of those that can be told are killed"
    )
    return int(len(tried) < len(sites) or share < 90)


def difference(site: Site) -> str:
    source = (ROOT / site.path).read_bytes()
    old, new = (text.decode().splitlines() for text in (source, site.apply(source)))
    return "\n".join(list(difflib.unified_diff(old, new, site.path, site.path, n=1, lineterm=""))[2:])


if __name__ == "__main__":
    sys.exit(main())
