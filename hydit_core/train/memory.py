"""How much memory a run needs, before it is started.

State is counted: a trained parameter costs 4 bytes each for weight, gradient and average (if kept) and 8
for AdamW's moments (4 for Muon's; the others' are in :data:`.optimizer_kinds.KINDS`); with ``run.weights =
"bf16"``, the blocks' matrices and their gradients cost 2 each. Activations are
measured, not guessed: the forward pass of the largest batch is run on the meta device, where tensors have
shapes but no content, and what it keeps for the backward pass is added up. Not in the sum: the libraries
themselves (about 0.5 GB), a CUDA context (about 0.5 GB), temporary buffers, and mapped files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model.attention import Options
from ..model.config import DiTConfig
from ..model.dit import DiT
from ..text.features import TextFeatures
from .config import TrainConfig
from .objectives.base import Rehearsal, parameter_bytes, rehearse_dit
from .objectives.table import objective_of
from .optim import in_blocks, parameter_groups
from .optimizer_kinds import state_bytes
from .parallel.units import gathered_bytes, part_size

SPARE = 1 << 30
"""What is in no sum: libraries, the device's context, buffers."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by purpose."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    frozen: int
    activations: int
    gathered: int = 0
    """Whole blocks, where processes hold parts of the model."""
    offloaded: int = 0
    """How much of the rest is in the host's memory instead of the device's (``run.parallel_offload``)."""

    @property
    def copied(self) -> int:
        """What is copied into the host's memory while a checkpoint is written in the background."""
        return self.weights + self.optimizer + self.average

    @property
    def total(self) -> int:
        """On the device."""
        return sum(self._purposes().values()) - self.offloaded

    def _purposes(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if name != "offloaded"}

    def lines(self) -> list[str]:
        """One purpose a line."""
        lines = [f"  {name}: {size_text(value)}" for name, value in self._purposes().items() if value]
        if self.offloaded:
            lines.append(f"  of it in the host's memory: {size_text(self.offloaded)}")
        where = "on the device" if self.offloaded else "together"
        return [*lines, f"  {where}: {size_text(self.total)} (plus about 1 GB for libraries and buffers)"]


