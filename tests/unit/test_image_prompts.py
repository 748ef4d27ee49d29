"""Image prompts in a run of the pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY, randomize
from vision_files import clip_names, vision_model

import hydit_core
from hydit_core.control import ControlInput
from hydit_core.errors import ConfigError, HyditError
from hydit_core.image_prompts.encoder import ImageEncoder, load_image_encoder
from hydit_core.image_prompts.run import ImagePrompt, Images, PreparedImage, latent_mask, token_mask
from hydit_core.layer_weights import LayerWeights
from hydit_core.model.attention import Attended
from hydit_core.model.controlnet import ControlNet
from hydit_core.model.ip_adapter import IPAdapter, IPAdapterConfig
from hydit_core.offload.copier import Copier
from hydit_core.offload.placement import Offload
from hydit_core.pipeline import Pipeline
from hydit_core.tiles import Box

pytestmark = pytest.mark.filterwarnings("ignore:.*far (below|above)", "ignore:.*words")


@pytest.fixture(scope="module")
def pipe(tiny_model_file: Path) -> Pipeline:
    return hydit_core.load(tiny_model_file, device="cpu")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> ImageEncoder:
    path = tmp_path_factory.mktemp("vision") / "clip.pt"
    torch.save(clip_names(vision_model()), path)
    return load_image_encoder(path)


@pytest.fixture(scope="module")
def adapter() -> IPAdapter:
    net = randomize(IPAdapter(IPAdapterConfig.for_dit(TINY, 12, 4)), 5, 0.5)
    return net.requires_grad_(False)


@pytest.fixture
def prompt(adapter: IPAdapter, encoder: ImageEncoder):
    def prompt(**given: object) -> ImagePrompt:
        seed = given.pop("seed", 0)
        return ImagePrompt(adapter, encoder, noise(seed), **given)

    return prompt


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8))


def draw(pipe: Pipeline, *images: ImagePrompt, **given: object) -> torch.Tensor:
    given = {"steps": 3, "seed": 4, **given}
    settings = pipe.settings(**{k: given.pop(k) for k in ("steps", "cfg", "width", "height") if k in given})
    (picture,) = pipe.pictures(["a red apple"], settings, images=images, **given)
    return picture.pixels


def test_a_weight_of_zero_is_no_adapter_to_the_bit(pipe: Pipeline, prompt) -> None:
    plain = draw(pipe)
    assert not torch.equal(draw(pipe, prompt()), plain)
    for nothing in (
        prompt(weight=0.0),
        prompt(blocks=LayerWeights.parse("0"), text_scale=0.0),
        prompt(start=0.95, end=0.95),
        prompt(mask=Image.new("L", (9, 9), 0)),
    ):
        assert torch.equal(draw(pipe, nothing), plain)


def test_more_weight_more_change(pipe: Pipeline, prompt) -> None:
    plain = draw(pipe)
    change = [float((draw(pipe, prompt(weight=weight)) - plain).std()) for weight in (0.1, 0.3, 1.0)]
    assert 0 < change[0] < change[1] < change[2]


def test_pictures_add_up(pipe: Pipeline, prompt) -> None:
    """The same picture with two weights is one with their sum; other pictures are others."""
    once = draw(pipe, prompt(weight=0.5))
    torch.testing.assert_close(draw(pipe, prompt(weight=0.2), prompt(weight=0.3)), once, atol=1e-5, rtol=0)
    assert (draw(pipe, prompt(weight=0.2), prompt(weight=0.3, seed=1)) - once).abs().max() > 1e-3
    halves = [np.full((32, 64), 255, dtype=np.uint8), np.zeros((32, 64), dtype=np.uint8)]
    masks = [Image.fromarray(np.concatenate(order)) for order in (halves, halves[::-1])]
    parts = [prompt(weight=0.5, mask=mask) for mask in masks]
    torch.testing.assert_close(draw(pipe, *parts), once, atol=1e-5, rtol=0)
    assert (draw(pipe, parts[0]) - once).abs().max() > 1e-3


def test_blocks_have_weights_of_their_own(pipe: Pipeline, adapter: IPAdapter, encoder: ImageEncoder) -> None:
    """As if the values in the file were multiplied block by block."""
    weights = (0.5, 0.0, -1.0, 2.0)
    other = IPAdapter(adapter.config)
    other.load_state_dict(adapter.state_dict())
    with torch.no_grad():
        for block, weight in zip(other.blocks, weights, strict=True):
            for values in block.attn2.kv_proj_ip_adapter.parameters():
                values[64:] *= weight
    expected = draw(pipe, ImagePrompt(other.requires_grad_(False), encoder, noise(0)))
    found = draw(pipe, ImagePrompt(adapter, encoder, noise(0), blocks=LayerWeights.parse(weights)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_negative_prompt_sees_an_embedding_of_zeros(pipe: Pipeline, prompt) -> None:
    """Its rows come first; at the end, where nothing is guided, only the last are there."""
    seen: list[torch.Tensor] = []
    one = prompt()
    hook = one.adapter.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    draw(pipe, one, cfg=3.0, cfg_end=0.5)
    draw(pipe, one, cfg=1.0)
    hook.remove()
    assert [rows.shape[0] for rows in seen] == [2, 1]  # once for a run, not for each step
    assert (seen[0][0] == 0).all() and torch.equal(seen[0][1:], seen[1])
    assert seen[1].norm() == pytest.approx(1)


def test_when_it_acts(pipe: Pipeline, prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[bool] = []
    forward = type(pipe.dit).forward

    def watch(self, *args, images=None, **kwargs):
        steps.append(images is not None)
        return forward(self, *args, images=images, **kwargs)

    monkeypatch.setattr(type(pipe.dit), "forward", watch)
    draw(pipe, prompt(start=0.3, end=0.8), steps=10)
    assert steps == [False] * 3 + [True] * 6 + [False]


def test_a_batch_is_the_pictures_one_by_one(pipe: Pipeline, prompt) -> None:
    settings = pipe.settings(steps=2)
    mask = Image.linear_gradient("L")
    images = [prompt(mask=mask), prompt(seed=1, weight=0.5)]
    both = list(pipe.pictures(["cat", "a red apple"], settings, images=images, batch=2, seed=7))
    for picture in both:
        (alone,) = pipe.pictures([picture.prompt], settings, images=images, seed=picture.seed)
        torch.testing.assert_close(picture.pixels, alone.pixels, atol=2e-5, rtol=0)


def test_with_a_controlnet_and_forecasts_and_offloading(
    pipe: Pipeline, prompt, tiny_model_file: Path
) -> None:
    net = randomize(ControlNet(TINY), 3).requires_grad_(False)
    given = {"controls": [ControlInput(net, noise(3))], "forecast": "safe", "steps": 6}
    expected = draw(pipe, prompt(), **given)
    assert (expected - draw(pipe, **given)).abs().max() > 1e-3
    assert (expected - draw(pipe, prompt(), **{**given, "controls": []})).abs().max() > 1e-3
    for mode in ("encoders", "blocks"):
        other = hydit_core.load(tiny_model_file, device="cpu")
        other.placement = Offload(torch.device("cpu"), mode, copier=Copier(torch.device("cpu")))
        assert torch.equal(draw(other, prompt(), **given), expected)


def test_the_mask_on_the_grid_of_tokens() -> None:
    """By shares of area, cropped like pictures that are fitted."""
    mask = Image.fromarray(np.repeat(np.array([[255, 0, 0, 255]], dtype=np.uint8), 2, 0))  # 4 x 2 pixels

    def tokens(size: tuple[int, int]) -> torch.Tensor:
        wide = mask.resize((size[1] * 3 // 2, size[1]), Image.Resampling.NEAREST)
        return token_mask(latent_mask(wide, size), 2)

    assert tokens((48, 32)).shape == (1, 6, 1)
    torch.testing.assert_close(
        tokens((48, 32)).flatten(), torch.tensor([0.75, 0.0, 0.75] * 2), atol=0.01, rtol=0
    )
    # A third of the width is cropped away, half of it on either side
    torch.testing.assert_close(tokens((32, 32)).flatten(), torch.tensor([0.25] * 4), atol=0.01, rtol=0)
    assert tokens((40, 24)).shape == (1, 3 * 2, 1)


def test_a_mask_in_tiles(pipe: Pipeline, prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile gets its part of it."""
    half = Image.fromarray(np.repeat(np.array([[255, 0]], dtype=np.uint8), 96, 1).repeat(64, 0))
    shares: list[list[float]] = []
    forward = type(pipe.dit).forward

    def watch(self, *args, images=None, **kwargs):
        shares.append(images[0].attended[0].mask.reshape(4, -1)[0].tolist())
        return forward(self, *args, images=images, **kwargs)

    monkeypatch.setattr(type(pipe.dit), "forward", watch)
    draw(pipe, prompt(mask=half), width=192, height=64, tile=(64, 64), steps=1)
    assert shares == [[1] * 4, [1, 1, 1, 0], [0] * 4, [0] * 4]


