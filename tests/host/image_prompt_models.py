"""Tiny IP-Adapters and image encoders, graphs that apply them, and what they should give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from graphs import Graph, Node
from model_runs import add_ksampler
from PIL import Image
from sampling_models import CONFIG, weights
from tiny import randomize
from torch import Tensor
from vision_files import clip_names, vision_model

from hydit_core.image_prompts.encoder import load_image_encoder
from hydit_core.model.attention import Attended, ImageContext
from hydit_core.model.config import DiTConfig
from hydit_core.model.dit import DiT
from hydit_core.model.ip_adapter import IPAdapter, IPAdapterConfig
from hydit_core.weights.load import load_ip_adapter

APPLY, LOADER = "HyDiTIPAdapterApply", "HyDiTIPAdapterLoader"
EMBED = 12


def save_adapter(path: Path, config: DiTConfig = CONFIG, embed_dim: int = EMBED, seed: int = 5) -> Path:
    """As Tencent's ``ipa.pt``, every tensor random and of a size that shows in pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    net = randomize(IPAdapter(IPAdapterConfig.for_dit(config, embed_dim, 4)), seed, 0.5)
    torch.save(net.state_dict(), path)
    return path


def save_encoder(path: Path, **given: Any) -> Path:
    """As Tencent's ``clip_img_encoder.pt`` is packed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {f"module.{name}": value for name, value in clip_names(vision_model(**given)).items()}
    torch.save({"epoch": 9, "step": 1234, "state_dict": names}, path)
    return path


def photo(seed: int = 3, size: tuple[int, int] = (30, 20), batch: int = 1) -> Tensor:
    """An IMAGE (B, H, W, 3) of values that 8 bits hold; size is (width, height)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, size[1], size[0], 3), generator=generator) / 255


def open_adapter(host: Any, adapter: Path, encoder: Path | None = None) -> Any:
    """What the loader gives."""
    return host.module("nodes.host.ip_adapter").HostIPAdapter(adapter, encoder)


def add_apply(host: Any, g: Graph, model: Any, adapter: Any, image: Tensor, **given: Any) -> Node:
    linked = {"model": model, "ip_adapter": adapter, "image": image}
    if given.get("mask") is not None:
        linked["mask"] = given.pop("mask")
    links = {k: v if isinstance(v, Node | list) else host.give(g, v) for k, v in linked.items()}
    return g.add(APPLY, _defaults=True, **links, **given)


def applied(host: Any, model: Any, adapter: Any, image: Tensor, **given: Any) -> Any:
    """The MODEL that the node gives."""
    g = Graph()
    (found,) = host.values(g, add_apply(host, g, model, adapter, image, **given))
    return found


def drawn(host: Any, model: Any, *pictures: dict[str, Any], **sampling: Any) -> Tensor:
    """Latents of ComfyUI's KSampler with image prompts, each the inputs of a node."""
    g = Graph()
    node: Any = host.give(g, model)
    for given in pictures:
        node = add_apply(host, g, node, **given)
    return host.values(g, add_ksampler(host, g, node, **sampling))[0]["samples"]


class Truth:
    """hydit_core's own networks, and which rows see what, written out."""

    def __init__(self, adapter: Path, encoder: Path, config: DiTConfig = CONFIG) -> None:
        self.config = config
        self.dit = DiT(config)
        self.dit.load_state_dict(weights(config))
        self.dit.eval()
        self.adapter, self.encoder = load_ip_adapter(adapter), load_image_encoder(encoder)

    @torch.no_grad()
    def forward(
        self, call: dict[str, Any], negative: Sequence[bool], pictures: Sequence[dict[str, Any]]
    ) -> Tensor:
        """What a call of the network (see ``network_calls``) should have given.

        ``negative`` says of each row whether it belongs to a negative prompt. A picture has an ``image``
        (1, H, W, 3), and may have ``weight``, ``blocks`` and a ``mask`` (1 or B, N, 1).
        """
        images = [ImageContext([]) for _ in range(self.config.depth)]
        for given in pictures:
            pixels = (given["image"][0] * 255).round().byte().numpy()
            embedding = self.encoder.embed(Image.fromarray(pixels))
            rows = torch.cat([0 * embedding if no else embedding for no in negative])
            factors = given.get("blocks", [1.0] * self.config.depth)
            for context, seen, factor in zip(images, self.adapter(rows), factors, strict=True):
                values = seen.values * (given.get("weight", 1.0) * factor)
                context.attended.append(Attended(seen.keys, values, given.get("mask")))
        context = self.dit.encode_context(
            call["context"],
            call["text_embedding_mask"],
            call["encoder_hidden_states_t5"],
            call["text_embedding_mask_t5"],
            image_meta_size=call["image_meta_size"],
        )
        return self.dit(call["x"], call["t"], context, images=images)[:, :4]
