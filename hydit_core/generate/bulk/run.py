"""Drawing a job's shards: in this process, in those that torchrun started, or on Ray."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from tqdm import tqdm

from ...errors import ConfigError
from .drawer import Done, Drawer
from .job import Job, claimed


def run(args: argparse.Namespace, argv: Sequence[str], rank: int, world: int) -> None:
    """Draw what is missing of the shards: all, or every ``world``-th from number ``rank`` on.

    ``argv`` is the command line that ``args`` are of. Raises :class:`HyditError`.
    """
    is_main = rank == 0
    if args.engine == "ray" and world > 1:
        raise ConfigError("--engine ray needs no torchrun: start it once, and Ray starts the others")
    with tqdm(desc="rows", unit="", disable=None if is_main else True) as bar:
        job = Job(args, lambda rows: bar.update(rows - bar.n))
    if is_main and (unused := job.prompts.unused()):
        print(f"columns that are not used: {', '.join(unused)}", file=sys.stderr)
    with claimed(job.folder, rank):
        todo = job.missing(range(rank, job.asked.count, world))
        if not todo:
            _tell_end(job, [], is_main)
            return
        total = sum(job.rows_of(shard) for shard in todo)
        done: list[Done] = []
        with tqdm(total=total, unit="picture", disable=None if is_main else True) as bar:
            drawn = _on_ray(job, argv, todo, bar) if args.engine == "ray" else _here(job, todo, bar, is_main)
            for one in drawn:
                bar.clear()
                print(one.path, flush=True)
                done.append(one)
        _tell_end(job, done, is_main)


def _here(job: Job, todo: Sequence[int], bar: tqdm[NoReturn], is_main: bool) -> Iterator[Done]:
    drawer = Drawer(job, quiet=not is_main)
    for shard in job.missing(todo):
        yield drawer.draw(shard, bar.update)


def _on_ray(job: Job, argv: Sequence[str], todo: Sequence[int], bar: tqdm[NoReturn]) -> Iterator[Done]:
    from .on_ray import draw

    for done in draw(job, argv, todo):
        bar.update(done.drawn + done.skipped)
        yield done


def _tell_end(job: Job, done: Sequence[Done], is_main: bool) -> None:
    skipped, cut = sum(one.skipped for one in done), sum(one.cut for one in done)
    if cut:
        first = next(one.first_cut for one in done if one.cut)
        print(f"warning: {cut} prompts are longer than the encoders take, first {first}", file=sys.stderr)
    if skipped:
        print(f"warning: {skipped} rows left out; see *.skipped.json in {job.folder}", file=sys.stderr)
    if is_main and not done:
        print(f"all {job.asked.count} shards of {job.folder} are there", file=sys.stderr)
