"""Caches that are filled on a Ray cluster: one process a GPU, each with the model, through Ray Data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from ..data.on_ray import RETRIES, ray_data
from ..errors import HyditError
from ..ray_cluster import cluster, gpus, in_words, raised, told
from .caches import encode_share, prepared
from .checks import check_machine
from .conditioning import CaptionFit, merged
from .config import TrainConfig
from .distributed import find_device
from .networks import ModelParts
from .parts import build

_ROWS, _PARTS = 4096, 8
"""Rows that a process encodes at a time, if that makes at most so many parts of the data a process."""


def encode(
    config: TrainConfig, workers: int | None, progress: Callable[[int, int], None]
) -> list[CaptionFit]:
    """Encode what the caches lack of what was prepared; gives how all captions fit the encoders.

    ``progress`` gets the parts of the data that are done, and how many there are. Raises
    :class:`HyditError` for what a process cannot encode, and if one dies again and again.
    """
    with cluster() as module, in_words(RETRIES, "one part of the data"):
        data, found = ray_data(module), gpus(module)
        count = workers or max(1, found)
        parts = count * max(1, min(len(prepared(config)) // (count * _ROWS), _PARTS))
        # Not data.range, whose tasks would wait for a core where the processes below hold all of them.
        numbers = data.from_items([{"id": number} for number in range(parts)], override_num_blocks=parts)
        encoded = numbers.map_batches(
            Encoder,
            fn_constructor_args=(os.getcwd(), config, parts),
            concurrency=count,
            batch_size=1,
            num_cpus=1,
            num_gpus=1 if found and config.run.device != "cpu" else 0,
        )
        fits: list[CaptionFit] = []
        for done, row in enumerate(encoded.iter_rows(), 1):
            answer = json.loads(row["answer"])
            if "error" in answer:
                raise raised(*answer["error"])
            fits += [CaptionFit(**fit) for fit in answer["fits"]]
            progress(done, parts)
        return merged(fits)


class Encoder:
    """A process with the model. The number of a part of the data -> how its captions fit, in JSON.

    Args:
        folder: in which the command line was given.
        config: of the run.
        parts: how many parts the data have.
    """

    def __init__(self, folder: str, config: TrainConfig, parts: int) -> None:
        os.chdir(folder)
        self._config = config
        self._count = parts
        self._parts: ModelParts | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"answer": [json.dumps(self._answer(int(number))) for number in batch["id"]]}

    def _answer(self, number: int) -> dict[str, Any]:
        try:
            run = self._config.run
            if self._parts is None:
                if run.threads is not None:
                    torch.set_num_threads(run.threads)
                check_machine(self._config)
                self._parts = build(self._config)
            device = find_device(run.device)
            fits = encode_share(self._config, self._parts, device, number, self._count, _unseen)
        except HyditError as error:
            return {"error": told(error)}
        return {"fits": [asdict(fit) for fit in fits]}


@contextmanager
def _unseen(what: str) -> Iterator[Callable[[int, int], None]]:
    yield lambda done, total: None
