"""One program on one process or many: ``python -m`` on a laptop, ``torchrun -m`` on several devices."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..devices import choose_device, named_device
from ..errors import ConfigError, HyditError
from .attempts import fresh_store

T = TypeVar("T")
_JOINING_SECONDS = 300.0
"""Seconds for all processes to appear at the start, imports on a busy machine included."""
_LEAVING_SECONDS = 5.0
"""Seconds for all processes to leave together."""


class Unanswered(HyditError):
    """Another process of this run ended, failed, or does not answer."""


@dataclass
class Processes:
    """This process among all of them. With one process every method is a no-op.

    ``limit`` is how many seconds a process may leave the others without an answer.
    """

    rank: int
    world: int
    device: torch.device
    limit: float = 240.0
    signs: _SignsOfLife | None = field(default=None, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def first_here(self) -> bool:
        """Whether this is the first process of its machine."""
        return int(os.environ.get("LOCAL_RANK", self.rank)) == 0

    def barrier(self) -> None:
        """Wait until all processes are here, however long one of them works, as long as it lives.

        Raises :class:`Unanswered` if one does not: it failed, ended, or gave no sign of life for ``limit``.
        """
        if self.signs is not None:
            self.signs.wait_for_all()

    def post(self, name: str, text: str) -> None:
        """Put a text where the other processes find it by its name; from any thread."""
        if self.signs is not None:
            self.signs.post(name, text)

    def posted(self, name: str) -> str:
        """The text that a process posts, once it has; waits as :meth:`barrier` does."""
        assert self.signs is not None
        return self.signs.posted(name)

    def fail(self, cause: str) -> None:
        """Tell those who wait in :meth:`barrier` that this process will not come."""
        if self.signs is not None:
            self.signs.fail(cause)

    def failure(self) -> str:
        """What another process said when it failed; empty if none did, or if that cannot be told any more."""
        if self.signs is None:
            return ""
        try:
            return self.signs.failure()
        except Unanswered:
            return ""

    def sum(self, values: Tensor) -> Tensor:
        """Sum of ``values`` over the processes (in place)."""
        if self.world > 1:
            with answered(self.limit):
                dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on at least one process."""
        if self.world == 1:
            return flag
        value = torch.tensor([float(flag)], device=self.device)
        return bool(self.sum(value).item())

    def gather(self, names: list[str]) -> list[str]:
        """The names of all processes, in order of their ranks."""
        if self.world == 1:
            return names
        found: list[list[str]] = [[] for _ in range(self.world)]
        with answered(self.limit):
            dist.all_gather_object(found, names)
        return [name for part in found for name in part]

    def from_main(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the first process, for all processes; the others do not call it.

        Its result has to be plain data. A :class:`HyditError` of it is raised in all of them.
        """
        if self.world == 1:
            return make()
        box: list[tuple[T | None, str]] = [(None, "")]
        failed: HyditError | None = None
        if self.is_main:
            try:
                box = [(make(), "")]
            except HyditError as error:
                failed, box = error, [(None, str(error))]
        self.barrier()
        with answered(self.limit):
            dist.broadcast_object_list(box, 0, device=self.device)
        made, told = box[0]
        if told:
            raise failed or ConfigError(told)
        return made  # type: ignore[return-value]

    def broadcast(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first process's ``tensors``, on the CPU; those of the others only tell names and shapes."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            sent = tensor.to(self.device).contiguous()
            with answered(self.limit):
                dist.broadcast(sent.view(-1).view(torch.uint8), 0)
            found[name] = sent.cpu()
        return found

    def close(self) -> None:
        if self.signs is not None:
            self.signs.close()
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def answered(limit: float) -> Iterator[None]:
    """Torch's errors of an exchange with the other processes become :class:`Unanswered`."""
    try:
        yield
    except dist.DistError as error:
        raise _unanswered(error, limit) from error
    except RuntimeError as error:
        # gloo's own errors have no class; those of a computation around it do not name it.
        if "gloo" in str(error).lower() or "nccl" in str(error).lower():
            raise _unanswered(error, limit) from error
        raise


def _unanswered(error: Exception, limit: float) -> Unanswered:
    if "timed out" in str(error).lower() or "timeout" in str(error).lower():
        return Unanswered(_silence("another process", limit))
    return Unanswered("another process of this run ended or failed")


def _silence(who: str, limit: float) -> str:
    return f"{who} of this run did not answer for {limit:g} s (run.answer_within)"


class _SignsOfLife:
    """What each process reports in the store that all of them share: alive, arrived, failed.

    A thread says that the process lives. Stopped, killed, or on a machine that is gone, it falls silent. The
    same thread asks the store, for a store whose keeper is stopped never answers.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, limit: float) -> None:
        self._store = store
        self._rank = rank
        self._world = world
        self._limit = limit
        self._barriers = 0
        self._no_answer = ""
        self._questions: queue.Queue[Callable[[], None] | None] = queue.Queue()
        store.set(f"alive-{rank}", "0")
        self._thread = threading.Thread(target=self._tell, args=(min(5.0, limit / 5),), daemon=True)
        self._thread.start()

    def _tell(self, pause: float) -> None:
        beats, last = 0, 0.0
        while True:
            with contextlib.suppress(queue.Empty):
                question = self._questions.get(timeout=pause)
                if question is None:
                    return
                question()
            if time.monotonic() - last >= pause:
                beats, last = beats + 1, time.monotonic()
                with contextlib.suppress(RuntimeError):  # the store has gone with the process that kept it
                    self._store.set(f"alive-{self._rank}", str(beats))

    def _ask(self, ask: Callable[[dist.Store], T], limit: float | None = None) -> T:
        """What ``ask`` gets from the store. Raises :class:`Unanswered`, from then on at once."""
        if self._no_answer:
            raise Unanswered(self._no_answer)
        answer: Future[T] = Future()

        def question() -> None:
            try:
                answer.set_result(ask(self._store))
            except RuntimeError as error:
                answer.set_exception(error)

        self._questions.put(question)
        limit = self._limit if limit is None else limit
        try:
            return answer.result(timeout=limit)
        except FutureTimeout:
            self._no_answer = _silence("process 0", limit)
            raise Unanswered(self._no_answer) from None
        except RuntimeError as error:
            raise _unanswered(error, limit) from error

    def close(self) -> None:
        """Leave; the process that keeps the store goes last, unless the others take too long."""
        with contextlib.suppress(Unanswered):
            self._ask(lambda store: store.add("closed", 1), _LEAVING_SECONDS)
            deadline = time.monotonic() + _LEAVING_SECONDS
            while self._rank == 0 and time.monotonic() < deadline:
                if self._ask(lambda store: store.add("closed", 0), _LEAVING_SECONDS) >= self._world:
                    break
                time.sleep(0.02)
        self._questions.put(None)
        self._thread.join(timeout=1)

    def fail(self, cause: str) -> None:
        with contextlib.suppress(Unanswered):
            text = f"process {self._rank}: {cause}"
            self._ask(lambda store: store.set("failed", text), _LEAVING_SECONDS)

    def failure(self) -> str:
        """What a process said when it failed; empty if none did."""
        found = self._ask(lambda store: store.get("failed") if store.check(["failed"]) else b"")
        return found.decode("utf-8", "replace")

    def wait_for_all(self) -> None:
        self._barriers += 1
        here = f"here-{self._barriers}"
        self._ask(lambda store: store.add(here, 1))
        self._wait(lambda store: store.add(here, 0) >= self._world)

    def post(self, name: str, text: str) -> None:
        self._ask(lambda store: store.set(f"posted-{name}", text))

    def posted(self, name: str) -> str:
        key = f"posted-{name}"
        self._wait(lambda store: store.check([key]))
        return self._ask(lambda store: store.get(key)).decode("utf-8", "replace")

    def _wait(self, over: Callable[[dist.Store], bool]) -> None:
        """Until something is so, as long as all processes live and none has failed."""
        last: dict[int, tuple[bytes, float]] = {}
        while not self._ask(over):
            if failure := self.failure():
                raise Unanswered(failure)
            self._look_for_silent(last)
            time.sleep(0.05)

    def _look_for_silent(self, last: dict[int, tuple[bytes, float]]) -> None:
        """Raise if a process has said nothing new for too long; ``last`` is what each said, and when."""
        names = [f"alive-{rank}" for rank in range(self._world)]
        said = self._ask(lambda store: store.multi_get(names))
        now = time.monotonic()
        for rank, beat in enumerate(said):
            if rank not in last or last[rank][0] != beat:
                last[rank] = (beat, now)
            elif now - last[rank][1] > self._limit:
                raise Unanswered(_silence(f"process {rank}", self._limit))


def start(device: str = "auto", limit: float = 240.0) -> Processes:
    """Join the group that ``torchrun`` describes in the environment, or run alone.

    A process that leaves the others without an answer for ``limit`` seconds ends the run. Raises
    :class:`ConfigError` for a device that this machine does not have.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    chosen = find_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world == 1:
        return Processes(rank, world, chosen, limit)
    # gloo for what stays in the host's memory, see run.parallel_offload
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    joining = timedelta(seconds=max(limit, _JOINING_SECONDS))
    shared, rank, world = next(dist.rendezvous("env://", rank, world, timeout=joining))
    store = fresh_store(shared, rank, world, joining.total_seconds())
    if store is None:
        raise Unanswered(f"not all {world} processes were there after {joining.total_seconds():g} s")
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=limit),
    )
    signs = _SignsOfLife(dist.PrefixStore("signs", store), rank, world, limit)
    return Processes(rank, world, chosen, limit, signs)


def find_device(device: str) -> torch.device:
    """The device of this process among those of the machine; nothing is put on it yet.

    Raises :class:`ConfigError` for a device that this machine does not have.
    """
    try:
        chosen = named_device(device, mps=False)
    except RuntimeError as error:
        raise ConfigError(f"run.device = {device!r}: not a device name; use auto, cpu or cuda") from error
    if chosen.type != "cuda":
        try:
            return choose_device(str(chosen))
        except ConfigError as error:
            raise ConfigError(f"run.device: {error}") from None
    if not torch.cuda.is_available():
        raise ConfigError(f"run.device = {device!r}: torch sees no CUDA device; use cpu or auto")
    if chosen.index is None:
        chosen = torch.device("cuda", 0)
    if chosen.index >= torch.cuda.device_count():
        raise ConfigError(
            f"run.device = {device!r}: process {os.environ.get('RANK', '0')} wants {chosen}, but torch sees "
            f"{torch.cuda.device_count()} CUDA devices; start no more processes than that"
        )
    return chosen
