"""Several processes that hold parts of one model (FSDP2: Zhao et al. 2023, per parameter)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from ...weights import unread
from ..distributed import Processes, answered
from .copies import Copies, own
from .units import units

T = TypeVar("T")


class Sharded(Copies):
    """Weights, gradients, optimizer states and averages are split over the processes, tensor by tensor.

    A block's weights are gathered when it computes, forward and backward, and given up afterwards; so a
    process holds its share of the model and one or two whole blocks. The micro-batches of a step add their
    gradients up in parts: whole ones would need as much memory as the weights.

    Args:
        replicas: so many groups of processes hold a copy of the model each, and split it among them (HSDP).
        half: blocks that are trained are gathered, and compute, in bfloat16; their parts stay in float32.
        offload: parts stay in the host's memory, so that the optimizer works there; what is gathered is on
            the device.
    """

    sharded = True

    def __init__(
        self, processes: Processes, *, replicas: int = 1, half: bool = False, offload: bool = False
    ) -> None:
        super().__init__(processes)
        self._replicas = replicas
        self._half = half
        self._home = torch.device("cpu") if offload else processes.device
        # Without a GPU there is nothing to pin memory for.
        pinned = processes.device.type != "cpu"
        self._policy = CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy()

    def wrap(self, module: nn.Module) -> nn.Module:
        """Split ``module`` in place: its parameters are other objects afterwards, parts of what they were.

        Of what was not read yet (:mod:`hydit_core.weights.unread`), each process reads its part.
        """
        mesh, values = self._mesh(), unread.marks(module)
        whole = {p for p in module.parameters() if not _can_be_split(p)}
        for parameter in whole:
            parameter.data = parameter.data.to(self.processes.device)
        self.processes.barrier()
        for unit in [*units(module), module]:
            half = self._half and _is_trained(unit)
            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if half else None,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,  # autocast decides, as in one process
            )
            # The root too: without a backward pass it would keep weights from before the next update.
            fully_shard(
                unit,
                mesh=mesh,
                mp_policy=policy,
                offload_policy=self._policy,
                reshard_after_forward=True,
                ignored_params=whole,
            )
        if values:
            unread.give_memory(module, values, self._home)
            module._apply(lambda tensor: tensor)  # FSDP then looks at the new ones
            unread.fill(module, values, _part)
        if hasattr(module, "drawing"):
            register_fsdp_forward_method(module, "drawing")
        self._model = module
        return module

    def _mesh(self) -> DeviceMesh:
        kind, world = self.processes.device.type, self.processes.world
        if self._replicas == 1:
            return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
        shape = (self._replicas, world // self._replicas)
        return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        assert isinstance(self._model, FSDPModule)
        self._model.set_requires_all_reduce(last)  # between replicas
        return answered(self.processes.limit)

    def clip(self, parameters: Iterable[Tensor], limit: float) -> float:
        with answered(self.processes.limit):
            norm: Any = torch.nn.utils.clip_grad_norm_(parameters, limit)
            return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def drawing(self, draw: Callable[[], T]) -> T:
        """All processes have to draw: none of them holds the whole model."""
        model: Any = self._model
        with answered(self.processes.limit):
            drawn: T = model.drawing(draw)
        return drawn

    def split(self, tensor: Tensor, as_is: Tensor) -> Tensor:
        assert isinstance(as_is, DTensor)
        with answered(self.processes.limit):
            sent = tensor.to(self.processes.device)
            return distribute_tensor(sent, as_is.device_mesh, as_is.placements).to(self._home)

    def gathered(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor.detach()
        with answered(self.processes.limit):
            return tensor.full_tensor().detach()


def _part(parameter: Any) -> unread.Part:
    """What this process holds of a parameter."""
    if not isinstance(parameter, DTensor):
        return unread.whole(parameter)
    chunks: Any = parameter
    (chunk,) = chunks.__create_chunk_list__()
    return unread.Part(own(parameter), chunk.offsets[0])


def _can_be_split(parameter: Tensor) -> bool:
    """What is quantised is of classes that know no parts, and stays whole in every process."""
    return type(parameter) in (Tensor, nn.Parameter) and parameter.dtype.itemsize >= 2


def _is_trained(unit: nn.Module) -> bool:
    """Whether most of a unit is trained: a frozen base has the dtypes that it is stored in."""
    sizes = {True: 0, False: 0}
    for parameter in unit.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    return sizes[True] > sizes[False]
