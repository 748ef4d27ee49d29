"""What a run needs of a device's memory, and what to offload on one that has less.

Weights are counted, of networks that may be on the meta device. What the computation holds beside them is
found by running it there (:func:`~.offload.peak.peak_bytes`): nothing here knows what a network is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .model.attention import ImageContext
from .model.controlnet import ControlNet
from .model.dit import Context, DiT
from .model.ip_adapter import IPAdapter
from .offload.guests import layers_of, network_size, size_of
from .offload.peak import peak_bytes
from .offload.placement import MODES, Offload, Placement

TILE = 64
"""Side of the tiles, in latent pixels, that a VAE decodes where it cannot decode a whole picture."""

_ENCODING = 64 * 2**20
"""More than encoding one prompt takes, which is little, and cannot be run without values."""

_SPARE = 400 * 2**20
"""For what libraries take for themselves: kernels' workspaces, and memory in pieces."""

_RESIDENT_LAYERS = 3
"""Of a network that streams, see :class:`~.offload.guests.Streamed`."""


_TEXT = ("BERT", "mT5")
_SEEING = ("IP-Adapter", "image encoder")
"""The networks that are used before the first step: each visits the device alone where others leave it."""


@dataclass(frozen=True)
class Pictures:
    """The image prompts of a run: their networks, and how many they are."""

    adapter: IPAdapter
    encoder: nn.Module
    count: int


@dataclass(frozen=True)
class Requirements:
    """Bytes.

    Attributes:
        weights: of each network.
        streamed: of each network but the VAE, what is on the device at once if it comes layer by layer.
        sampling: what a step holds beside the weights.
        decoding, in_tiles: what the VAE holds for one picture, and for one tile of it.
    """

    weights: dict[str, int]
    streamed: dict[str, int]
    sampling: int
    decoding: int
    in_tiles: int

    def of(self, mode: str, *, tiles: bool = False) -> int:
        """The most that is needed at once with ``--offload mode``."""
        picture = self.in_tiles if tiles else self.decoding
        if mode == "off":
            return sum(self.weights.values()) + max(_ENCODING, self.sampling, picture)
        there = self.streamed if mode == "blocks" else self.weights
        texts = sum(size for name, size in there.items() if name in _TEXT)
        seeing = max((size for name, size in there.items() if name in _SEEING), default=0)
        nets = sum(size for name, size in there.items() if name not in (*_TEXT, *_SEEING, "VAE"))
        encoding = max(texts, seeing) + _ENCODING
        return max(encoding, nets + self.sampling, self.weights["VAE"] + picture)


@dataclass(frozen=True)
class Choice:
    """What ``--offload auto`` chose.

    Attributes:
        mode: of :data:`~.offload.placement.MODES`.
        tile: see :class:`~.offload.placement.Placement`.
        need: bytes that are needed so.
        fits: whether the device has as many.
    """

    mode: str
    tile: int | None
    need: int
    fits: bool

    def placement(self, device: torch.device) -> Placement:
        """The placement for networks that compute on ``device``."""
        placement = Placement() if self.mode == "off" else Offload(device, self.mode)
        placement.tile = self.tile
        return placement

    def __str__(self) -> str:
        tiles = f", the VAE in tiles of {self.tile}" if self.tile else ""
        return f"{self.mode}{tiles}, which needs {size_text(self.need)}"


