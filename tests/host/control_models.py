"""Tiny ControlNets of both kinds, a VAE for their pictures, and graphs that apply them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from graphs import Graph, Node
from model_runs import add_ksampler, network_calls, prompt
from sampling_models import CONFIG, INFO
from tiny_models import randomize
from torch import Tensor

from hydit_core import save_checkpoint
from hydit_core.facts import DiffusionConfig
from hydit_core.model.config import DiTConfig
from hydit_core.model.controlnet import ControlNet

STEERED = replace(CONFIG, depth=8)  # three skips
STEERED_V11 = replace(STEERED, size_cond=True, style_cond=True)
APPLY, STOCK = "HyDiTControlNetApply", "ControlNetApplyAdvanced"


def control_weights(config: DiTConfig = STEERED, seed: int = 5) -> dict[str, Tensor]:
    """Tencent-named, every tensor random, so that residuals are of order one."""
    net = ControlNet(config)
    randomize(net, seed)
    return net.state_dict()


def save_control(
    path: Path, config: DiTConfig = STEERED, seed: int = 5, dtype: torch.dtype | None = None
) -> Path:
    info = INFO
    if config.size_cond:
        info = replace(INFO, version="v1.1", diffusion=DiffusionConfig(beta_end=0.03))
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = control_weights(config, seed)
    save_checkpoint(path, dit={k: v.to(dtype or v.dtype) for k, v in tensors.items()}, info=info)
    return path


def open_control(host: Any, path: Path, weight_dtype: str = "default") -> Any:
    """Our CONTROL_NET from a file."""
    opened = host.module("hydit_core.weights.bundle").bundle(path, only=("controlnet",))
    return host.module("nodes.host.control").load_control(opened, weight_dtype=weight_dtype)


def native_control(host: Any, config: DiTConfig = STEERED, tensors: dict[str, Tensor] | None = None) -> Any:
    """ComfyUI's own CONTROL_NET as its loader makes it, but of another size: it always has 19 blocks."""
    controlnet = host.comfy_module("comfy.controlnet")
    network = host.comfy_module("comfy.ldm.hydit.controlnet").HunYuanControlNet(
        hidden_size=config.hidden_size,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_hidden / config.hidden_size,
        text_states_dim=config.text_dim,
        text_states_dim_t5=config.t5_dim,
        text_len=config.text_len,
        text_len_t5=config.t5_len,
        dtype=torch.float32,
        device="cpu",
        operations=host.comfy_module("comfy.ops").disable_weight_init,
    )
    network.blocks = network.blocks[: config.num_controls]
    network.after_proj_list = network.after_proj_list[: config.num_controls]
    network.load_state_dict(control_weights(config) if tensors is None else tensors)
    network.requires_grad_(False).eval()
    return controlnet.ControlNet(
        network,
        compression_ratio=1,
        latent_format=host.comfy_module("comfy.latent_formats").SDXL(),
        load_device=host.comfy_module("comfy.model_management").get_torch_device(),
        extra_conds=[
            "text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5", "image_meta_size",
            "style", "cos_cis_img", "sin_cis_img",
        ],
    )  # fmt: skip


class Vae:
    """Latents of four known values from each 8 x 8 square of a picture; counts what it encodes."""

    downscale_ratio = 8

    def __init__(self) -> None:
        self.encoded: list[tuple[int, ...]] = []

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1] -> (B, 4, H/8, W/8), unscaled."""
        assert pixels.shape[-1] == 3 and pixels.min() >= 0 and pixels.max() <= 1
        self.encoded.append(tuple(pixels.shape))
        means = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return (torch.cat((means, means.prod(1, keepdim=True)), dim=1) - 0.5) * 20


def picture(seed: int = 3, size: tuple[int, int] = (96, 64), batch: int = 1) -> Tensor:
    """Random squares as an IMAGE (B, H, W, 3); size is (width, height)."""
    small = torch.rand(batch, 3, size[1] // 8, size[0] // 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, scale_factor=8).movedim(1, -1).contiguous()


class Out(Node):
    """An output of a node, for what takes a Node and means its first."""

    def __init__(self, node: Node, index: int) -> None:
        super().__init__(node.id)
        self.index = index

    def out(self, index: int = 0) -> list[Any]:
        return [self.id, self.index]


def add_apply(
    host: Any, g: Graph, control: Any, node: str = APPLY, after: Node | None = None, **given: Any
) -> Node:
    """An apply node, perhaps after another. What is no Node, number or text is put into the graph."""
    inputs: dict[str, Any] = {
        "positive": prompt(1) if after is None else Out(after, 0),
        "negative": prompt(2, 9) if after is None else Out(after, 1),
        "control_net": control, "image": picture(), "vae": Vae(), "strength": 1.0, **given,
    }  # fmt: skip
    plain = (Node, str, float)
    links = {k: v if isinstance(v, plain) else host.give(g, v) for k, v in inputs.items()}
    return g.add(node, _defaults=True, **links)


def add_steered(host: Any, g: Graph, model: Any, applied: Node, **settings: Any) -> Node:
    """KSampler on what an apply node gives."""
    model = model if isinstance(model, Node) else host.give(g, model)
    both = {"positive": Out(applied, 0), "negative": Out(applied, 1)}
    return add_ksampler(host, g, model, **{**both, **settings})


def steered(
    host: Any,
    model: Any,
    control: Any,
    node: str = APPLY,
    sampling: dict[str, Any] | None = None,
    **given: Any,
) -> Tensor:
    """The latents that KSampler makes with a CONTROL_NET."""
    g = Graph()
    applied = add_apply(host, g, control, node, **given)
    return host.values(g, add_steered(host, g, model, applied, **(sampling or {})))[0]["samples"]


def residuals(host: Any, model: Any, control: Any, *nodes: str, **given: Any) -> list[list[Tensor]]:
    """What reaches the DiT at each step through a chain of apply nodes."""
    g, applied = Graph(), None
    sampling = given.pop("sampling", {})
    for node in nodes or (APPLY,):
        applied = add_apply(host, g, control, node, applied, **given)
    with network_calls(host) as calls:
        host.values(g, add_steered(host, g, model, applied, **sampling))
    return [call["control"]["output"] for call in calls]


@contextmanager
def control_calls(control: Any) -> Iterator[list[dict[str, Any]]]:
    """Collects each forward of a CONTROL_NET's network: its arguments, and its residuals as "out"."""
    calls: list[dict[str, Any]] = []

    def noted(network: Any, args: Any, given: dict[str, Any], out: dict[str, list[Tensor]]) -> None:
        calls.append({**given, "out": [residual.clone() for residual in out["output"]]})

    handle = control.control_model.register_forward_hook(noted, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
