"""Processes that are started anew do not hear what those before them said."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch.distributed as dist

from hydit_core.train import attempts
from hydit_core.train.attempts import fresh_store


def started(store: dist.Store, world: int, order: Sequence[int], seconds: float = 20.0) -> list[dist.Store]:
    """What each rank gets; they arrive one after the other."""
    found: dict[int, dist.Store | None] = {}

    def join(rank: int) -> None:
        found[rank] = fresh_store(store, rank, world, seconds)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in order]
    for thread in threads:
        thread.start()
        thread.join(timeout=0.05)
    for thread in threads:
        thread.join()
    return [place for rank in range(world) if (place := found.get(rank)) is not None]


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
def test_every_start_has_a_place_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_PAUSE", 0.005)
    store = dist.HashStore()
    for number, order in enumerate([(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)]):
        places = started(store, 3, order)
        assert len(places) == 3
        assert not any(place.check(["failed"]) for place in places)
        places[1].set("failed", str(number))
        assert [place.get("failed") for place in places] == [str(number).encode()] * 3
    # Fewer than before, as after a machine was lost, and one that never comes.
    assert len(started(store, 2, (1, 0))) == 2
    assert not started(store, 2, (0,), seconds=0.1)
