"""Drawing the sides: the same prompts, seeds and sizes for all, a model loaded once for all that share it."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..generate import drawing
from ..images import Size
from .sides import Side, settings_of, with_steps
from .store import Cost, Item, Store


class Counter:
    """Counts a DiT's calls and, over all of them, the rows of the batch."""

    def __init__(self) -> None:
        self.calls = 0
        self.rows = 0

    @contextlib.contextmanager
    def on(self, dit: Any) -> Iterator[Counter]:
        hook = dit.register_forward_pre_hook(self._count)
        try:
            yield self
        finally:
            hook.remove()

    def _count(self, _: object, arguments: tuple[Any, ...]) -> None:
        self.calls += 1
        self.rows += len(arguments[0])


class Models:
    """The model that was asked for last: sides that share one load it once, and only one is in memory."""

    def __init__(self) -> None:
        self._key: tuple[str, ...] = ()
        self._model: drawing.Model | None = None

    def get(self, args: argparse.Namespace, files: drawing.Files) -> drawing.Model:
        key = drawing.model_key(args)
        if self._model is None or key != self._key:
            self._model = None  # before the next one is loaded
            self._model, self._key = drawing.load_model(args, files), key
        return self._model


def draw_sides(
    sides: Sequence[Side],
    reference: Side,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sizes: Sequence[Size | None],
    batch: int,
    out: Path,
) -> dict[str, Store]:
    """Draw what is missing, and return each side's pictures.

    Peers come last, when it is known what the side that they are compared with cost.

    Raises :class:`HyditError` as ``generate`` does.
    """
    models = Models()
    stores: dict[str, Store] = {}
    items = [Item(prompt, seed, size) for size in sizes for prompt in prompts for seed in seeds]
    for side in sides:  # what cannot work fails before anything is drawn
        assert side.args is not None
        drawing.check(side.args)
    plain = [side for side in sides if side.peer is None]
    first = list(dict.fromkeys(drawing.model_key(side.args) for side in plain if side.args))
    plain.sort(key=lambda side: first.index(drawing.model_key(side.args)) if side.args else 0)
    for side in [*plain, *(side for side in sides if side.peer is not None)]:
        if side.peer is not None:
            steps = _steps_for(stores[side.peer], stores[reference.name], items, _steps(reference, models))
            side = with_steps(side, steps)
        store = Store(out / side.key, settings_of(side))
        stores[side.name] = store
        for size in sizes:
            _draw(side, store, models, prompts, seeds, size, 1 if side.alone else batch)
    return stores


def _steps(reference: Side, models: Models) -> int:
    assert reference.args is not None
    files = drawing.open_files(reference.args)
    job = drawing.Drawing(reference.args, files, models.get(reference.args, files), Path())
    return job.steps


def _steps_for(store: Store, reference: Store, items: Sequence[Item], steps: int) -> int:
    """How many of the reference's steps cost at least what a side's pictures cost, in passes of the DiT."""
    mine, full = (sum(one.cost(item).passes for item in items) for one in (store, reference))
    return max(1, math.ceil(mine * steps / full - 1e-9))


def _draw(
    side: Side,
    store: Store,
    models: Models,
    prompts: Sequence[str],
    seeds: Sequence[int],
    size: Size | None,
    batch: int,
) -> None:
    """Draw the pictures of one size that the side's folder lacks, ``batch`` seeds of a prompt at a time."""
    groups = [seeds[i : i + batch] for i in range(0, len(seeds), batch)]
    missing = [
        (prompt, group)
        for prompt in prompts
        for group in groups
        if not all(store.has(Item(prompt, seed, size)) for seed in group)
    ]
    if not missing:
        return
    assert side.args is not None
    files = drawing.open_files(side.args)
    model = models.get(side.args, files)
    args = argparse.Namespace(**vars(side.args))
    args.size = size
    job = drawing.Drawing(args, files, model, store.folder)
    where = "" if size is None else f" {size[0]}x{size[1]}"
    for note in job.advice(prompts):
        print(f"warning: {side.name}{where}: {note}", file=sys.stderr)
    with tqdm(total=len(missing), unit="batch", desc=f"{side.name}{where}", disable=None) as bar:
        for prompt, group in missing:
            job.run = replace(job.run, seed=group[0], batch=len(group))
            start = time.perf_counter()
            with Counter().on(job.pipe.dit) as counter:
                drawn = list(job.pictures([prompt]))
            seconds = time.perf_counter() - start
            cost = Cost(seconds / len(drawn), counter.calls, counter.rows / len(drawn))
            for picture in drawn:
                store.put(Item(prompt, picture.seed, size), job.png(picture), picture.pixels, cost)
            bar.update()