def requirements(
    dit: DiT,
    encoders: dict[str, nn.Module],
    vae: Any,
    *,
    size: tuple[int, int],
    rows: int,
    controlnets: Sequence[ControlNet] = (),
    pictures: Pictures | None = None,
) -> Requirements:
    """What drawing needs.

    Args:
        encoders: "BERT" and "mT5".
        size: of the pictures, (W, H) in pixels.
        rows: of a step's batch: pictures of a prompt, doubled by guidance.
    """
    nets: dict[str, nn.Module] = {"DiT": dit, **encoders}
    nets |= {f"ControlNet {i}": net for i, net in enumerate(controlnets, 1)}
    seeing = {} if pictures is None else dict(zip(_SEEING, (pictures.adapter, pictures.encoder), strict=True))
    width, height = (side // vae.downscale for side in size)
    decoding = peak_bytes(lambda: _decode(vae, width, height))
    tile = peak_bytes(lambda: _decode(vae, min(TILE, width), min(TILE, height)))
    return Requirements(
        weights={name: network_size(net) for name, net in {**nets, **seeing, "VAE": vae}.items()},
        streamed={name: streamed_size(net) for name, net in nets.items()}
        | {name: network_size(net) for name, net in seeing.items()},  # these visit as a whole
        sampling=peak_bytes(lambda: _step(dit, controlnets, pictures, rows, width, height)),
        decoding=decoding,
        # beside a tile, the picture and the sum that it is made of, in float32
        in_tiles=min(decoding, tile + 2 * 4 * 3 * size[0] * size[1]),
    )


def for_pipeline(
    pipe: Any,
    settings: Any = None,
    batch: int = 1,
    controlnets: Sequence[ControlNet] = (),
    pictures: Pictures | None = None,
) -> Requirements:
    """What a :class:`~.pipeline.Pipeline` needs, which may be only an outline.

    Args:
        settings: size and guidance scale; default: those that the model recommends.
        batch: pictures of a prompt.
    """
    chosen = settings or pipe.info.defaults
    return requirements(
        pipe.dit,
        {"BERT": pipe.text.bert, "mT5": pipe.text.t5},
        pipe.vae,
        size=(chosen.width, chosen.height),
        rows=batch * (1 + (chosen.cfg > 1)),
        controlnets=controlnets,
        pictures=pictures,
    )


def choose(needed: Requirements, free: int) -> Choice:
    """The least offloading that fits into ``free`` bytes; tiles, which change pictures a bit, come last."""
    for tiles in (False, True):
        for mode in MODES:
            need = needed.of(mode, tiles=tiles) + _SPARE
            if need <= free:
                return Choice(mode, TILE if tiles else None, need, True)
    return Choice("blocks", TILE, needed.of("blocks", tiles=True) + _SPARE, False)


def free_memory(device: torch.device) -> int | None:
    """Bytes that a GPU has free; None for devices that do not tell, or share the host's memory."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def streamed_size(network: nn.Module) -> int:
    """Bytes of a network's weights that are on the device at once if it comes layer by layer."""
    layers = layers_of(network)
    if layers is None:
        return network_size(network)
    sizes = sorted((network_size(layer) for layer in layers), reverse=True)
    inside = {id(module) for module in layers.modules()}
    tables = (m for m in network.modules() if isinstance(m, nn.Embedding) and id(m) not in inside)
    hosted = {id(table.weight): size_of(table.weight) for table in tables}
    return network_size(network) - sum(sizes) - sum(hosted.values()) + sum(sizes[:_RESIDENT_LAYERS])


def _step(
    dit: DiT,
    controlnets: Sequence[ControlNet],
    pictures: Pictures | None,
    rows: int,
    width: int,
    height: int,
) -> None:
    config = dit.config
    device = dit.text_embedding_padding.device

    def context(net: DiT | ControlNet) -> Context:
        tokens = net.config.text_len + net.config.t5_len
        text = torch.empty(rows, tokens, net.config.text_dim, dtype=net.dtype, device=device)
        return Context(text, torch.empty(rows, net.config.hidden_size, dtype=net.dtype, device=device))

    x = torch.empty(rows, config.in_channels, height, width, device=device)
    t = torch.empty(rows, device=device)
    contexts = [context(net) for net in controlnets]
    total: list[torch.Tensor] | None = None
    for net, own in zip(controlnets, contexts, strict=True):
        more = net(x.to(net.dtype), t, own, x[:1])
        total = more if total is None else [a + b for a, b in zip(total, more, strict=True)]
    dit(x.to(dit.dtype), t, context(dit), total, images=_seen(pictures, rows))


def _seen(pictures: Pictures | None, rows: int) -> list[ImageContext] | None:
    """What each block attends to of image prompts."""
    if pictures is None:
        return None
    given = pictures.adapter.ip_adapter_clip_len_trans_block.weight
    seen = [pictures.adapter(given.new_empty(rows, given.shape[1])) for _ in range(pictures.count)]
    return [ImageContext(block) for block in zip(*seen, strict=True)]


def _decode(vae: Any, width: int, height: int) -> None:
    z = torch.empty(1, vae.latent_channels, height, width, dtype=vae.dtype, device=vae.device)
    vae.model.decode(z).sample.float()


def size_text(value: float) -> str:
    """Bytes as people write them: 3.0 GB."""
    return f"{value / 1e9:.1f} GB" if value >= 5e7 else f"{value / 1e6:.1f} MB"
