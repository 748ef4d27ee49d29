"""A Ray cluster: joined where there is one, else started on this machine and ended afterwards.

What travels between processes is plain data, errors included, so that machines need only have the same files.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ConfigError, HyditError

_STORE_BYTES = 100 << 20
"""For what processes of a cluster of this machine alone hand to each other: rows and texts, a few MB."""

_STARTS = 3
"""How often a cluster of this machine alone is started that does not come up."""


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
        connect(module)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own would end the process at once
    try:
        yield module
    finally:
        if ours:
            module.shutdown()


def connect(module: Any) -> None:
    """See :func:`cluster`. Raises :class:`ConfigError` where Ray does not start."""
    # Workers on this machine find this package where this process did; others have it installed.
    paths = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "RAY_USAGE_STATS_ENABLED": "0"}
    options = {"runtime_env": {"env_vars": environment}, "logging_level": "error", "log_to_driver": False}
    # Not address="auto", which also takes the private cluster of another command, and ends with it.
    ours = {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
    os.environ.setdefault("RAY_worker_niceness", "0")  # else 15: whatever else runs would come first
    try:
        if "RAY_ADDRESS" in os.environ:
            module.init(**options)
            return
        try:
            _start(module, {**ours, **options})
        except ValueError:  # which is said of a cluster that `ray start` began
            module.init(**options)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"cannot connect to Ray ({reason}); `ray stop` ends what is left of one") from None


def _start(module: Any, options: dict[str, Any]) -> None:
    """A cluster of this machine alone. Where all cores are busy, Ray's processes may not start in time."""
    for further in reversed(range(_STARTS)):
        try:
            module.init(**options)
            return
        except ValueError:
            raise
        except Exception:  # which Ray raises itself
            module.shutdown()  # what it has started
            if not further:
                raise


def gpus(module: Any) -> int:
    """How many the cluster has."""
    return int(module.cluster_resources().get("GPU", 0))


def told(error: HyditError) -> tuple[str, str]:
    """An error as plain data, for :func:`raised`: of which kind it is, and its text."""
    kind = next((kind for kind in HyditError.__subclasses__() if isinstance(error, kind)), HyditError)
    return kind.__name__, str(error)


def raised(kind: str, text: str) -> HyditError:
    """What :func:`told` tells of."""
    kinds = {known.__name__: known for known in HyditError.__subclasses__()}
    return kinds.get(kind, HyditError)(*text.split("\n"))


@contextmanager
def in_words(retries: int, over: str) -> Iterator[None]:
    """Raise what Ray raises as a :class:`HyditError`; ``over`` says what a worker dies over."""
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RayError as error:
        reason = str(error).strip().splitlines()[-1][:300]
        if isinstance(error, RayTaskError):  # of its own code, a GPU's memory above all
            raise HyditError(f"a worker failed: {reason}") from None
        raise HyditError(
            f"a worker died {retries + 1} times over {over} ({type(error).__name__}: {reason}); is "
            "there enough memory?"
        ) from None
