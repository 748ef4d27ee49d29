"""One program on one process or many: ``python -m`` on a laptop, ``torchrun -m`` on several devices."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ConfigError


@dataclass(frozen=True)
class Processes:
    """This process among all of them. With one process every method is a no-op."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Sum of ``values`` over the processes (in place)."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on at least one process."""
        if self.world == 1:
            return flag
        value = torch.tensor([float(flag)], device=self.device)
        return bool(self.sum(value).item())

    def gather(self, names: list[str]) -> list[str]:
        """The names of all processes, in order of their ranks."""
        if self.world == 1:
            return names
        found: list[list[str]] = [[] for _ in range(self.world)]
        dist.all_gather_object(found, names)
        return [name for part in found for name in part]

    def wrap(self, module: nn.Module) -> nn.Module:
        """``module`` with gradients averaged over the processes.

        What is frozen is the same in all of them, from one file or one seed, and is not exchanged: what is
        stored in 8 bits or fewer could not be.
        """
        if self.world == 1:
            return module
        frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False)

    def accumulating(self, module: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Context of a backward pass; gradients are exchanged in the last one of a step only."""
        if isinstance(module, DistributedDataParallel) and not last:
            return module.no_sync()
        return nullcontext()

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def start(device: str = "auto") -> Processes:
    """Join the group that ``torchrun`` describes in the environment, or run alone.

    Raises :class:`ConfigError` for a device that this machine does not have.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"run.device = {device!r}: not a device name; use auto, cpu or cuda") from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"run.device = {device!r}: torch sees no CUDA device; use cpu or auto")
        chosen = torch.device("cuda", local if chosen.index is None else chosen.index)
        if chosen.index >= torch.cuda.device_count():
            raise ConfigError(
                f"run.device = {device!r}: process {rank} wants {chosen}, but torch sees "
                f"{torch.cuda.device_count()} CUDA devices; start no more processes than that"
            )
        torch.cuda.set_device(chosen)
    if world > 1:
        # One process draws sample pictures while the others wait.
        patience = timedelta(hours=2)
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=patience)
    return Processes(rank, world, chosen)