@pytest.mark.parametrize("weight", [1e39, -1e308])
def test_a_weight_that_overflows_is_told(pipe: Pipeline, prompt, weight: float) -> None:
    told = rf"not finite in torch\.float32 with a weight of {weight:g} .*use a smaller one"
    with pytest.raises(HyditError, match=told.replace("+", r"\+")):
        draw(pipe, prompt(blocks=LayerWeights.parse([1, weight, 0, 1])))


def test_tiles_share_keys_and_values() -> None:
    """However many there are, in a batch of any size; only what is left of a mask is another."""
    one = Attended(torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4))
    picture = PreparedImage([one, None], torch.rand(1, 1, 8, 8), 1.0, 999.0, 0.0)
    for repeats in (1, 3):
        images = Images([picture], repeats)
        seen = [images(2 * repeats, 500.0, Box(0, left, 4, 4))[0].attended[0] for left in (0, 2, 4)]
        assert len({(part.keys.data_ptr(), part.values.data_ptr()) for part in seen}) == 1
        assert not torch.equal(seen[0].mask, seen[1].mask)
        assert torch.equal(seen[0].keys, one.keys.repeat_interleave(repeats, 0))
        last = images(repeats, 500.0)[0].attended[0]
        assert torch.equal(last.values, one.values[1:].repeat_interleave(repeats, 0))


def test_what_does_not_fit_is_told(pipe: Pipeline, prompt, adapter: IPAdapter, encoder: ImageEncoder) -> None:
    other = IPAdapter(IPAdapterConfig(96, 6, 4, 12, 4, 32)).requires_grad_(False)
    told = r"the IP-Adapter does not fit this HunyuanDiT: hidden_size 96 instead of 64, depth 6 instead of 4"
    with pytest.raises(ConfigError, match=told):
        draw(pipe, ImagePrompt(other, encoder, noise(0)))
    narrow = IPAdapter(IPAdapterConfig.for_dit(TINY, 10, 4))
    with pytest.raises(ConfigError, match="encoder gives 12 values, the IP-Adapter takes 10"):
        ImagePrompt(narrow, encoder, noise(0))
    with pytest.raises(ConfigError, match="3 weights of an image prompt for a model with 4 blocks"):
        draw(pipe, prompt(blocks=LayerWeights.parse("1, 2, 3")))
    for wrong in ({"start": 0.5, "end": 0.2}, {"end": 1.1}, {"start": -0.1}, {"weight": float("nan")}):
        with pytest.raises(ConfigError, match="image prompt"):
            prompt(**wrong)
