"""Where a run is in the order of its data: what a checkpoint says of it, and going on from there."""

from __future__ import annotations

from typing import Any

from ..data.dataset import TrainData
from ..data.order import BatchOrder
from ..data.streams import StreamOrder
from .checkpoint import Progress


def position(order: BatchOrder, number: int) -> dict[str, Any]:
    """Where the order is before micro-batch ``number``; nothing where the number itself says it.

    Of streams, ``since`` and ``from``: the micro-batch that it began with, and how many samples each bucket
    had shown before; ``at``: how many each has shown by now.
    """
    if not isinstance(order, StreamOrder):
        return {}
    since, began = order.begins
    return {"since": since, "from": began, "at": order.positions_before(number)}


def go_on(data: TrainData, progress: Progress, batch: list[int]) -> list[str]:
    """Take the order up where it was left; what of the data differs, for notes to the user.

    With batches of another size (``batch``, as in :class:`Progress`), streams go on with the samples that
    were not shown yet. All else begins at the same step. Raises what Python does if the progress does not
    hold what :func:`position` gives.
    """
    told, order, same = progress.order, data.order, progress.data in ("", data.fingerprint())
    known = isinstance(order, StreamOrder) and bool(told)
    if not same and not (known and progress.data == data.fingerprint(progress.batch[0])):
        return ["data: other pictures, captions or batches than before, in another order"]
    if isinstance(order, StreamOrder) and told:
        if progress.batch == batch:
            data.order = order.going_on(told["since"], told["from"])
        else:
            data.order = order.going_on(progress.step * batch[1], told["at"])
    if same:
        return []
    return [
        f"data: {batch[0]} pictures a micro-batch in place of {progress.batch[0]}; those that were not shown "
        "yet come next"
    ]
