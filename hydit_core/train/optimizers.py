"""The optimizers of a run as one, with a state by parameter name that safetensors can hold."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..quiet import quiet_imports
from . import states_8bit
from .optim import Group
from .optimizer_kinds import KINDS, Kind, require_library
from .parallel.copies import own
from .sections import OptimizerSection

_PER_GROUP = "group:"
"""Begins the names of what an optimizer keeps for a whole group, its number follows."""
_NUMBERS: Mapping[str, type] = {"int": int, "float": float, "bool": bool}
_OURS = frozenset({"params", "lr", "base_lr", "weight_decay"})
_RESERVED = frozenset({"self", "params", "lr", "weight_decay", "kwargs", "args", "foreach", "maximize"})
_DTYPES: Mapping[type, torch.dtype] = {bool: torch.bool, int: torch.int64, float: torch.float64}


def check_optimizer_here(section: OptimizerSection) -> None:
    """Raise :class:`ConfigError` for what is missing here, or what the optimizer does not take.

    One step of a small matrix shows what a constructor lets pass.
    """
    if section.name == "muon" and not hasattr(torch.optim, "Muon"):
        raise ConfigError(f"optimizer.name = 'muon' needs torch 2.9 or newer, this is {torch.__version__}")
    if KINDS[section.name].library:
        tried = nn.Parameter(torch.ones(64, 64))
        tried.grad = torch.ones_like(tried)
        optimizer = _from_library(section, [{"params": [tried], "weight_decay": section.weight_decay}])
        try:
            with torch.compiler.set_stance("force_eager"):
                optimizer.step()
        except Exception as error:
            raise ConfigError(f"optimizer.args: {section.name}: {error}") from error


def _from_library(section: OptimizerSection, tables: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """An optimizer of a library over parameter groups.

    Raises :class:`ConfigError` if it is not installed, or takes no such arguments.
    """
    name, kind = section.name, KINDS[section.name]
    require_library(name)
    with quiet_imports():
        made = getattr(importlib.import_module(kind.library), kind.called)
        if kind.block:
            made = states_8bit.optimizer_class()
    taken = set(inspect.signature(made).parameters) - _RESERVED
    if unknown := sorted(set(section.args) - taken):
        raise ConfigError(
            f"optimizer.args: {name} does not take {', '.join(unknown)}; it takes {', '.join(sorted(taken))}"
        )
    own: dict[str, Any] = {"betas": _betas(section, kind), "eps": section.eps}
    options = {key: value for key, value in own.items() if key in taken} | {**kind.options, **section.args}
    if kind.rounds and any(p.dtype == torch.bfloat16 for table in tables for p in table["params"]):
        options["bf16_stochastic_round"] = True
    try:
        optimizer: torch.optim.Optimizer = made(tables, lr=section.lr, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"optimizer.args: {name}: {error}") from error
    return optimizer


def _betas(section: OptimizerSection, kind: Kind) -> tuple[float, ...]:
    """CAME has a third one, of its confidence."""
    return (*section.betas, 0.9999) if kind.called == "CAME" else section.betas


class Optimizers:
    """The optimizer of a run: one of :data:`.optimizer_kinds.KINDS`.

    Muon is two: Muon for the matrices of the blocks, and AdamW for the rest. State goes in and out by
    parameter name, so that a checkpoint does not depend on the order of parameters.
    """

    def __init__(
        self, groups: list[Group], parameters: Mapping[str, nn.Parameter], config: OptimizerSection
    ) -> None:
        self.config = config
        self._names: list[list[str]] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        plain = [g for g in groups if not g.muon]
        if plain:
            self._add(plain, parameters, config.lr)
        matrices = [g for g in groups if g.muon]
        if matrices:
            self._add(matrices, parameters, config.muon_lr)
        self._parameters = dict(parameters)
        # What a group holds before the first step is of the configuration; what differs later is state.
        self._fresh = [[dict(g) for g in optimizer.param_groups] for optimizer in self._optimizers]

    def _add(self, groups: list[Group], parameters: Mapping[str, nn.Parameter], lr: float) -> None:
        config = self.config
        tables = [
            {
                "params": [parameters[n] for n in g.names],
                "weight_decay": g.weight_decay,
                "base_lr": lr * g.lr_scale,
            }
            for g in groups
        ]
        if groups[0].muon:
            check_optimizer_here(config)
            optimizer: torch.optim.Optimizer = torch.optim.Muon(
                tables, lr=lr, momentum=config.muon_momentum, weight_decay=config.weight_decay
            )
        elif KINDS[config.name].library:
            optimizer = _from_library(config, tables)
        else:
            optimizer = torch.optim.AdamW(tables, lr=lr, betas=config.betas, eps=config.eps, fused=True)
        self._optimizers.append(optimizer)
        self._names.append([n for g in groups for n in g.names])

    @property
    def averages(self) -> bool:
        """Whether it keeps averaged weights, see :meth:`averaged`."""
        return KINDS[self.config.name].averages

    def step(self, factor: float) -> None:
        """One update with every group's learning rate multiplied by ``factor``."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):  # compiled kernels are not to be compiled anew
                    group["lr"].fill_(group["base_lr"] * factor)
                else:
                    group["lr"] = group["base_lr"] * factor
            optimizer.step()

    @property
    def found(self) -> float:
        """By what Prodigy multiplies the learning rate; 1 for others."""
        return float(self._optimizers[0].param_groups[0].get("d", 1.0))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the model holds the averaged weights; afterwards, exactly those from before."""
        trained = [own(p) for o in self._optimizers for g in o.param_groups for p in g["params"]]
        kept = [p.clone() for p in trained]
        for optimizer in self._optimizers:
            optimizer.eval()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(trained, kept)
            for optimizer in self._optimizers:  # its own way back would round
                for group in optimizer.param_groups:
                    group["train_mode"] = True

    def state(self) -> dict[str, Tensor]:
        """``name|key`` -> tensor: what is kept for parameters and, as ``group:0|key``, for whole groups."""
        found: dict[str, Tensor] = {}
        for optimizer, names, fresh in zip(self._optimizers, self._names, self._fresh, strict=True):
            for index, entries in optimizer.state_dict()["state"].items():
                for key, value in entries.items():
                    found |= _stored(f"{names[index]}|{key}", value)
            if not KINDS[self.config.name].library:
                continue
            for number, (group, before) in enumerate(zip(optimizer.param_groups, fresh, strict=True)):
                for key, value in group.items():
                    if key not in _OURS and (key not in before or before[key] is not value):
                        # Groups share some tensors, which a file of tensors refuses.
                        own = value.clone() if isinstance(value, Tensor) else value
                        found |= _stored(f"{_PER_GROUP}{number}|{key}", own)
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave.

        Raises :class:`ConfigError` if it belongs to other groups.
        """
        for optimizer, names in zip(self._optimizers, self._names, strict=True):
            position = {name: index for index, name in enumerate(names)}
            entries: dict[int, dict[str, Any]] = {}
            for full, value in state.items():
                name, _, key = full.rpartition("|")
                if name in position:
                    _put(entries.setdefault(position[name], {}), key, value)
            if KINDS[self.config.name].library:
                for index, kept in entries.items():
                    parameter = self._parameters[names[index]]
                    block = getattr(optimizer, "block_size", 0)
                    optimizer.state[parameter] = {k: _placed(v, parameter, k, block) for k, v in kept.items()}
                self._load_groups(optimizer, state)
            else:
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict({"state": entries, "param_groups": groups})

    def _load_groups(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
        kept: dict[int, dict[str, Any]] = {}
        for full, value in state.items():
            name, _, key = full.rpartition("|")
            number = name.removeprefix(_PER_GROUP)
            if name.startswith(_PER_GROUP) and number.isdecimal():
                _put(kept.setdefault(int(number), {}), key, value)
        if kept and sorted(kept) != list(range(len(optimizer.param_groups))):
            raise ConfigError(
                f"optimizer.groups: the checkpoint was written with {len(kept)} groups of parameters, these "
                f"are {len(optimizer.param_groups)}; keep them as they were, or start a new run from its "
                "weights"
            )
        for place, values in kept.items():
            group = optimizer.param_groups[place]
            group.update({key: _placed(value, group["params"][0]) for key, value in values.items()})


def _stored(name: str, value: Any) -> dict[str, Tensor]:
    """One value of a state as tensors: a number says of which type it is, a quantised tensor is its parts."""
    if isinstance(value, Tensor) and (packed := states_8bit.stored(name, value)):
        return packed
    if isinstance(value, Tensor):
        return {name: value}
    if type(value) in _DTYPES:
        return {f"{name}:{type(value).__name__}": torch.tensor(value, dtype=_DTYPES[type(value)])}
    return {}


def _put(entries: dict[str, Any], key: str, value: Tensor) -> None:
    """The reverse of :func:`_stored`: a number, a tensor, or a part of what :func:`_placed` quantises."""
    key, _, number = key.partition(":")
    key, _, part = key.partition(".")
    if number in _NUMBERS:
        entries[key] = _NUMBERS[number](value.item())
    elif part:
        entries.setdefault(key, {})[part] = value
    else:
        entries[key] = value


def _placed(value: Any, parameter: Tensor, key: str = "", block: int = 0) -> Any:
    """A value of a state where its optimizer expects it: counters stay on the host."""
    if block and key in states_8bit.SIGNED:
        return states_8bit.placed(value, key, parameter, block)
    return value.to(parameter.device) if isinstance(value, Tensor) and value.ndim else value
