"""Shards on a Ray cluster: workers that each load the model once, and shards of dead ones drawn again.

What travels between processes are texts and numbers, so that machines need only have the same files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from ...errors import HyditError
from ...ray_cluster import cluster, gpus, in_words, raised, told
from .drawer import Done, Drawer
from .job import Job
from .rows import Shape

_RETRIES = 3
"""How often a shard is tried whose worker dies."""


class Worker:
    """A process with the model; as plain data, what :class:`~.drawer.Drawer` does.

    Args:
        folder: in which the command line was given.
        argv: the command line.
        shapes: the shapes of rows, with their places, that were not checked before.
    """

    def __init__(self, folder: str, argv: list[str], shapes: list[tuple[tuple[Any, ...], str]]) -> None:
        self._given = folder, argv, shapes
        self._drawer: Drawer | None = None

    def draw(self, shard: int) -> tuple[str, ...] | tuple[Any, ...]:
        """A :class:`~.drawer.Done`, or the class name and the text of an error."""
        try:
            if self._drawer is None:
                self._drawer = self._load()
            job = self._drawer.job
            if not job.missing([shard]):  # drawn before its worker died
                return Done(str(job.path(shard)), job.rows_of(shard), 0, 0, "")
            return self._drawer.draw(shard)
        except HyditError as error:
            return told(error)

    def _load(self) -> Drawer:
        from ..options import parser

        folder, argv, shapes = self._given
        os.chdir(folder)
        job = Job(parser().parse_args(argv), checked=True)
        job.shapes = {Shape(*shape): where for shape, where in shapes}
        return Drawer(job, quiet=True)


def draw(job: Job, argv: Sequence[str], shards: Sequence[int]) -> Iterator[Done]:
    """Draw shards, in whatever order they become ready.

    Raises :class:`HyditError` for what a worker cannot draw, and for one that dies again and again.
    """
    with cluster() as module:
        from ray.util import ActorPool

        found = gpus(module)
        count = min(len(shards), job.args.workers or max(1, found))
        on_gpu = found > 0 and not job.args.device.startswith("cpu")
        remote = module.remote(Worker).options(
            num_gpus=1 if on_gpu else 0, num_cpus=1, max_restarts=-1, max_task_retries=_RETRIES
        )
        given = os.getcwd(), list(argv), [(tuple(shape), where) for shape, where in job.shapes.items()]
        pool = ActorPool([remote.remote(*given) for _ in range(count)])
        with in_words(_RETRIES, "one shard"):
            for result in pool.map_unordered(lambda actor, shard: actor.draw.remote(shard), list(shards)):
                if len(result) == 2:
                    raise raised(*result)
                yield Done(*result)
