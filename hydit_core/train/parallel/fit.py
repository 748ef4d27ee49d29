"""Which way of sharing a model fits into the memory of the devices."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ...offload.copier import available_memory
from ..config import TrainConfig
from ..memory import SPARE, MemoryEstimate, size_text
from ..optimizer_kinds import KINDS
from .choice import Kind, copies_of


@dataclass(frozen=True)
class Plan:
    """What each way needs, and which one is taken.

    Attributes:
        needs: of one process.
        background: ``checkpoint.background``.
        free: of one device; None if nobody tells.
    """

    kind: Kind
    ranks: int
    needs: dict[Kind, MemoryEstimate]
    free: int | None
    why: str
    background: str = "never"

    @property
    def fits(self) -> bool:
        return self.free is None or self.needs[self.kind].total + SPARE <= self.free

    def line(self) -> str:
        """What is done, and why."""
        return f"{self.ranks} processes share the model by {self.kind}: {self.why}"

    def lines(self) -> Iterator[str]:
        """For the dry run: the total of each way, then the parts of the one that is taken."""
        if self.ranks > 1:
            for kind, need in self.needs.items():
                taken = f", taken: {self.why}" if kind == self.kind else ""
                yield f"  {kind}: {size_text(need.total)}{taken}"
        need = self.needs[self.kind]
        yield from need.lines()
        if self.background != "never":
            whose = "the first process" if self.kind == "ddp" else "each process"
            there = ", if that is free" if self.background == "auto" else ""
            yield (
                f"  while a checkpoint is written, {whose} keeps a copy of {size_text(need.copied)} in the "
                f"host's memory{there}"
            )
        if self.free is None:
            return
        if self.fits:
            yield f"  fits into {size_text(self.free)}"
        else:
            yield (
                f"  does not fit into {size_text(self.free)}: use more processes with run.parallel = 'fsdp', "
                "run.gradient_checkpointing = true, a smaller run.batch_size, or bf16"
            )


def plan(config: TrainConfig, ranks: int, free: int | None, need: Callable[[int], MemoryEstimate]) -> Plan:
    """Choose by ``run.parallel``; ``need(n)`` is the estimate where ``n`` processes split the model."""
    run = config.run
    needs: dict[Kind, MemoryEstimate] = {"ddp": need(1)}
    if ranks > 1 and KINDS[config.optimizer.name].splits and run.weights == "fp32":
        needs["fsdp"] = need(ranks)
    if run.parallel == "hsdp":
        needs["hsdp"] = need(ranks // copies_of(run, ranks))
    kind, why = _chosen(config, ranks, needs, free)
    return Plan(kind, ranks, needs, free, why, config.checkpoint.background)


def _chosen(
    config: TrainConfig, ranks: int, needs: dict[Kind, MemoryEstimate], free: int | None
) -> tuple[Kind, str]:
    """The way, and why."""
    if ranks == 1:
        return "ddp", "there is one"
    if config.run.parallel != "auto":
        return config.run.parallel, "run.parallel says so"
    whole = needs["ddp"].total + SPARE
    if free is None or whole <= free:
        return "ddp", "it fits"
    why = f"a whole copy takes {size_text(whole)}, a device has {size_text(free)}"
    if "fsdp" not in needs:
        needing = config.optimizer.name if config.run.weights == "fp32" else "run.weights = 'bf16'"
        return "ddp", f"{why}, but {needing} needs whole tensors"
    return "fsdp", why


def memory_of(device: torch.device) -> int | None:
    """The bytes of a GPU, or this process's share of the host's free ones."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    free = available_memory()
    return None if free is None else free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
