"""Parameter groups, learning-rate schedule and weight averaging."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from .parallel.copies import own
from .sections import EmaSection, GroupSection, OptimizerSection, ScheduleSection


@dataclass(frozen=True)
class Group:
    """Named parameters that share a learning-rate scale and a weight decay."""

    names: tuple[str, ...]
    lr_scale: float
    weight_decay: float
    muon: bool = False


def matches(pattern: str, name: str) -> bool:
    """Glob over the whole name, or a regular expression (searched) after ``re:``."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def parameter_groups(parameters: Mapping[str, Tensor], config: OptimizerSection) -> list[Group]:
    """Sort ``parameters`` into groups; the first matching entry of ``optimizer.groups`` decides.

    Frozen parameters are left out. Weight decay spares biases, norms and other one-dimensional
    parameters unless a group sets it for them. Raises :class:`ConfigError` for a pattern that
    matches nothing (a typing error would otherwise train what should be frozen), and for a ratio of
    LoRA+ where no LoRA is trained.
    """
    if config.loraplus_lr_ratio != 1 and not any(_is_up(name) for name in parameters):
        raise ConfigError(
            "optimizer.loraplus_lr_ratio is for LoRAs (lora.kind = 'lora'), and none is trained: leave it out"
        )
    unused = set(range(len(config.groups)))
    sorted_in: dict[tuple[float, float, bool], list[str]] = {}
    for name, parameter in parameters.items():
        entry: GroupSection | None = None
        for index, candidate in enumerate(config.groups):
            if matches(candidate.match, name):
                unused.discard(index)
                entry = entry or candidate
        if entry is not None and entry.freeze:
            continue
        lr_scale = 1.0 if entry is None else entry.lr_scale
        if _is_up(name):  # Hayou et al. 2024: with one rate for both, A moves too much or B too little
            lr_scale *= config.loraplus_lr_ratio
        if entry is not None and entry.weight_decay is not None:
            decay = entry.weight_decay
        else:
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        muon = config.name == "muon" and in_blocks(name, parameter)
        sorted_in.setdefault((lr_scale, decay, muon), []).append(name)
    if unused:
        wrong = [config.groups[i].match for i in sorted(unused)]
        some = ", ".join(list(parameters)[:: max(1, len(parameters) // 4)][:4])
        raise ConfigError(
            f"optimizer.groups: no parameter matches {', '.join(map(repr, wrong))}; names look like: {some}"
        )
    if not sorted_in:
        raise ConfigError("optimizer.groups: every parameter is frozen, there is nothing to train")
    return [Group(tuple(names), *key) for key, names in sorted_in.items()]


def in_blocks(name: str, parameter: Tensor) -> bool:
    """Whether it is a matrix of the blocks: what Muon takes, and what ``run.weights`` is about."""
    return parameter.ndim == 2 and ".blocks." in f".{name}"


def _is_up(name: str) -> bool:
    """Whether a parameter is the matrix B of a LoRA."""
    return name.endswith(".lora_B")


def learning_rate_factor(step: int, steps: int, config: ScheduleSection) -> float:
    """The learning rate of step ``step`` (from 0) as a fraction of the configured one.

    Linear warm-up, then constant until ``decay_start`` (and at least the end of the warm-up), then a
    half cosine or a line down to ``min_lr`` at the last step.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    begin = max(config.warmup_steps, int(config.decay_start * steps))
    done = min(1.0, max(0.0, (step - begin) / max(1, steps - begin)))
    shape = 1 - done if config.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr + (1 - config.min_lr) * shape


class Ema:
    """Exponential moving average of parameters, in float32.

    The warm-up is that of Tencent/HunyuanDiT's training code: ``1 - (1 + n) ** -power``, capped.
    """

    def __init__(self, parameters: Mapping[str, Tensor], config: EmaSection) -> None:
        self.config = config
        self.live = dict(parameters)
        self.average = {n: p.detach().to(torch.float32, copy=True) for n, p in self.live.items()}
        self.updates = 0

    def decay(self, update: int) -> float:
        """Weight of the old average at update number ``update`` (from 1)."""
        if not self.config.warmup:
            return self.config.decay
        return min(self.config.decay, 1 - (1 + update) ** -self.config.power)

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        live = [own(p).float() for p in self.live.values()]
        torch._foreach_lerp_([own(a) for a in self.average.values()], live, 1 - self.decay(self.updates))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within this context the model holds the averaged weights; afterwards, exactly those from before."""
        with torch.no_grad():
            live = [own(p) for p in self.live.values()]
            kept = [p.clone() for p in live]
            torch._foreach_copy_(live, [own(a) for a in self.average.values()])
            try:
                yield
            finally:
                torch._foreach_copy_(live, kept)
