"""What micro-batches are trained on, prepared in a thread while those before them are in training."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ..data.dataset import Batch
from .stopping import starting_workers

T = TypeVar("T")


def made_ahead(
    batches: Iterator[Batch], numbers: range, make: Callable[[int, Batch], T], depth: int = 1
) -> Generator[T, None, None]:
    """What ``make`` returns for each batch and its number, up to ``depth`` of them before they are asked for.

    One thread takes and makes them, in order; ``numbers`` count micro-batches. An error of a batch or of
    ``make`` comes when its micro-batch is due. Closing the generator ends the thread and the data workers.
    """

    def ready(number: int) -> T:
        return make(number, next(batches))

    first, *others = numbers
    left = iter(others)
    with starting_workers():
        batch = next(batches)
    thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    ahead: deque[Future[T]] = deque([thread.submit(make, first, batch)])
    del batch
    try:
        while ahead:
            while len(ahead) <= depth and (number := next(left, None)) is not None:
                ahead.append(thread.submit(ready, number))
            yield ahead.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)
