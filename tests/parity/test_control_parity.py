"""Drawing with ControlNets against diffusers' HunyuanDiTControlNetPipeline; what weights and ranges do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers_pipeline import NEGATIVE, PROMPT, SEED, SIDE, STEPS, theirs
from PIL import Image
from tiny import TINY, TINY_V11, randomize, write_tiny_model

from hydit_core import load
from hydit_core.control import ControlInput
from hydit_core.errors import ConfigError
from hydit_core.layer_weights import LayerWeights
from hydit_core.model.controlnet import ControlNet

pytestmark = pytest.mark.filterwarnings("ignore:.*far (below|above)")


@pytest.fixture(
    scope="module", params=[replace(TINY, depth=8), replace(TINY_V11, depth=8)], ids=["v1.2", "v1.1"]
)
def pipe(request, tmp_path_factory):
    path = write_tiny_model(tmp_path_factory.mktemp("control") / "model.safetensors", request.param)
    return load(path, device="cpu", dtype="float32")


def net_and_picture(pipe, seed):
    net = randomize(ControlNet(pipe.dit.config), seed).eval().requires_grad_(False)
    noise = np.random.default_rng(seed).integers(0, 255, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8)
    return net, Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def latents(pipe, *controls, sampler="ddim", cfg=6.0, **options):
    last = []
    size = {"width": SIDE, "height": SIDE, "steps": STEPS, "cfg": cfg, "sampler": sampler, "seed": SEED}
    pipe(PROMPT, NEGATIVE, callback=lambda *a: last.append(a[2]), controls=controls, **{**size, **options})
    return last[-1]


# diffusers samples the control picture's latents; we take their mean, as ComfyUI does.
@pytest.fixture
def mean_latents(monkeypatch):
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


@pytest.mark.parametrize(("sampler", "cfg"), [("ddpm", 6.0), ("dpmpp_2m", 6.0), ("ddim", 1.0)])
def test_latents_equal_diffusers_pipeline(pipe, mean_latents, sampler, cfg):
    net, picture = net_and_picture(pipe, 1)
    expected = theirs(pipe, sampler, cfg, 0.0, "latent", [(net, picture, 0.7)])
    control = ControlInput(net, picture, LayerWeights.parse(0.7))
    got = latents(pipe, control, sampler=sampler, cfg=cfg)
    without = latents(pipe, sampler=sampler, cfg=cfg)
    assert (without - expected).abs().max() > 0.05 * expected.std()
    assert (got - expected).abs().max() <= 1e-4 * expected.std()


def test_several_controlnets_add_up(pipe, mean_latents):
    (a, picture_a), (b, picture_b) = (net_and_picture(pipe, seed) for seed in (1, 2))
    expected = theirs(pipe, "ddim", 6.0, 0.0, "latent", [(a, picture_a, 0.5), (b, picture_b, 1.2)])
    controls = (
        ControlInput(a, picture_a, LayerWeights.parse(0.5)),
        ControlInput(b, picture_b, LayerWeights.parse(1.2)),
    )
    assert (latents(pipe, *controls) - expected).abs().max() <= 1e-4 * expected.std()


def test_weights_are_the_formulas_own(pipe):
    """One number is that number everywhere; 0 is no ControlNet; a list scales layer by layer."""
    net, picture = net_and_picture(pipe, 1)
    count = net.config.num_controls

    def with_weights(source):
        return latents(pipe, ControlInput(net, picture, LayerWeights.parse(source)))

    assert torch.equal(with_weights(0.3), with_weights([0.3] * count))
    assert torch.equal(with_weights(0.0), latents(pipe))
    scaled = ControlNet(net.config).eval().requires_grad_(False)
    scaled.load_state_dict(net.state_dict())
    factors = [0.825 ** (count - i) for i in range(count)]
    for projection, factor in zip(scaled.after_proj_list, factors, strict=True):
        projection.weight.mul_(factor)
        projection.bias.mul_(factor)
    expected = latents(pipe, ControlInput(scaled, picture))
    assert (with_weights("decay") - expected).abs().max() <= 1e-5 * expected.std()


def test_it_acts_between_start_and_end_only(pipe):
    net, picture = net_and_picture(pipe, 1)
    seen = []
    handle = net.register_forward_pre_hook(lambda module, args: seen.append(float(args[1][0])))
    try:
        latents(pipe, ControlInput(net, picture, start=0.25, end=0.75))
        assert [t for t in seen if not 0.25 * 999 <= t <= 0.75 * 999] == []
        assert len(seen) == STEPS // 2
        seen.clear()
        latents(pipe, ControlInput(net, picture))
        assert len(seen) == STEPS
    finally:
        handle.remove()


def test_what_does_not_fit_is_refused(pipe):
    net, picture = net_and_picture(pipe, 1)
    other = ControlNet(TINY.__class__(**{**TINY.to_dict(), "depth": 12}))
    with pytest.raises(ConfigError, match="depth 12 instead of 8"):
        latents(pipe, ControlInput(other, picture))
    with pytest.raises(ConfigError, match="4 layer weights for a ControlNet with 3 layers"):
        latents(pipe, ControlInput(net, picture, LayerWeights.parse("1 2 3 4")))
    with pytest.raises(ConfigError, match="0 <= start <= end <= 1"):
        ControlInput(net, picture, start=0.6, end=0.5)
