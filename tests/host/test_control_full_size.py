"""A ControlNet of the published size: what ComfyUI's own loader makes of the file, and what ours makes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from full_size_files import random_file
from graphs import Graph
from key_lists import key_list
from torch import Tensor

pytestmark = pytest.mark.slow


class Sampling:
    """Of a model: noise levels are timesteps, and the network sees latents as they are."""

    def timestep(self, t: Tensor) -> Tensor:
        return t

    def calculate_input(self, t: Tensor, x: Tensor) -> Tensor:
        return x


class Vae:
    def __init__(self, hint: Tensor) -> None:
        self.hint = hint

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: Tensor) -> Tensor:
        return self.hint


@pytest.fixture(scope="module")
def nets(host):
    """The same file of random values through both loaders."""
    path = random_file(host.model_path("controlnet", "cn_v12.safetensors"), key_list("cn_v12"))
    host.refresh()
    g = Graph()
    ours = g.add("HyDiTControlNetLoader", _defaults=True, control_net_name=path.name)
    native = g.add("ControlNetLoader", control_net_name=path.name)
    yield host.values(g, ours, native)
    path.unlink()
    host.refresh()


def conditions() -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    return {
        "c_crossattn": torch.randn(2, 77, 1024, generator=g),
        "text_embedding_mask": (torch.arange(77) < torch.tensor([[9], [2]])).long(),
        "encoder_hidden_states_t5": torch.randn(2, 256, 2048, generator=g),
        "text_embedding_mask_t5": (torch.arange(256) < torch.tensor([[12], [1]])).long(),
    }


def run(host: Any, net: Any, weights: str, size: tuple[int, int]) -> list[Tensor]:
    """The residuals of a CONTROL_NET behind our apply node's function, without a DiT."""
    g = torch.Generator().manual_seed(2)
    x, hint = (torch.randn(count, 4, *size, generator=g) for count in (2, 1))
    module = host.module("nodes.host.control_apply")
    parsed = host.module("hydit_core.layer_weights").LayerWeights.parse(weights)
    (positive, _) = module.apply_control(
        [[None, {}]], [], net, torch.rand(1, 8 * size[0], 8 * size[1], 3), Vae(hint),
        strength=1.0, weights=parsed, start=0.0, end=1.0,
    )  # fmt: skip
    control = positive[0][1]["control"]
    # What sampling would do: load it, tell it the model, call it
    host.comfy_module("comfy.model_management").load_models_gpu(control.get_models())
    base = host.comfy_module("comfy.model_base").HunyuanDiT
    model = base.__new__(base)
    torch.nn.Module.__init__(model)
    model.model_sampling = Sampling()
    model.diffusion_model = SimpleNamespace(hidden_size=1408, depth=40)
    control.pre_run(model, lambda percent: 1000.0 * (1 - percent))
    try:
        with torch.no_grad():
            return control.get_control(x, torch.tensor([601.0, 601.0]), conditions(), 2, {})["output"]
    finally:
        control.cleanup()


@pytest.mark.parametrize("size", [(8, 8), (8, 14)], ids=["square", "off-square"])
def test_both_loaders(host, nets, size):
    """19 residuals of width 1408, the same up to rounding; the native network weighted layer by layer."""
    ours, native = (run(host, net, "1", size) for net in nets)
    assert len(ours) == len(native) == 19 and ours[0].shape == (2, size[0] * size[1] // 4, 1408)
    worst = max(float((a - b).abs().max() / b.std()) for a, b in zip(ours, native, strict=True))
    print(f"{worst:.1e} of the standard deviation")
    assert worst < 1e-5
    weighted = run(host, nets[1], "decay", size)
    for i, (layer, full) in enumerate(zip(weighted, native, strict=True)):
        assert torch.equal(layer, full * 0.825 ** (19 - i))
