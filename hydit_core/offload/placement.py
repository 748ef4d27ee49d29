"""Which of a pipeline's networks are on the device when."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import ConfigError
from .copier import Copier, copier_for
from .guests import Streamed, Whole, layers_of

MODES = ("off", "encoders", "blocks")
"""What leaves the device while it is not needed: nothing; text encoders and VAE; the blocks, too."""

T = TypeVar("T")


class Placement:
    """Where a pipeline's networks are, for each stage of a run: texts, sampling, pictures.

    Here everything is on one device all the time; ControlNets come to it and stay.

    Attributes:
        device: to compute on; None: where the DiT is.
        tile: side, in latent pixels, of the pieces that the VAE decodes; None: it decodes pictures whole.
    """

    device: torch.device | None = None
    tile: int | None = None

    def home(self, device: torch.device) -> torch.device:
        """Where networks are loaded that compute on ``device``."""
        return device

    def encoded(self, encoders: Any, texts: Iterable[str], encode: Callable[[str], T]) -> Iterator[T]:
        """What ``encode`` makes of each text, when it is asked for."""
        return map(encode, texts)

    @contextlib.contextmanager
    def sampling(self, dit: nn.Module, controlnets: Iterable[nn.Module]) -> Iterator[None]:
        """DiT and ControlNets can compute inside."""
        device = next(dit.parameters()).device
        for net in controlnets:
            net.to(device)
        yield

    @contextlib.contextmanager
    def visiting(self, network: nn.Module) -> Iterator[None]:
        """A network can compute inside: the VAE, for a picture."""
        yield


class Offload(Placement):
    """Networks live on the host and visit the device.

    ``mode`` "encoders": the text encoders, until all texts of a run are encoded; the DiT and its ControlNets,
    for as long as the run samples; the VAE, for one picture at a time. "blocks": the same, but encoders, DiT
    and ControlNets come layer by layer (:class:`.guests.Streamed`). The pictures are the same, bit for bit.

    Raises:
        ConfigError: an unknown mode.
    """

    def __init__(
        self, device: torch.device, mode: str, *, tile: int | None = None, copier: Copier | None = None
    ) -> None:
        if mode not in MODES[1:]:
            raise ConfigError(f"unknown offload {mode!r}: use one of {', '.join(MODES)}")
        self.device = device
        self.mode = mode
        self.tile = tile
        self._copier = copier or copier_for(device)

    def home(self, device: torch.device) -> torch.device:
        """The host."""
        return torch.device("cpu")

    def encoded(self, encoders: Any, texts: Iterable[str], encode: Callable[[str], T]) -> Iterator[T]:
        """What ``encode`` makes of each text; of all before the first is returned."""
        with self._visit(encoders.children(), layers=self.mode == "blocks"):
            return iter([encode(text) for text in texts])

    @contextlib.contextmanager
    def sampling(self, dit: nn.Module, controlnets: Iterable[nn.Module]) -> Iterator[None]:
        with self._visit((dit, *controlnets), layers=self.mode == "blocks"):
            yield

    @contextlib.contextmanager
    def visiting(self, network: nn.Module) -> Iterator[None]:
        with self._visit((network,), layers=False):
            yield

    @contextlib.contextmanager
    def _visit(self, networks: Iterable[nn.Module], *, layers: bool) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for network in {id(network): network for network in networks}.values():
                blocks = layers_of(network) if layers else None
                visit = (
                    Whole(network, self._copier)
                    if blocks is None
                    else Streamed(network, blocks, self._copier)
                )
                stack.callback(visit.leave)
                visit.enter()
            yield
