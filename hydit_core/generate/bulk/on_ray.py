"""Shards on a Ray cluster: workers that each load the model once, and shards of dead ones drawn again.

What travels between processes are texts and numbers, so that machines need only have the same files.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import ConfigError, HyditError
from .drawer import Done, Drawer
from .job import Job
from .rows import Shape

_RETRIES = 3
"""How often a shard is tried whose worker dies."""
_STORE_BYTES = 100 << 20
"""For objects that workers share, of which there are none."""


def ray() -> Any:
    """Ray, which then tells nobody that it is used. Raises :class:`ConfigError` where it is missing."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray as module
    except ImportError as error:
        raise ConfigError("--engine ray needs Ray: pip install 'hydit[scale]'") from error
    return module


@contextmanager
def cluster() -> Iterator[Any]:
    """Ray, connected to the cluster that is there, else to one of this machine alone, which then ends."""
    module = ray()
    ours = not module.is_initialized()
    if ours:
        handler = signal.getsignal(signal.SIGTERM)
        _connect(module)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own would end the process at once
    try:
        yield module
    finally:
        if ours:
            module.shutdown()


def _connect(module: Any) -> None:
    # Workers on this machine find this package where this process did; others have it installed.
    paths = [str(Path(__file__).resolve().parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "RAY_USAGE_STATS_ENABLED": "0"}
    told = {"runtime_env": {"env_vars": environment}, "logging_level": "error", "log_to_driver": False}
    # Not address="auto", which also takes the private cluster of another command, and ends with it.
    ours = {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
    os.environ.setdefault("RAY_worker_niceness", "0")  # else 15: whatever else runs would come first
    try:
        if "RAY_ADDRESS" in os.environ:
            module.init(**told)
            return
        try:
            module.init(**ours, **told)
        except ValueError:  # which is said of a cluster that `ray start` began
            module.init(**told)
    except Exception as error:  # Ray raises that itself where its own processes do not start in time
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"cannot connect to Ray ({reason}); `ray stop` ends what is left of one") from None


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
            return type(error).__name__, str(error)

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
        from ray.exceptions import RayError, RayTaskError
        from ray.util import ActorPool

        gpus = int(module.cluster_resources().get("GPU", 0))
        count = min(len(shards), job.args.workers or max(1, gpus))
        on_gpu = gpus > 0 and not job.args.device.startswith("cpu")
        remote = module.remote(Worker).options(
            num_gpus=1 if on_gpu else 0, num_cpus=1, max_restarts=-1, max_task_retries=_RETRIES
        )
        given = os.getcwd(), list(argv), [(tuple(shape), where) for shape, where in job.shapes.items()]
        pool = ActorPool([remote.remote(*given) for _ in range(count)])
        try:
            for result in pool.map_unordered(lambda actor, shard: actor.draw.remote(shard), list(shards)):
                if len(result) == 2:
                    kinds = {kind.__name__: kind for kind in HyditError.__subclasses__()}
                    raise kinds.get(result[0], HyditError)(*result[1].split("\n"))
                yield Done(*result)
        except RayError as error:
            reason = str(error).strip().splitlines()[-1][:300]
            if isinstance(error, RayTaskError):  # of its own code, a GPU's memory above all
                raise HyditError(f"a worker failed: {reason}") from None
            raise HyditError(
                f"a worker died {_RETRIES + 1} times over one shard ({type(error).__name__}: {reason}); is "
                "there enough memory?"
            ) from None
