"""Micro-batches and their random draws, prepared while the one before is in training."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

from ..data.dataset import Batch
from .draws import Draws
from .stopping import starting_workers

Pair = tuple[Batch, Draws]


def with_draws(
    batches: Iterator[Batch], numbers: range, draw: Callable[[int, Batch], Draws]
) -> Generator[Pair, None, None]:
    """Each batch with what ``draw`` returns for its number and content; ``numbers`` count micro-batches.

    An error of either comes when its micro-batch is due. Closing the generator ends the data workers.
    """

    def ready(number: int) -> Pair:
        batch = next(batches)
        return batch, draw(number, batch)

    first, *others = numbers
    with starting_workers():
        batch = next(batches)
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(lambda: (batch, draw(first, batch)))
        for number in others:
            pair = ahead.result()
            ahead = thread.submit(ready, number)
            yield pair
        yield ahead.result()
