"""Tiny models with every weight random, and inputs for them."""

from __future__ import annotations

import torch
from torch import Tensor

from hydit_core.model.config import DiTConfig
from hydit_core.model.controlnet import ControlNet
from hydit_core.model.dit import Context, DiT


def tiny(depth: int = 8, hidden: int = 64, heads: int = 2, old: bool = False) -> DiTConfig:
    return DiTConfig(
        hidden_size=hidden,
        depth=depth,
        num_heads=heads,
        mlp_hidden=3 * hidden,
        text_dim=24,
        text_len=6,
        t5_dim=32,
        t5_len=9,
        t5_hidden=128,
        pooled_dim=20,
        size_cond=old,
        style_cond=old,
    )


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Values of the size that trained weights have, so that no path through the model vanishes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim < 2:
                parameter.copy_(0.3 * noise)
            elif "embedding" in name or "style" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


def inputs(config: DiTConfig, size: tuple[int, int], batch: int = 2, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    bert_mask = (torch.arange(config.text_len) < torch.tensor([[4], [2]])[:batch]).long()
    t5_mask = (torch.arange(config.t5_len) < torch.tensor([[3], [7]])[:batch]).long()
    return {
        "x": draw(batch, config.in_channels, *size),
        "hint": draw(batch, config.in_channels, *size),
        "t": torch.tensor([801.0, 37.5])[:batch],
        "bert": draw(batch, config.text_len, config.text_dim),
        "bert_mask": bert_mask,
        "t5": draw(batch, config.t5_len, config.t5_dim),
        "t5_mask": t5_mask,
        "sizes": torch.tensor([[1024.0, 1024, 640, 768, 0, 12]] * 2)[:batch],
    }


def encode(model: DiT | ControlNet, values: dict[str, Tensor]) -> Context:
    return model.encode_context(
        *(values[name] for name in ("bert", "bert_mask", "t5", "t5_mask")), image_meta_size=values["sizes"]
    )
