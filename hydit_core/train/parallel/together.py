"""What the first process decides and all of them do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from ..distributed import Processes, Unanswered, answered


class Together:
    """Work that no process can do alone, as each holds a part of the tensors only.

    The first process runs what it would run alone. Where that needs the others, it names a duty; they wait
    for such names, so that all decisions are its own.
    """

    def __init__(self, processes: Processes, duties: Mapping[str, Callable[[Any], Any]]) -> None:
        self._processes = processes
        self._duties = duties

    def run(self, lead: Callable[[], None]) -> None:
        """``lead`` in the first process; in the others, the duties that it asks for until it ends."""
        self._processes.barrier()
        if self._processes.is_main:
            try:
                lead()
            except Unanswered:
                raise  # nobody is there to be told
            except BaseException:
                self._say("", None)
                raise
            self._say("", None)
            return
        while True:
            box: list[tuple[str, Any]] = [("", None)]
            self._exchange(box)
            duty, argument = box[0]
            if not duty:
                return
            self._duties[duty](argument)

    def ask(self, duty: str, argument: Any = None) -> Any:
        """Do a duty in all processes; what it returns here, in the first one. Only within :meth:`run`."""
        self._say(duty, argument)
        return self._duties[duty](argument)

    def _say(self, duty: str, argument: Any) -> None:
        self._exchange([(duty, argument)])

    def _exchange(self, box: list[tuple[str, Any]]) -> None:
        with answered(self._processes.limit):
            dist.broadcast_object_list(box, 0, device=self._processes.device)
