"""IP-Adapters in ComfyUI: what the DiT sees of pictures, whoever samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import Graph
from image_prompt_models import (
    Truth,
    add_apply,
    applied,
    drawn,
    open_adapter,
    photo,
    save_adapter,
    save_encoder,
)
from model_runs import error, ksampler, network_calls, prompt
from packs import load_pack
from sampling_models import features, our_model
from torch import Tensor

NEGATIVE = features(2, words=9)["bert"]
# What is drawn has 96 x 64 pixels, so 12 x 8 latents and 6 x 4 tokens
LEFT = (torch.arange(96) < 48).float().expand(1, 64, 96)
ROUGH = torch.rand(1, 64, 96, generator=torch.Generator().manual_seed(8)).round()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("image-prompts")


@pytest.fixture(scope="module")
def files(folder):
    return save_adapter(folder / "ipa.pt"), save_encoder(folder / "clip_img_encoder.pt")


@pytest.fixture(scope="module")
def model(host, folder):
    return our_model(host, folder)


@pytest.fixture(scope="module")
def adapter(host, files):
    return open_adapter(host, *files)


@pytest.fixture(scope="module")
def truth(files):
    return Truth(*files)


def calls_of(host: Any, model: Any, *pictures: dict[str, Any], **sampling: Any) -> list[dict[str, Any]]:
    """The calls of the network in two steps of ComfyUI's KSampler."""
    with network_calls(host) as calls:
        drawn(host, model, *pictures, **{"steps": 2, **sampling})
    assert calls
    return calls


def negative_rows(call: dict[str, Any]) -> list[bool]:
    """By what each row reads, not by what ComfyUI says of it."""
    return [torch.equal(text, NEGATIVE[0]) for text in call["context"]]


def check(truth: Truth, call: dict[str, Any], *pictures: dict[str, Any]) -> None:
    """A call gave what the formula gives."""
    found = truth.forward(call, negative_rows(call), pictures)
    assert error(call["out"], found) < 1e-4


