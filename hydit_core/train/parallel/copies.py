"""One process, or several that hold a whole copy of the model each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distributed import Processes, answered

T = TypeVar("T")
Tensors = dict[str, dict[str, Tensor]]


def is_part(tensor: Tensor) -> bool:
    """Whether processes hold parts of a tensor."""
    return hasattr(tensor, "device_mesh")


def own(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, to change it in place."""
    part: Any = tensor.detach()
    local: Tensor = part.to_local() if is_part(tensor) else part
    return local


class Copies:
    """Each process computes the gradients of its share of a batch, and all of them get their mean.

    What a run does by itself, or in its first process alone, goes through the same methods as where processes
    hold parts (:class:`.sharded.Sharded`).
    """

    sharded = False

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._model: nn.Module | None = None

    def wrap(self, module: nn.Module) -> nn.Module:
        """``module`` with gradients averaged over the processes.

        What is frozen is the same in all of them, from one file or one seed, and is not exchanged: what is
        stored in 8 bits or fewer could not be.
        """
        self._model = module
        if self.processes.world == 1:
            return module
        frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)
        device = self.processes.device
        self.processes.barrier()  # some load their weights faster than others
        self._model = DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,  # else there are two of each gradient
        )
        return self._model

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Context of forward and backward of a micro-batch; gradients are exchanged in the last of a step."""
        if not isinstance(self._model, DistributedDataParallel):
            return nullcontext()
        return answered(self.processes.limit) if last else self._model.no_sync()

    def clip(self, parameters: Iterable[Tensor], limit: float) -> float:
        """Scale the gradients down to the norm ``limit``; returns what their norm was."""
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))

    def drawing(self, draw: Callable[[], T]) -> T:
        """What ``draw`` returns, which calls parts of the model by themselves."""
        return draw()

    def split(self, tensor: Tensor, as_is: Tensor) -> Tensor:
        """The first process's ``tensor``, sent to all, and split as ``as_is`` is."""
        raise NotImplementedError

    def gathered(self, tensor: Tensor) -> Tensor:
        """All of a tensor of the model; every process has to ask for it."""
        return tensor.detach()