def estimate(
    config: TrainConfig,
    trained: Mapping[str, Tensor],
    muon: set[str],
    frozen_bytes: int,
    dit: DiTConfig,
    size: tuple[int, int],
    *,
    ranks: int = 1,
    split_bytes: int = 0,
) -> MemoryEstimate:
    """Memory of one process.

    ``trained`` are the run's parameters (meta ones will do), ``size`` is (W, H) in pixels. Where ``ranks``
    processes split the model, this one holds its part of what is trained, and of ``split_bytes`` of the
    ``frozen_bytes``.
    """
    held = {name: part_size(tuple(p.shape), ranks) for name, p in trained.items()}
    count = sum(held.values())
    in_bf16 = config.run.weights == "bf16"
    halved = sum(p.numel() for name, p in trained.items() if in_bf16 and in_blocks(name, p))
    states = sum(
        4 * size
        if name in muon
        else state_bytes(config.optimizer.name, tuple(trained[name].shape), ranks, size)
        for name, size in held.items()
    )
    fraction = float(config.run.gradient_checkpointing)
    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    rehearsal = partial(objective_of(config).rehearsal, config)
    split = -(-split_bytes // ranks)
    found = MemoryEstimate(
        weights=4 * count - 2 * halved,
        gradients=4 * count - 2 * halved,
        optimizer=round(states),
        average=4 * count * config.ema.enabled,
        frozen=frozen_bytes - split_bytes + split,
        activations=activation_bytes(
            dit,
            config.run.batch_size,
            size,
            dtype,
            fraction,
            rehearsal,
            copies=ranks == 1,
        )
        - 2 * halved,  # which need no copy in bf16
        gathered=gathered_bytes(_rehearsed(rehearsal, dit, dtype).module) if ranks > 1 else 0,
    )
    if config.run.parallel_offload and ranks > 1:
        parts = found.weights + found.gradients + found.optimizer + found.average
        found = replace(found, offloaded=parts + split)
    return found


def of_run(
    config: TrainConfig, dit: DiT, text: nn.Module, size: tuple[int, int], ranks: int = 1
) -> MemoryEstimate:
    """Memory of one process of a run, whose networks need no content; ``ranks`` processes split the model."""
    objective = objective_of(config)
    everything = objective.shapes(config, dit, text)  # type: ignore[arg-type]
    groups = parameter_groups(everything, config.optimizer)
    trained = {name: everything[name] for group in groups for name in group.names}
    muon = {name for group in groups if group.muon for name in group.names}
    frozen = objective.frozen_bytes(config, dit)
    dropped = config.data.cache.text and not objective.exports_text(config)
    if not (config.objective.train_text_encoders or dropped):
        frozen += parameter_bytes(text, config.run.precision)
    split = objective.split_bytes(config, dit)
    return estimate(config, trained, muon, frozen, dit.config, size, ranks=ranks, split_bytes=split)


def activation_bytes(
    config: DiTConfig,
    batch: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    checkpointing: float = 0.0,
    rehearsal: Callable[..., Rehearsal] = rehearse_dit,
    *,
    copies: bool = True,
) -> int:
    """What one forward pass keeps for its backward pass, in bytes; ``size`` is (W, H) in pixels.

    ``rehearsal`` makes what is trained, see :meth:`.objectives.base.DiffusionObjective.rehearsal`; default: a
    DiT and nothing else.

    Attention counts as a fused kernel (queries, keys, values and output). Autocast's ``copies`` of the
    weights are counted; where processes hold parts of a model, weights are gathered in that dtype instead.
    """
    module, num_blocks, conditions = _rehearsed(rehearsal, config, dtype)
    with torch.device("meta"):
        latents = torch.empty(batch, config.in_channels, size[1] // 8, size[0] // 8, dtype=dtype)
        bert = torch.empty(batch, config.text_len, config.text_dim, dtype=dtype)
        t5 = torch.empty(batch, config.t5_len, config.t5_dim, dtype=dtype)
        masks = [torch.empty(batch, n, dtype=torch.int64) for n in (config.text_len, config.t5_len)]
        sizes = torch.empty(batch, 6) if config.size_cond else None
        t = torch.empty(batch)
        kept = _Kept(module)
        with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
            contexts = module.contexts(TextFeatures(bert, masks[0], t5, masks[1]), sizes)
            before = kept.total
            given = {
                name: latents if shape is None else torch.empty(batch, *shape, dtype=dtype)
                for name, shape in conditions.items()
            }
            module.predict(latents, t, contexts, **given)
    weights = [p for p in module.parameters() if p.requires_grad]
    blocks = kept.total - before
    tokens = latents.shape[-1] * latents.shape[-2] // config.patch_size**2
    stream = batch * tokens * config.hidden_size * dtype.itemsize  # the input of one block
    again = checkpointing > 0
    whole = before + (1 - checkpointing) * blocks + checkpointing * num_blocks * stream
    halves = sum(p.numel() * 2 for p in weights) if copies and dtype != torch.float32 else 0
    return int(whole + again * blocks / num_blocks) + halves


def _rehearsed(rehearsal: Callable[..., Rehearsal], config: DiTConfig, dtype: torch.dtype) -> Rehearsal:
    with torch.device("meta"):
        return rehearsal(config, attention=_FusedAttention.attend, dtype=dtype)


class _Kept:
    """Adds up the distinct storages that autograd keeps, weights left out."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.total = 0
        self._seen = {p.untyped_storage()._cdata for p in module.parameters()}
        self._alive: list[Any] = []

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(storage)  # else its address could be used again
            self.total += storage.nbytes()
        return tensor


class _FusedAttention(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps. Shapes only: the values mean nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q).flatten(-2)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("for measuring only")

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, *, options: Options = None) -> Tensor:
        return _FusedAttention.apply(q, k, v)


def largest(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size with the most pixels."""
    return max(sizes, key=lambda size: size[0] * size[1])


def size_text(value: float) -> str:
    """Bytes as people write them."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**28 else f"{value / 2**20:.1f} MiB"
