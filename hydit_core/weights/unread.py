"""Networks on the meta device whose parameters know where their values are, to be read later.

For processes that will hold parts of a network: each reads its own part alone, once it is known which.
Until then, what is done to a network may change dtypes, replace layers and copy parameters (:func:`like`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from . import kitchen
from .source import TensorSource

_MARK = "_hydit_unread"


class Network(Protocol):
    """What can draw its first values, see :meth:`hydit_core.model.trunk.Trunk.drawn`."""

    def drawn(self, generator: torch.Generator | None = None) -> Any: ...


@dataclass(frozen=True)
class Stored:
    """Values in a file: ``dtype`` is that of loading, before any other.

    ``packed``: they are quantised there, and may stay so in memory.
    """

    source: TensorSource
    key: str
    dtype: torch.dtype | None
    packed: bool = False

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``."""
        return self.source.rows(self.key, start, stop, torch.float32 if self.packed else self.dtype)

    def whole(self) -> Tensor:
        """All of them."""
        return self.rows(0, self.source.shape(self.key)[0])

    def kept(self) -> Tensor:
        """As they are in the file, see :func:`.kitchen.keep`."""
        packed = self.source.packed(self.key)
        return kitchen.keep(packed, self.dtype or self.source.dtype(self.key), "cpu")


@dataclass(frozen=True)
class Zeros:
    """Zeros."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``, in any number of columns."""
        return torch.zeros(())


@dataclass(frozen=True)
class Fresh:
    """What ``network`` draws; one generator draws all of it, so it is drawn as a whole, tensor by tensor."""

    network: Network
    seed: int


Values = Stored | Zeros | Fresh


class Part(NamedTuple):
    """What this process holds of a parameter, and which row of the whole is the first of it."""

    held: Tensor
    first: int


def values_of(parameter: Tensor) -> Values | None:
    """Where the values of a parameter are; None for one that has them."""
    return getattr(parameter, _MARK, None)


def mark(parameter: Tensor, values: Values) -> None:
    """Say where the values of a parameter on the meta device are."""
    assert parameter.is_meta
    setattr(parameter, _MARK, values)


def stays_packed(parameter: Tensor) -> bool:
    """Whether a parameter can stay quantised in memory."""
    values = values_of(parameter)
    return isinstance(values, Stored) and values.packed


def defer(model: nn.Module, source: TensorSource, *, dtype: torch.dtype | None, packed: set[str]) -> None:
    """Mark the parameters of ``model`` with their tensors in ``source``, those in ``packed`` as quantised."""
    for key, parameter in model.named_parameters(remove_duplicate=False):
        parameter.data = parameter.data.to(dtype or source.dtype(key))
        mark(parameter, Stored(source, key, dtype, key in packed))


def fresh(network: Any, seed: int) -> None:
    """Mark the parameters of a new network, which are a function of ``seed``."""
    for parameter in network.parameters():
        mark(parameter, Fresh(network, seed))


def like(copy: nn.Module, original: nn.Module) -> None:
    """Give the parameters of ``copy`` the marks of those of the same names in ``original``."""
    originals = dict(original.named_parameters())
    for name, parameter in copy.named_parameters():
        if name in originals and (values := values_of(originals[name])) is not None:
            mark(parameter, values)


def marks(module: nn.Module) -> dict[str, Values]:
    """Where values are, by the names of parameters."""
    found = ((name, values_of(parameter)) for name, parameter in module.named_parameters())
    return {name: values for name, values in found if values is not None}


def give_memory(module: nn.Module, names: Container[str], device: torch.device) -> None:
    """Replace parameters on the meta device by such that have memory; one in several places stays one."""
    made = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
        for name, parameter in module.named_parameters()
        if name in names and parameter.is_meta
    }
    for layer in module.modules():
        for name, parameter in [*layer.named_parameters(recurse=False, remove_duplicate=False)]:
            if id(parameter) in made:
                layer.register_parameter(name, made[id(parameter)])


def whole(parameter: Tensor) -> Part:
    """All of a parameter."""
    return Part(parameter.detach(), 0)


@torch.no_grad()
def fill(
    module: nn.Module, values: Mapping[str, Values], part: Callable[[nn.Parameter], Part] = whole
) -> None:
    """Put values, by the names of parameters, into what this process holds of them.

    In memory are, besides, one tensor's rows that it holds; of what is drawn or quantised, one whole tensor.
    """
    drawn: dict[int, tuple[Fresh, set[int]]] = {}
    for name, parameter in module.named_parameters():
        place = values.get(name)
        if isinstance(place, Fresh):
            drawn.setdefault(id(place.network), (place, set()))[1].add(id(parameter))
        elif place is not None:
            held, first = part(parameter)
            if held.numel():
                held.copy_(place.rows(first, first + len(held)))
    for place, wanted in drawn.values():
        for parameter, new in place.network.drawn(torch.Generator().manual_seed(place.seed)):
            if id(parameter) in wanted:
                held, first = part(parameter)
                held.copy_(new[first : first + len(held)])


@torch.no_grad()
def read(module: nn.Module) -> None:
    """All of what is marked in ``module``, as if it had been loaded so at once."""
    values = marks(module)
    for layer in module.modules():
        for name, parameter in [*layer.named_parameters(recurse=False)]:
            place = values_of(parameter)
            if isinstance(place, Stored) and place.packed:
                layer.register_parameter(name, nn.Parameter(place.kept(), requires_grad=False))
    rest = {name: place for name, place in values.items() if not getattr(place, "packed", False)}
    give_memory(module, rest, torch.device("cpu"))
    fill(module, rest)


def present(parameter: Tensor) -> Tensor:
    """The values of a parameter, read for the moment if need be."""
    values = values_of(parameter)
    if isinstance(values, Stored):
        return values.whole()
    assert values is None
    return parameter
