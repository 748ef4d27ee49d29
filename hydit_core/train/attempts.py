"""A place in the shared store for this start of a run, free of what an earlier start left there.

torchrun keeps one store for all its restarts: what a process said before it was killed would be heard by the
one that was started in its place. Its count of restarts is no name for a start: it differs between machines.
"""

from __future__ import annotations

import json
import time
import uuid

import torch.distributed as dist

_PAUSE = 0.1


def fresh_store(store: dist.Store, rank: int, world: int, seconds: float) -> dist.Store | None:
    """The part of ``store`` that these processes, none of before, have agreed upon; None if some are late.

    Each process says hello with a number of its own. The first one proposes a name for all hellos that it
    sees, until every process has found its own hello in the proposal: a dead one cannot.
    """
    own = uuid.uuid4().hex
    names = [f"hello-{number}" for number in range(world)]
    store.set(names[rank], own)
    seen: list[str] = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if rank == 0 and store.check(names):
            hellos = [hello.decode() for hello in store.multi_get(names)]
            if hellos != seen:
                seen = hellos
                store.set("proposal", json.dumps([uuid.uuid4().hex, *hellos]))
        if store.check(["proposal"]):
            name, *hellos = json.loads(store.get("proposal"))
            if len(hellos) == world and hellos[rank] == own:
                store.set(f"{name}-agreed-{rank}", "1")
                if rank == 0 and store.check([f"{name}-agreed-{number}" for number in range(world)]):
                    store.set(f"{name}-begins", "1")
                if store.check([f"{name}-begins"]):
                    return dist.PrefixStore(name, store)
        time.sleep(_PAUSE)
    return None
