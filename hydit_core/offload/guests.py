"""Networks that visit the device: as a whole, or layer by layer.

A visit puts copies in the place of a network's parameters and buffers, and afterwards the originals back,
which never left the host: leaving copies nothing. What changes weights between visits (LoRAs) changes the
originals. Tensors of every class are moved alike, quantized ones too.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .copier import Copier, pin, plain_parts

_Owner = dict[str, Any]
"""``module._parameters`` or ``module._buffers``."""


class Guest:
    """Some modules' own tensors, as a whole on the device or not.

    Args:
        modules: whose tensors, without those of their children. A tensor in two places is copied once.
    """

    def __init__(self, modules: Iterable[nn.Module], copier: Copier) -> None:
        self.copier = copier
        owners = [owner for module in modules for owner in (module._parameters, module._buffers)]
        self._places: list[tuple[_Owner, str]] = [
            (owner, name) for owner in owners for name, tensor in owner.items() if tensor is not None
        ]
        self._copies: dict[int, Tensor] = {}
        self._originals: list[Tensor] = []
        self._mark: Any = None

    @property
    def tensors(self) -> list[Tensor]:
        """The originals, each once. Not while the copies are in their places."""
        return list({id(owner[name]): owner[name] for owner, name in self._places}.values())

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(size_of(tensor) for tensor in self.tensors)

    @property
    def here(self) -> bool:
        """Whether there are copies on the device, or will be."""
        return bool(self._copies)

    def start(self) -> None:
        """Begin to copy to the device."""
        if not self.here:
            tensors = self.tensors
            copies, self._mark = self.copier.start(tensors)
            self._copies = {id(old): new for old, new in zip(tensors, copies, strict=True)}

    def enter(self) -> None:
        """Put the copies in their places."""
        self.start()
        if self._originals:
            return
        self.copier.use(self._mark)
        wrapped: dict[int, Tensor] = {}
        for owner, name in self._places:
            original = owner[name]
            if id(original) not in wrapped:
                copy = self._copies[id(original)]
                if isinstance(original, nn.Parameter):
                    copy = nn.Parameter(copy, requires_grad=original.requires_grad)
                wrapped[id(original)] = copy
            self._originals.append(original)
            owner[name] = wrapped[id(original)]

    def leave(self) -> None:
        """Put the originals back. What became of another dtype meanwhile becomes so for good."""
        for (owner, name), original in zip(self._places, self._originals, strict=False):
            if owner[name].dtype != original.dtype:
                original.data = owner[name].detach().to(original.device)
            owner[name] = original
        self._originals = []

    def forget(self) -> None:
        """Give up the copies; the device must have finished with them."""
        self._copies, self._mark = {}, None


class Whole:
    """A network that visits the device as a whole."""

    def __init__(self, network: nn.Module, copier: Copier) -> None:
        self._guest = Guest(network.modules(), copier)
        self._copier = copier

    def enter(self) -> None:
        self._guest.enter()

    def leave(self) -> None:
        self._guest.leave()
        self._copier.wait(self._copier.mark())
        self._guest.forget()


class Streamed:
    """A network whose layers visit the device in turn, each copied while the one before it computes.

    At most three layers are there at once: the one that computes, the next, and the one before, which the
    device may not have finished when the host comes to the next. After the last comes the first, for the next
    call. Embeddings outside the layers stay on the host, where looking up a few rows costs nothing: mT5's
    table is a third of it. Everything else is on the device for the whole visit.
    """

    def __init__(self, network: nn.Module, layers: Iterable[nn.Module], copier: Copier) -> None:
        self._copier = copier
        self._modules = list(layers)
        self._layers = [Guest(layer.modules(), copier) for layer in self._modules]
        inside = {id(module) for layer in self._modules for module in layer.modules()}
        rest = [module for module in network.modules() if id(module) not in inside]
        self._tables = [module for module in rest if isinstance(module, nn.Embedding)]
        self._rest = Guest((module for module in rest if not isinstance(module, nn.Embedding)), copier)
        self._marks: dict[int, Any] = {}
        self._hooks: list[RemovableHandle] = []

    def enter(self) -> None:
        if self._copier.pins(sum(layer.size for layer in self._layers)):
            for layer in self._layers:
                pin(layer.tensors)
        for index, module in enumerate(self._modules):
            self._hooks += [
                module.register_forward_pre_hook(partial(self._before, index)),
                module.register_forward_hook(partial(self._after, index), always_call=True),
            ]
        for table in self._tables:
            self._hooks += [
                table.register_forward_pre_hook(_to_host),
                table.register_forward_hook(self._to_device),
            ]
        self._rest.enter()
        self._layers[0].start()

    def leave(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._copier.wait(self._copier.mark())
        for guest in (self._rest, *self._layers):
            guest.leave()
            guest.forget()

    def _before(self, index: int, *_: Any) -> None:
        for other in list(self._marks):
            if other not in (index, (index - 1) % len(self._layers)):
                self._copier.wait(self._marks.pop(other))
                self._layers[other].forget()
        self._layers[index].start()
        self._layers[(index + 1) % len(self._layers)].start()
        self._layers[index].enter()

    def _after(self, index: int, *_: Any) -> None:
        self._layers[index].leave()
        self._marks[index] = self._copier.mark()

    def _to_device(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.to(self._copier.device)


def _to_host(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weight: Any = module.weight
    return tuple(value.to(weight.device) for value in args)


def layers_of(network: nn.Module) -> nn.ModuleList | None:
    """The list of modules that holds most of a network: its blocks; None if it has no list."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return max(lists, key=network_size, default=None)


def network_size(network: nn.Module) -> int:
    """Bytes of parameters and buffers, each tensor once."""
    tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return sum(map(size_of, tensors.values()))


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor; of one that is made of others, of those."""
    return sum(part.numel() * part.element_size() for part in plain_parts(tensor))
