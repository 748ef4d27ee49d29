"""HyDiTTiles: what each tile sees, against the tile drawn as a picture of its own and joined by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from control_models import STEERED, STEERED_V11, Vae, open_control, picture, save_control
from graphs import Graph, text_to_image
from model_runs import network_calls, prompt
from packs import load_pack
from PIL import Image
from sampling_models import our_model
from torch import Tensor

# In latents. The last tile of each direction is flush with the end.
HEIGHT, WIDTH, TILE, OVERLAP = 16, 24, (8, 12), 2
TOPS, LEFTS = (0, 6, 8), (0, 10, 12)
BOXES = [(top, left) for top in TOPS for left in LEFTS]

Prompts = tuple[list[Any], list[Any]]
Cut = Callable[[Tensor, int], Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiles")


@pytest.fixture(scope="module")
def model(host, folder):
    return our_model(host, folder, STEERED)


@pytest.fixture(scope="module")
def control(host, folder):
    return open_control(host, save_control(folder / "control.safetensors"))


def whole(values: Tensor, scale: int) -> Tensor:
    return values


def tile_at(top: int, left: int) -> Cut:
    """What cuts a tile out of (..., H, W), whose grid is `scale` times as fine as the latents'."""

    def cut(values: Tensor, scale: int) -> Tensor:
        rows = slice(scale * top, scale * (top + TILE[0]))
        return values[..., rows, scale * left : scale * (left + TILE[1])]

    return cut


def denoised(host: Any, model: Any, noise: Tensor, prompts: Prompts) -> Tensor:
    """One call of the model: a step of Euler's to the end is what it makes of the noise."""
    sample = host.comfy_module("comfy.sample").sample_custom
    sampler = host.comfy_module("comfy.samplers").sampler_object("euler")
    sigmas, nothing = torch.tensor([3.0, 0.0]), torch.zeros_like(noise)
    return sample(model, noise, 4.0, sampler, sigmas, *prompts, nothing, disable_pbar=True, seed=1)


def joined(parts: list[Tensor]) -> Tensor:
    """Each place counts by its distance to the nearest edges that meet another tile."""
    total, weights = torch.zeros(1, 4, HEIGHT, WIDTH), torch.zeros(HEIGHT, WIDTH)
    for (top, left), part in zip(BOXES, parts, strict=True):
        for y in range(TILE[0]):
            for x in range(TILE[1]):
                share = 1.0
                for at, start, length, size in ((y, top, TILE[0], HEIGHT), (x, left, TILE[1], WIDTH)):
                    before = (at + 0.5) / OVERLAP if start else 1
                    after = (length - at - 0.5) / OVERLAP if start + length < size else 1
                    share *= min(1.0, before, after)
                total[..., top + y, left + x] += share * part[..., y, x]
                weights[top + y, left + x] += share
    return total / weights


def noise() -> Tensor:
    return torch.randn(1, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3))


def in_tiles(host: Any, model: Any, overlap: int = OVERLAP) -> Any:
    return host.module("nodes.host.tiles").with_tiles(model, (8 * TILE[1], 8 * TILE[0]), 8 * overlap)


def off_by(host: Any, model: Any, prompts: Callable[[Cut, int, int], Prompts]) -> float:
    """How far tiles are from drawing each alone and joining them, in standard deviations.

    `prompts` gets what cuts a tile out, and its place.
    """
    parts = [denoised(host, model, tile_at(*box)(noise(), 1), prompts(tile_at(*box), *box)) for box in BOXES]
    expected = joined(parts)
    found = denoised(host, in_tiles(host, model), noise(), prompts(whole, 0, 0))
    plain = denoised(host, model, noise(), prompts(whole, 0, 0))
    scale = expected.std()
    assert float((plain - found).abs().max() / scale) > 0.05  # a tile is another picture than the whole
    return float((found - expected).abs().max() / scale)


def test_prompts(host, model):
    assert off_by(host, model, lambda cut, *_: (prompt(1), prompt(2, 9))) < 1e-4


def masked(one: list[Any], **extra: Any) -> list[Any]:
    return [[tensor, {**entry, **extra}] for tensor, entry in one]


