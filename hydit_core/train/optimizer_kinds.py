"""The optimizers that ``optimizer.name`` offers: where each comes from, and what it asks of a run.

An allow-list, each member of which is tested: bit-exact resume, and against a second implementation where
there is one. Knows no torch, so that a configuration can be checked without it.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError

_PYTORCH_OPTIMIZER = "pytorch_optimizer"
_LEAST_PACKED = 4096  # torchao's, and bitsandbytes'


@dataclass(frozen=True)
class Kind:
    """One optimizer.

    Attributes:
        defaults: of the section's keys that are not given: its authors' learning rate and decay rates.
        library: the module that holds the class ``called``; empty: torch, and :mod:`.optimizers` builds it.
        options: of its constructor, where its own defaults do not suit; ``optimizer.args`` goes before them.
        state_bytes: of its state for each value of a matrix, for the estimate of memory.
        block: so many values share a scale; 0: states are not packed.
        averages: it keeps averaged weights of its own, which are what is validated, drawn with and exported.
        one_rate: all parameters share one learning rate.
        rounds: it rounds updates of bf16 weights at random, up or down, right in the mean, when it is given
            ``bf16_stochastic_round``.
        splits: it trains parts of parameters that are split over processes (``run.parallel = "fsdp"``).
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    library: str = ""
    called: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    state_bytes: float = 8
    averages: bool = False
    one_rate: bool = False
    rounds: bool = False
    splits: bool = False
    block: int = 0


KINDS: Mapping[str, Kind] = {
    "adamw": Kind(splits=True),
    "muon": Kind(splits=True),
    "adamw_8bit": Kind(
        library="torchao.optim",
        called="AdamW8bit",
        state_bytes=2 + 2 * 4 / 256,
        rounds=True,
        splits=True,
        block=256,
    ),
    "lion": Kind({"betas": (0.9, 0.99)}, _PYTORCH_OPTIMIZER, "Lion", state_bytes=4, splits=True),
    "adafactor": Kind(
        {},
        _PYTORCH_OPTIMIZER,
        "AdaFactor",
        # Its steps of 1 / sqrt(step) and its scaling by the weights' size are not what optimizer.lr says.
        {"relative_step": False, "scale_parameter": False},
        state_bytes=2,
    ),
    "came": Kind({"lr": 2e-4}, _PYTORCH_OPTIMIZER, "CAME", state_bytes=4),
    "prodigy": Kind(
        {"lr": 1.0},
        _PYTORCH_OPTIMIZER,
        "Prodigy",
        {"safeguard_warmup": True, "bias_correction": True},
        state_bytes=16,
        one_rate=True,
    ),
    "schedule_free": Kind(
        {"lr": 2.5e-3}, _PYTORCH_OPTIMIZER, "ScheduleFreeAdamW", state_bytes=8, averages=True, splits=True
    ),
}


def packs(shape: tuple[int, ...], parts: int = 1, block: int = 256) -> bool:
    """Whether states of a tensor that is split by rows are packed: its parts are large, and whole blocks."""
    size = math.prod(shape) // parts
    return bool(shape) and shape[0] % parts == 0 and size >= _LEAST_PACKED and size % block == 0


def state_bytes(name: str, shape: tuple[int, ...], parts: int, held: int) -> float:
    """Of the state of a tensor, ``held`` values of which a process holds."""
    kind = KINDS[name]
    packed = not kind.block or packs(shape, parts, kind.block)
    return held * (kind.state_bytes if packed else 8)


def packages(kind: Kind) -> str:
    """What pip calls the library of an optimizer."""
    return kind.library.partition(".")[0].replace("_", "-")


def with_own_defaults(table: Any) -> Any:
    """The table ``optimizer`` as it was written, with its kind's defaults in place of the section's."""
    if not isinstance(table, dict) or not isinstance(name := table.get("name"), str) or name not in KINDS:
        return table
    return {**KINDS[name].defaults, **table}


def with_one_average(raw: Any) -> Any:
    """A configuration as it was written: no second average is kept where the optimizer keeps one."""
    if not isinstance(raw, dict):
        return raw
    optimizer, ema = raw.get("optimizer"), raw.get("ema", {})
    name = optimizer.get("name") if isinstance(optimizer, dict) else None
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None or not kind.averages or not isinstance(ema, dict):
        return raw
    return {**raw, "ema": {"enabled": False, **ema}}


def require_library(name: str) -> None:
    """Raise :class:`ConfigError` where the library of an optimizer is not installed."""
    kind = KINDS[name]
    top = kind.library.partition(".")[0]
    if top and importlib.util.find_spec(top) is None:
        package = packages(kind)
        raise ConfigError(
            f"optimizer.name = {name!r} needs {package}: pip install {package}, or hydit[optimizers]"
        )