def tokens(mask: Tensor) -> Tensor:
    """(1, H, W) of pixels -> (1, N, 1): the share of each token's 16 x 16 pixels."""
    _, height, width = mask.shape
    return mask.reshape(height // 16, 16, width // 16, 16).mean((1, 3)).reshape(1, -1, 1)


# -- what the network computes -------------------------------------------------------------------------------


def test_each_call_is_the_formula(host, model, adapter, truth):
    """Two pictures, weights of the picture and by block, in batches with a negative prompt."""
    image, other = photo(3), photo(4, (11, 40))
    given = [
        {"adapter": adapter, "image": image, "weight": 0.7, "block_weights": "1, 0, -0.5, 2"},
        {"adapter": adapter, "image": other, "weight": 1.2},
    ]
    expected = [{"image": image, "weight": 0.7, "blocks": [1, 0, -0.5, 2]}, {"image": other, "weight": 1.2}]
    for call in calls_of(host, model, *given, latent_image=torch.zeros(2, 4, 8, 12)):
        assert sorted(negative_rows(call)) == [False, False, True, True]
        check(truth, call, *expected)
        assert error(call["out"], truth.forward(call, [False] * 4, expected)) > 1e-3
        assert error(call["out"], truth.forward(call, negative_rows(call), expected[:1])) > 1e-3


def test_a_weight_of_zero_is_no_adapter_to_the_bit(host, model, adapter):
    plain = ksampler(host, model)
    given = {"adapter": adapter, "image": photo()}
    assert error(drawn(host, model, given), plain) > 0.01
    for nothing in (
        {"weight": 0.0},
        {"block_weights": "0"},
        {"start_percent": 0.999, "end_percent": 0.999},
        {"mask": torch.zeros(1, 9, 9)},
    ):
        assert torch.equal(drawn(host, model, {**given, **nothing}), plain), nothing
    assert torch.equal(ksampler(host, model), plain)  # the MODEL that was given is as it was


def test_a_batch_counts_as_several_pictures(host, model, adapter):
    two = photo(3, batch=2)
    given = {"adapter": adapter, "weight": 0.5}
    one_by_one = [{**given, "image": image[None]} for image in two]
    together = drawn(host, model, {**given, "image": two})
    assert torch.equal(together, drawn(host, model, *one_by_one))
    assert error(drawn(host, model, *one_by_one[::-1]), together) < 1e-5
    assert error(drawn(host, model, one_by_one[0]), together) > 1e-3


def test_nodes_add_to_a_list_of_their_own(host, model, adapter):
    """Two branches from one node do not see each other's pictures."""
    first = applied(host, model, adapter, photo(3))
    plain = ksampler(host, first)
    left, right = (applied(host, first, adapter, photo(seed)) for seed in (4, 5))
    pictures = [
        m.model_options["transformer_options"].get("hydit_images", ()) for m in (model, first, left, right)
    ]
    assert [len(each) for each in pictures] == [0, 1, 2, 2]
    assert all(each[0] is pictures[1][0] for each in pictures[1:])  # shared, not copied
    assert error(ksampler(host, left), ksampler(host, right)) > 1e-3
    assert torch.equal(ksampler(host, first), plain)


def test_pictures_of_any_size_with_any_channels(host, model, adapter, truth):
    """Transparency lies on white; one channel is gray; what is beyond the range is cut off."""
    image = photo(3, (64, 7))
    clear = torch.cat((image, torch.zeros(1, 7, 64, 1)), dim=-1)
    solid = torch.cat((image, torch.ones(1, 7, 64, 1)), dim=-1)
    for given, same in (
        (clear, torch.ones(1, 7, 64, 3)),
        (solid, image),
        (image[..., :1], image[..., :1].expand(-1, -1, -1, 3)),
        (torch.full((1, 3, 5, 3), 1.7), torch.ones(1, 9, 9, 3)),
        (photo(3, (1, 1)), photo(3, (1, 1)).expand(1, 30, 40, 3)),
    ):
        for call in calls_of(host, model, {"adapter": adapter, "image": given}, steps=1):
            check(truth, call, {"image": same})


# -- where and when ------------------------------------------------------------------------------------------


def test_masks(host, model, adapter, truth):
    given = {"adapter": adapter, "image": photo(3)}
    for mask in (LEFT, ROUGH, ROUGH[0]):
        for call in calls_of(host, model, {**given, "mask": mask}):
            check(truth, call, {"image": photo(3), "mask": tokens(mask.reshape(1, 64, 96))})
    # Scaled and cropped to what is drawn: of a square, the middle
    square = torch.zeros(1, 96, 96)
    square[:, 16:80, :48] = 1
    for call in calls_of(host, model, {**given, "mask": square}):
        check(truth, call, {"image": photo(3), "mask": tokens(LEFT)})


def test_a_mask_for_each_picture_of_a_batch(host, model, adapter, truth):
    two = photo(3, batch=2)
    masks = torch.cat((LEFT, 1 - LEFT))
    expected = [{"image": two[i : i + 1], "mask": tokens(masks[i : i + 1])} for i in range(2)]
    for call in calls_of(host, model, {"adapter": adapter, "image": two, "mask": masks}):
        check(truth, call, *expected)
    for call in calls_of(host, model, {"adapter": adapter, "image": two, "mask": LEFT}):
        check(truth, call, *({**one, "mask": tokens(LEFT)} for one in expected))


@pytest.mark.parametrize("start, end", [(0.0, 0.5), (0.3, 1.0), (0.25, 0.75)])
def test_start_and_end(host, model, adapter, truth, start, end):
    """As ComfyUI counts: timestep (1 - fraction) * 999."""
    given = {"adapter": adapter, "image": photo(3), "start_percent": start, "end_percent": end}
    acted = []
    for call in calls_of(host, model, given, steps=8):
        t = float(call["t"][0])
        acts = (end == 1 or t >= (1 - end) * 999) and (start == 0 or t <= (1 - start) * 999)
        check(truth, call, *([{"image": photo(3)}] if acts else []))
        acted.append(acts)
    assert True in acted and False in acted


# -- who samples ---------------------------------------------------------------------------------------------


def test_prompts_in_calls_of_their_own(host, model, adapter, truth, monkeypatch):
    """As ComfyUI makes them where memory is short."""
    monkeypatch.setattr(model.model, "memory_required", lambda *args, **kwargs: 2**60, raising=False)
    calls = calls_of(host, model, {"adapter": adapter, "image": photo(3), "mask": LEFT})
    assert [negative_rows(call) for call in calls].count([True]) == 2 and len(calls) == 4
    for call in calls:
        check(truth, call, {"image": photo(3), "mask": tokens(LEFT)})


def test_without_guidance(host, model, adapter, truth):
    for call in calls_of(host, model, {"adapter": adapter, "image": photo(3)}, cfg=1.0):
        assert negative_rows(call) == [False]
        check(truth, call, {"image": photo(3)})


@pytest.mark.parametrize("kind", ["DualCFGGuider", "DualCFGGuider nested", "PerpNegGuider", "BasicGuider"])
def test_guiders_that_count_prompts_otherwise(host, model, adapter, truth, kind):
    """Their negative prompts have other numbers. DualCFG's second prompt is negative to ComfyUI, too."""
    g = Graph()
    source = add_apply(host, g, host.give(g, model), adapter, photo(3))
    positive, other, negative = (host.give(g, one) for one in (prompt(1), prompt(2, 9), prompt(2, 9)))
    name, *style = kind.split()
    inputs: dict[str, Any] = {"model": source}
    if name == "DualCFGGuider":
        inputs |= {"cond1": positive, "cond2": other, "negative": negative, "cfg_conds": 3.0}
        inputs |= {"cfg_cond2_negative": 2.0, "style": "nested" if style else "regular"}
    elif name == "PerpNegGuider":
        inputs |= {"positive": positive, "negative": negative, "empty_conditioning": negative}
        inputs |= {"cfg": 3.0, "neg_scale": 1.0}
    else:
        inputs |= {"conditioning": positive}
    sampled = g.add(
        "SamplerCustomAdvanced",
        noise=g.add("RandomNoise", noise_seed=3),
        guider=g.add(name, **inputs),
        sampler=g.add("KSamplerSelect", sampler_name="euler"),
        sigmas=g.add("BasicScheduler", model=source, scheduler="normal", steps=2, denoise=1.0),
        latent_image=host.give(g, {"samples": torch.zeros(1, 4, 8, 12)}),
    )
    with network_calls(host) as calls:
        host.values(g, sampled)
    assert {sum(negative_rows(call)) for call in calls} == {0 if kind == "BasicGuider" else 2}
    for call in calls:
        check(truth, call, {"image": photo(3)})


def test_self_attention_guidance_asks_for_the_negative_prompt_again(host, model, adapter, truth):
    g = Graph()
    guided = g.add("SelfAttentionGuidance", model=host.give(g, model), scale=0.5, blur_sigma=2.0)
    (guided,) = host.values(g, guided)
    calls = calls_of(host, guided, {"adapter": adapter, "image": photo(3)}, steps=1)
    assert [True] in [negative_rows(call) for call in calls]
    again = [call for call in calls if negative_rows(call) == [True]]
    for call in again:
        check(truth, call, {"image": photo(3)})


def test_areas_get_their_part_of_a_mask(host, model, adapter, truth):
    """A prompt for the right half, with another for everything."""
    g = Graph()
    area = g.add(
        "ConditioningSetArea", conditioning=host.give(g, prompt(7)), width=64, height=64, x=64, y=16,
        strength=1.0,
    )  # fmt: skip
    both = g.add("ConditioningCombine", conditioning_1=area, conditioning_2=host.give(g, prompt(1)))
    (positive,) = host.values(g, both)
    rough = torch.rand(1, 80, 128, generator=torch.Generator().manual_seed(8)).round()
    given = {"adapter": adapter, "image": photo(3), "mask": rough}
    parts = set()
    for call in calls_of(host, model, given, positive=positive, latent_image=torch.zeros(1, 4, 10, 16)):
        part = tuple(call["x"].shape[-2:]) == (8, 8)
        mask = rough[:, 16:80, 64:] if part else rough
        check(truth, call, {"image": photo(3), "mask": tokens(mask)})
        parts |= {(part, row) for row in negative_rows(call)}
    assert parts == {(True, True), (True, False), (False, True), (False, False)}


def test_masked_prompts_see_the_whole_mask(host, model, adapter, truth):
    g = Graph()
    masked = g.add(
        "ConditioningSetMask", conditioning=host.give(g, prompt(7)), mask=host.give(g, 1 - LEFT),
        strength=1.0, set_cond_area="default",
    )  # fmt: skip
    (positive,) = host.values(g, masked)
    for call in calls_of(
        host, model, {"adapter": adapter, "image": photo(3), "mask": ROUGH}, positive=positive
    ):
        check(truth, call, {"image": photo(3), "mask": tokens(ROUGH)})


def test_tiles_get_the_picture_and_their_part_of_the_mask(host, model, adapter, truth):
    g = Graph()
    cut = g.add(
        "HyDiTTiles",
        model=add_apply(host, g, host.give(g, model), adapter, photo(3), mask=ROUGH),
        tile_width=48,
        tile_height=64,
        overlap=0,
    )
    (cut,) = host.values(g, cut)
    calls = calls_of(host, cut, steps=1)
    assert len(calls) == 2
    for call, left in zip(calls, (0, 48), strict=True):
        assert tuple(call["x"].shape[-2:]) == (8, 6)
        check(truth, call, {"image": photo(3), "mask": tokens(ROUGH[:, :, left : left + 48])})


def test_tiled_diffusion_cuts_the_mask(host, model, adapter, truth):
    """Another pack's tiles, several in one call."""
    load_pack(host, "ComfyUI-TiledDiffusion", "TiledDiffusion")
    rough = torch.rand(1, 64, 128, generator=torch.Generator().manual_seed(8)).round()
    g = Graph()
    cut = g.add(
        "TiledDiffusion", model=add_apply(host, g, host.give(g, model), adapter, photo(3), mask=rough),
        method="MultiDiffusion", tile_width=64, tile_height=64, tile_overlap=0, tile_batch_size=2,
    )  # fmt: skip
    (cut,) = host.values(g, cut)
    parts = [tokens(rough[:, :, :64])] * 2 + [tokens(rough[:, :, 64:])] * 2
    for call in calls_of(host, cut, latent_image=torch.zeros(1, 4, 8, 16)):
        assert tuple(call["x"].shape) == (4, 4, 8, 8) and sum(negative_rows(call)) == 2
        check(truth, call, {"image": photo(3), "mask": torch.cat(parts)})


def test_latents_of_odd_sides(host, model, adapter, truth):
    """Half a token at the border counts as what of it is there."""
    calls = calls_of(
        host,
        model,
        {"adapter": adapter, "image": photo(3), "mask": torch.ones(1, 56, 88)},
        latent_image=torch.zeros(1, 4, 7, 11),
    )
    for call in calls:
        check(truth, call, {"image": photo(3)})