def test_prompts_for_parts_by_masks(host, model):
    shares = torch.rand(1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    left = (torch.arange(WIDTH) < 11).float().expand(1, HEIGHT, WIDTH)

    def prompts(cut: Cut, *_: int) -> Prompts:
        masks = [cut(mask, 1) for mask in (left, shares)]
        given = {"mask_strength": 0.8, "set_area_to_bounds": False}
        first, second = (masked(prompt(i), mask=mask, **given) for i, mask in enumerate(masks, 1))
        return first + second + prompt(4), prompt(2, 9)

    assert off_by(host, model, prompts) < 1e-4


def test_prompts_for_parts_by_areas(host, model):
    """Tiles that an area does not reach are drawn without its prompt."""
    areas = ((HEIGHT, 12, 0, 0), (10, 14, 6, 10), (4, 4, 0, 20))  # height, width, top, left

    def prompts(cut: Cut, top: int, left: int) -> Prompts:
        size = (HEIGHT, WIDTH) if cut is whole else TILE
        found = []
        for number, (height, width, y, x) in enumerate(areas, 1):
            above, before = max(y, top), max(x, left)
            below, after = min(y + height, top + size[0]), min(x + width, left + size[1])
            if above < below and before < after:
                area = (below - above, after - before, above - top, before - left)
                found += masked(prompt(number), area=area, strength=0.7)
        return found + prompt(9), prompt(2, 9)

    assert off_by(host, model, prompts) < 1e-4


@pytest.mark.parametrize("told", [None, (640, 512)])
def test_a_model_that_is_told_sizes(host, folder, told):
    """That of a tile, unless the prompt says another."""
    model = our_model(host, folder, STEERED_V11)
    size = {} if told is None else {"width": told[0], "height": told[1]}

    def prompts(cut: Cut, *_: int) -> Prompts:
        return masked(prompt(1), **size), masked(prompt(2, 9), **size)

    assert off_by(host, model, prompts) < 1e-4
    with network_calls(host) as calls:
        denoised(host, in_tiles(host, model), noise(), prompts(whole, 0, 0))
    sizes = {tuple(call["image_meta_size"][0, 2:4].tolist()) for call in calls}
    assert sizes == {told or (8.0 * TILE[1], 8.0 * TILE[0])}


def controlled(host: Any, before: Prompts, control: Any, cut: Cut, **given: Any) -> Prompts:
    """Prompts behind a ControlNet that follows a picture as large as what is drawn."""
    shown = cut(picture(3, (8 * WIDTH, 8 * HEIGHT)).movedim(-1, 1), 8).movedim(1, -1)
    apply = host.module("nodes.host.control_apply").apply_control
    parse = host.module("hydit_core.layer_weights").LayerWeights.parse
    weights = parse(given.pop("weights", "uniform(1)"))
    settings = {"strength": 0.8, "start": 0.0, "end": 1.0, "weights": weights, **given}
    return apply(*before, control, shown, Vae(), **settings)


def test_controlnets(host, model, control):
    """With weights, with a mask, and one behind the other."""
    mask = torch.rand(1, 8 * HEIGHT, 8 * WIDTH, generator=torch.Generator().manual_seed(1)).round()

    def prompts(cut: Cut, *_: int) -> Prompts:
        first = controlled(host, (prompt(1), prompt(2, 9)), control, cut, mask=cut(mask, 8))
        return controlled(host, first, control, cut, weights="1, 0.25, -2", strength=0.3)

    assert off_by(host, model, prompts) < 1e-4


@pytest.fixture
def advanced(host):
    """What makes a CONTROL_NET one of Advanced-ControlNet's, and its modules."""
    load_pack(host, "ComfyUI-Advanced-ControlNet", "ACN_AdvancedControlNetApply_v2")
    modules = {name.split("adv_control.")[-1]: module for name, module in sys.modules.items()}
    return modules["control"].convert_to_advanced, modules["utils"]


@pytest.mark.parametrize("where", ["mask", "keyframe", "weights", "override"])
def test_the_masks_of_advanced_controlnet(host, model, control, advanced, where):
    convert, utils = advanced
    shares = torch.rand(1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    shares = torch.nn.functional.interpolate(shares[None], scale_factor=8, mode="bilinear")[0]

    def prompts(cut: Cut, *_: int) -> Prompts:
        both = controlled(host, (prompt(1), prompt(2, 9)), control, cut)
        for one in both:
            group, mask = utils.TimestepKeyframeGroup(), cut(shares, 8)
            weights = utils.ControlWeights.universal_mask(weight_mask=mask)
            given = {"mask_hint_orig": mask} if where == "keyframe" else {}
            if where == "weights":
                given["control_weights"] = weights
            group.keyframes[0] = utils.TimestepKeyframe(**given)
            made = convert(one[0][1]["control"], timestep_keyframe=group)
            if where == "mask":
                made.set_cond_hint_mask(mask)
            elif where == "override":
                made.weights_override = weights
            one[0][1]["control"] = made
        return both

    assert off_by(host, model, prompts) < 1e-4


def test_a_forecast_sees_the_whole(host, model):
    """In whichever order the two nodes stand: a call is left out for all tiles, or for none."""
    rows: list[int] = []

    def call(apply_model: Any, args: dict[str, Any]) -> Tensor:
        rows.append(len(args["input"]))
        return apply_model(args["input"], args["timestep"], **args["c"])

    counting = model.clone()
    counting.set_model_unet_function_wrapper(call)
    found = []
    for order in (("HyDiTForecast", "HyDiTTiles"), ("HyDiTTiles", "HyDiTForecast")):
        g = Graph()
        link: Any = host.give(g, counting)
        for node in order:
            own: dict[str, Any] = {"preset": "custom", "tolerance": 1.0}
            if node == "HyDiTTiles":
                own = {"tile_width": 8 * TILE[1], "tile_height": 8 * TILE[0], "overlap": 8 * OVERLAP}
            link = g.add(node, model=link, **own)
        latent = {"samples": torch.zeros_like(noise())}
        given = {"positive": prompt(1), "negative": prompt(2, 9), "latent_image": latent}
        links = {name: host.give(g, value) for name, value in given.items()}
        own = {"seed": 5, "steps": 24, "cfg": 4.0, "sampler": "dpmpp_2m"}
        rows.clear()
        node = g.add("HyDiTKSampler", _defaults=True, model=link, **links, **own)
        found.append(host.values(g, node)[0]["samples"])
        said = [data["output"] for event, data in host.events if event == "executed" and data.get("output")]
        (text,) = (output["hydit_forecast"][0] for output in said if "hydit_forecast" in output)
        assert text == f"{len(rows) // len(BOXES)} of 24 calls of the model were real"
        assert len(rows) % len(BOXES) == 0 and len(rows) < 22 * len(BOXES)
    assert torch.equal(*found)


# -- seams ---------------------------------------------------------------------------------------------------


def flat(apply_model: Any, args: dict[str, Any]) -> Tensor:
    """A network that sees nothing but its tile, and makes one even color of it."""
    x = args["input"]
    return x.mean(dim=(2, 3), keepdim=True).expand_as(x).clone()


def jump(latents: Tensor) -> Tensor:
    """The largest difference of neighbors."""
    return torch.stack([latents.diff(dim=axis).abs().max() for axis in (2, 3)]).max()


def test_where_tiles_meet_nothing_jumps(host, model):
    """What differs between two tiles is spread evenly over all that they share."""
    model = model.clone()
    model.set_model_unet_function_wrapper(flat)
    values = noise() + torch.linspace(0, 20, WIDTH)
    given = prompt(1), prompt(2, 9)
    abrupt, soft = (denoised(host, in_tiles(host, model, overlap), values, given) for overlap in (0, 4))
    assert jump(soft) < 0.3 * jump(abrupt)


def test_previews_show_the_whole(host):
    """A picture of 256 x 128 pixels, redrawn in tiles of 128 x 128."""
    g = text_to_image("a robot", seed=1, steps=12, cfg=0.0, save=False)
    vae, clip = ["1", 2], ["1", 1]
    scale = {"upscale_method": "lanczos", "width": 256, "height": 128, "crop": "disabled"}
    start = g.add("ImageScale", image=["6", 0], **scale)
    latent = g.add("VAEEncode", pixels=start, vae=vae)
    texts = [g.add("HyDiTTextEncode", _defaults=True, clip=clip, text=text) for text in ("a robot", "")]
    tiles = {"tile_width": 128, "tile_height": 128, "overlap": 32}
    sampled = g.add(
        "HyDiTKSampler",
        _defaults=True,
        model=g.add("HyDiTTiles", model=["1", 0], **tiles),
        positive=texts[0],
        negative=texts[1],
        latent_image=latent,
        seed=1,
        steps=20,
        denoise=0.5,
    )
    (drawn,) = host.values(g, g.add("VAEDecode", samples=sampled, vae=vae))
    shown = [image for node, image in host.previews if node == sampled.id]
    assert len(shown) == 10
    for preview in (shown[0], shown[-1]):
        assert preview.width == 2 * preview.height
    decoded = Image.fromarray((drawn[0] * 255).round().clamp(0, 255).to(torch.uint8).numpy())
    decoded = decoded.resize(shown[-1].size, Image.Resampling.BOX)
    pair = [np.asarray(image.convert("RGB"), float).ravel() for image in (shown[-1], decoded)]
    assert np.corrcoef(*pair)[0, 1] > 0.9
