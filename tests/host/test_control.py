"""ControlNets in the graph: the numbers, against ComfyUI's own node and network and hydit_core's pipeline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from control_models import (
    APPLY,
    STEERED,
    STEERED_V11,
    STOCK,
    Out,
    Vae,
    add_apply,
    add_steered,
    control_calls,
    control_weights,
    native_control,
    open_control,
    picture,
    save_control,
    steered,
)
from graphs import Graph, Node, text_to_image
from model_runs import error, ksampler, network_calls, prompt
from PIL import Image
from sampling_models import native_model, our_model, weights
from tiny_models import randomize
from torch import Tensor

from hydit_core.model import ControlNet

LAYERS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("control")


@pytest.fixture(scope="module")
def model(host, folder):
    return our_model(host, folder, STEERED)


@pytest.fixture(scope="module")
def control(host, folder):
    return open_control(host, save_control(folder / "control.safetensors"))


@pytest.fixture(scope="module")
def native(host):
    return native_control(host)


@pytest.fixture(scope="module")
def plain(host, model):
    """Without a ControlNet."""
    return ksampler(host, model)


@pytest.fixture(scope="module")
def neutral(host, model, control):
    return steered(host, model, control)


@pytest.fixture(scope="module", autouse=True)
def _nothing_stays(host, model, control, neutral):
    """Whatever the tests did, the same graph gives the same bits afterwards."""
    yield
    assert torch.equal(steered(host, model, control), neutral)


def residuals(host: Any, model: Any, control: Any, *nodes: str, **given: Any) -> list[list[Tensor]]:
    """What reaches the DiT at each step through a chain of apply nodes."""
    g, applied = Graph(), None
    sampling = given.pop("sampling", {})
    for node in nodes or (APPLY,):
        applied = add_apply(host, g, control, node, applied, **given)
    with network_calls(host) as calls:
        host.values(g, add_steered(host, g, model, applied, **sampling))
    return [call["control"]["output"] for call in calls]


# -- against ComfyUI's own -----------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["control", "native"])
@pytest.mark.parametrize(
    "given",
    [{}, {"strength": 0.35}, {"start_percent": 0.2, "end_percent": 0.6}, {"image": picture(4, (80, 80))}],
    ids=["plain", "strength", "range", "cropped"],
)
def test_neutral_weights_are_the_stock_node(host, model, plain, request, whose, given):
    net = request.getfixturevalue(whose)
    found = steered(host, model, net, **given)
    assert torch.equal(found, steered(host, model, net, STOCK, **given))
    assert error(found, plain) > 0.01


@pytest.mark.parametrize("size", [(8, 8), (8, 12), (14, 6)], ids=["square", "wide", "high"])
def test_against_the_native_network(host, model, control, native, size):
    """The residuals that reach the DiT, the same up to rounding; both halves of guidance."""
    sampling = {"latent_image": torch.zeros(2, 4, *size), "steps": 2}
    ours = residuals(host, model, control, sampling=sampling)
    theirs = residuals(host, model, native, sampling=sampling)
    assert len(ours) == len(theirs) == 2 and len(ours[0]) == LAYERS
    # Later steps start from latents that differ a little already
    for layer, expected in zip(ours[0], theirs[0], strict=True):
        assert layer.shape == (4, size[0] * size[1] // 4, 64)
        assert error(layer, expected) < 1e-5


def test_in_the_native_model(host, model, control, native):
    """Our ControlNet steers ComfyUI's own HunyuanDiT as its own ControlNet does, and ours as theirs."""
    base = native_model(host, STEERED)
    expected = steered(host, base, native, STOCK)
    for node in (APPLY, STOCK):
        assert error(steered(host, base, control, node), expected) < 1e-4
    assert error(steered(host, model, control), expected) < 1e-4
    assert error(ksampler(host, base), expected) > 0.01


def test_native_networks_are_weighted_by_a_copy(host, model, native):
    before = {key: value.clone() for key, value in native.control_model.state_dict().items()}
    (full, *_), (half, *_) = (
        residuals(host, model, native, layer_weights=text) for text in ("1", "0.25, 1, -2")
    )
    for layer, other, weight in zip(full, half, (0.25, 1, -2), strict=True):
        assert torch.equal(other, layer * weight)
    assert (native.strength, native.cond_hint_original) == (1.0, None)
    assert all(torch.equal(native.control_model.state_dict()[key], value) for key, value in before.items())


# -- weights -------------------------------------------------------------------------------------------------


def test_weights_multiply_layer_by_layer(host, model, control):
    full = residuals(host, model, control)[0]
    for text, values in (
        ("0.25, 1, -2", (0.25, 1, -2)),
        ("decay", [0.825 ** (LAYERS - i) for i in range(LAYERS)]),
        ("only-late(0.5)", (0, 0, 0.5)),
    ):
        found = residuals(host, model, control, layer_weights=text)[0]
        for layer, other, weight in zip(full, found, values, strict=True):
            assert torch.equal(other, layer * weight), text


def test_a_number_is_that_number_everywhere_and_zero_is_nothing(host, model, control, plain, neutral):
    found = steered(host, model, control, layer_weights="0.4")
    for same in ("0.4, 0.4, 0.4", "uniform(0.4)"):
        assert torch.equal(steered(host, model, control, layer_weights=same), found)
    assert error(found, plain) > 0.01 and error(found, neutral) > 0.01
    for nothing in ({"layer_weights": "0"}, {"layer_weights": "0, 0, 0"}, {"strength": 0.0}):
        assert torch.equal(steered(host, model, control, **nothing), plain)


def test_strength_multiplies_weights(host, model, control):
    """0.5 is a power of two: both orders give the same bits."""
    found = steered(host, model, control, strength=0.5, layer_weights="1, 2, 0.5")
    assert torch.equal(found, steered(host, model, control, layer_weights="0.5, 1, 0.25"))


def test_a_layer_of_weight_zero_is_off_even_when_it_overflows(host, model, folder):
    tensors = control_weights()
    tensors["after_proj_list.1.bias"][0] = float("inf")
    broken = open_control(host, save_control(folder / "broken.safetensors"))
    broken.control_model.load_state_dict(tensors)
    assert torch.isfinite(steered(host, model, broken, layer_weights="1, 0, 1")).all()


def test_weights_come_from_their_node(host, model, control):
    g = Graph()
    drawn = g.add("HyDiTLayerWeights", weights="0.25,1,  -2", layers=LAYERS)
    applied = add_apply(host, g, control, layer_weights=drawn)
    text, latent = host.values(g, drawn, add_steered(host, g, model, applied))
    assert text == "0.25, 1, -2"
    assert torch.equal(latent["samples"], steered(host, model, control, layer_weights="0.25, 1, -2"))


def test_a_curve_from_the_node_fits_every_controlnet(host, model, control):
    """The number of bars is for the page: a curve is not bound to it."""
    g = Graph()
    drawn = g.add("HyDiTLayerWeights", _defaults=True, weights="decay(0.9)")
    applied = add_apply(host, g, control, layer_weights=drawn)
    text, latent = host.values(g, drawn, add_steered(host, g, model, applied))
    assert text == "decay(0.9)"
    assert torch.equal(latent["samples"], steered(host, model, control, layer_weights="0.729, 0.81, 0.9"))


# -- when and where ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end"), [(0.0, 1.0), (0.0, 0.5), (0.5, 1.0), (0.3, 0.7), (0.0, 0.0), (1.0, 1.0)]
)
def test_it_acts_in_the_steps_that_the_stock_node_says(host, model, control, start, end):
    given = {"start_percent": start, "end_percent": end, "sampling": {"steps": 8}}
    times = []
    for node in (APPLY, STOCK):
        with control_calls(control) as calls:
            steered(host, model, control, node, **given)
        times.append([float(call["timesteps"][0]) for call in calls])
    assert times[0] == times[1]
    assert len(times[0]) == {(0.0, 1.0): 8, (0.0, 0.0): 0, (1.0, 1.0): 0}.get((start, end), len(times[0]))
    if (start, end) == (0.3, 0.7):
        assert 2 <= len(times[0]) <= 4 and all(0.3 * 999 <= t <= 0.7 * 999 for t in times[0])


def test_a_mask_says_where(host, model, control, plain, neutral):
    everywhere, nowhere = torch.ones(1, 64, 96), torch.zeros(64, 96)
    assert torch.equal(steered(host, model, control, mask=everywhere), neutral)
    assert torch.equal(steered(host, model, control, mask=nowhere), plain)
    left = (torch.arange(96) < 40).float().expand(1, 64, 96)
    given = {"layer_weights": "1, 0.5, 2"}
    full, found = (residuals(host, model, control, **given, **more)[0] for more in ({}, {"mask": left}))
    # 96 pixels are 6 tokens: two and a half of them are covered
    share = torch.tensor([1.0, 1, 0.5, 0, 0, 0]).repeat(4)[:, None]
    for layer, other in zip(full, found, strict=True):
        assert torch.equal(other, layer * share)


def test_a_mask_is_cropped_as_its_picture(host, model, control):
    """A mask that was painted on a control picture of another shape stays where it was painted."""
    image, mask = torch.full((1, 128, 96, 3), 0.5), torch.zeros(1, 128, 96)
    mask[:, 32:64] = 1  # of the 64 rows in the middle, the upper half
    full, found = (residuals(host, model, control, image=image, **more)[0] for more in ({}, {"mask": mask}))
    rows = torch.tensor([1.0, 1, 0, 0]).repeat_interleave(6)[:, None]
    for layer, other in zip(full, found, strict=True):
        assert torch.equal(other, layer * rows)


def test_odd_latents_and_masks(host, model, control):
    """9 x 13 latents are 5 x 7 tokens; the last row and column are half outside."""
    mask = torch.zeros(1, 72, 104)
    mask[:, 64:, 96:] = 1
    sampling = {"latent_image": torch.zeros(1, 4, 9, 13), "steps": 1}
    found = residuals(host, model, control, mask=mask, sampling=sampling)[0]
    full = residuals(host, model, control, sampling=sampling)[0]
    for layer, other in zip(full, found, strict=True):
        assert layer.shape[1] == 35 and torch.equal(other[:, -1], layer[:, -1]) and not other[:, :-1].any()


# -- batches -------------------------------------------------------------------------------------------------


def test_every_picture_of_a_batch_has_its_own(host, model, control):
    """Pictures and masks of a batch go to the latents in turn, in both halves of guidance; one to all."""
    images, masks = picture(batch=3), torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(8))
    sampling = {"latent_image": torch.zeros(3, 4, 8, 12), "steps": 1}
    with control_calls(control) as calls:
        full = residuals(host, model, control, image=images, sampling=sampling)[0]
    found = residuals(host, model, control, image=images, mask=masks, sampling=sampling)[0]
    share = torch.nn.functional.avg_pool2d(masks[:, None], 16).flatten(2).transpose(1, 2).repeat(2, 1, 1)
    for layer, other in zip(full, found, strict=True):
        assert torch.allclose(other, layer * share, atol=1e-6)
    hints = calls[0]["hint"]
    for i in range(3):
        with control_calls(control) as calls:
            residuals(host, model, control, image=images[i : i + 1], sampling={"steps": 1})
        assert torch.equal(hints[[i, i + 3]], calls[0]["hint"].expand(2, -1, -1, -1))
    with control_calls(control) as calls:
        shared = residuals(host, model, control, mask=masks[:1], sampling=sampling)[0]
    assert len(calls[0]["hint"]) in (1, 6) and len(shared[0]) == 6
    full = residuals(host, model, control, sampling=sampling)[0]
    assert torch.allclose(shared[0], full[0] * share[:1], atol=1e-6)


def test_without_guidance(host, model, control, native):
    sampling = {"cfg": 1.0}
    with control_calls(control) as calls:
        found = steered(host, model, control, sampling=sampling)
    assert [len(call["x"]) for call in calls] == [1, 1, 1]
    assert error(found, steered(host, model, native, STOCK, sampling=sampling)) < 1e-4
    assert error(found, ksampler(host, model, **sampling)) > 0.01


def test_guidance_runs_as_one_batch_and_encodes_the_picture_once(host, model, control):
    vae = Vae()
    with control_calls(control) as calls:
        steered(host, model, control, vae=vae)
    assert [len(call["x"]) for call in calls] == [2, 2, 2]
    assert vae.encoded == [(1, 64, 96, 3)]


def test_transparency_is_left_out(host, model, control, neutral):
    rgba = torch.cat((picture(), torch.rand(1, 64, 96, 1)), dim=-1)
    assert torch.equal(steered(host, model, control, image=rgba), neutral)


# -- several -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", [(APPLY, APPLY), (APPLY, STOCK), (STOCK, APPLY)], ids="-".join)
def test_chains_add_up(host, model, control, chain):
    found, one = residuals(host, model, control, *chain)[0], residuals(host, model, control)[0]
    for both, alone in zip(found, one, strict=True):
        assert torch.equal(both, 2 * alone)


def test_two_controlnets_with_weights_and_ranges_of_their_own(host, model, control, native):
    g = Graph()
    first = add_apply(host, g, control, layer_weights="0, 0.5, 0", end_percent=0.5)
    second = add_apply(
        host, g, native, after=first, layer_weights="1, 0, 0", start_percent=0.5, image=picture(9)
    )
    with network_calls(host) as calls, control_calls(control) as one, control_calls(native) as other:
        host.values(g, add_steered(host, g, model, second, steps=6))
    steps = [call["control"]["output"] for call in calls]
    assert len(steps) == 6 and len(one) + len(other) == 6 and one and other
    for index, call in enumerate(steps):
        weight, layer = (0.5, 1) if index < len(one) else (1.0, 0)
        expected = [*one, *other][index]["out"][layer] * weight
        assert torch.equal(call[layer], expected)
        assert not any(value.any() for i, value in enumerate(call) if i != layer)


def test_branches_share_nothing(host, model, control):
    """Two apply nodes from one loader in one graph, each with its own picture, size, weights and VAE."""
    branches: list[dict[str, Any]] = [
        {"image": picture(3), "layer_weights": "1, 0, 0", "sampling": {}},
        {
            "image": picture(7, (64, 64)),
            "layer_weights": "0, 2, 1",
            "strength": 0.5,
            "end_percent": 0.5,
            "sampling": {"latent_image": torch.zeros(2, 4, 8, 8), "cfg": 1.0},
        },
    ]
    alone = [steered(host, model, control, **branch) for branch in branches]
    g = Graph()
    net, base = host.give(g, control), host.give(g, model)
    nodes = []
    for branch in branches:
        given = {name: value for name, value in branch.items() if name != "sampling"}
        applied = add_apply(host, g, net, **given)
        nodes.append(add_steered(host, g, base, applied, **branch["sampling"]))
    together = [value["samples"] for value in host.values(g, *nodes)]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_prompts_with_controls_of_their_own(host, model, control):
    """The positive prompt is two regions, one of which had another ControlNet before: each keeps its own."""
    g = Graph()
    before = add_apply(host, g, control, layer_weights="0, 0, 1", positive=prompt(3), image=picture(8))
    regions = g.add("ConditioningCombine", conditioning_1=before, conditioning_2=host.give(g, prompt(4)))
    after = add_apply(host, g, control, positive=regions, negative=prompt(2), layer_weights="1, 0, 0")
    positive, negative = host.values(g, Out(after, 0), Out(after, 1))
    first, second = (options["control"] for _, options in positive)
    assert first is not second and second is negative[0][1]["control"]
    assert second.previous_controlnet is None and first.previous_controlnet.weights == (0, 0, 1)
    assert torch.isfinite(host.values(g, add_steered(host, g, model, after))[0]["samples"]).all()


# -- versions ------------------------------------------------------------------------------------------------


def test_v11(host, folder):
    """Random weights of a v1.1 ControlNet, which ComfyUI cannot load: as hydit_core's, sizes included."""
    model = our_model(host, folder, STEERED_V11)
    control = open_control(host, save_control(folder / "v11.safetensors", STEERED_V11))
    sampling = {"latent_image": torch.zeros(1, 4, 8, 12), "steps": 1}
    with control_calls(control) as calls:
        found = steered(host, model, control, sampling=sampling)
    (call,) = calls
    net = ControlNet(STEERED_V11)
    net.load_state_dict(control_weights(STEERED_V11))
    names = ("text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5")
    sizes = torch.tensor([[1024, 1024, 96, 64, 0, 0]] * 2)
    with torch.no_grad():
        context = net.encode_context(call["context"], *(call[name] for name in names), image_meta_size=sizes)
        expected = net(call["x"], call["timesteps"], context, call["hint"])
    for layer, other in zip(call["out"], expected, strict=True):
        assert error(layer, other) < 1e-5
    assert error(found, ksampler(host, model, **sampling)) > 0.01
    # ComfyUI's own MODEL states other numbers: the ControlNet does not believe it
    base = native_model(host, STEERED_V11, weights(STEERED_V11))
    with control_calls(control) as others:
        steered(host, base, control, sampling=sampling)
    assert error(others[0]["out"][0], call["out"][0]) < 1e-5


def test_a_stated_size_reaches_the_controlnet(host, folder):
    model = our_model(host, folder, STEERED_V11)
    control = open_control(host, save_control(folder / "v11.safetensors", STEERED_V11))
    told = prompt(1)
    told[0][1] |= {"width": 512, "height": 768}
    with control_calls(control) as calls:
        steered(host, model, control, positive=told, sampling={"steps": 1, "cfg": 1.0})
    assert calls[0]["image_meta_size"].tolist() == [[1024, 1024, 512, 768, 0, 0]]


@pytest.mark.parametrize("depth", [4, 6])
def test_any_depth(host, tmp_path, depth):
    config = replace(STEERED, depth=depth)
    model = our_model(host, tmp_path, config)
    control = open_control(host, save_control(tmp_path / "control.safetensors", config))
    assert len(residuals(host, model, control)[0]) == depth // 2 - 1


# -- the headless pipeline -----------------------------------------------------------------------------------


def test_one_seed_gives_the_picture_of_generate(host, folder):
    """The embedded model with a ControlNet of random projections: the graph against hydit_core.Pipeline."""
    import hydit_core
    from hydit_core.control import ControlInput
    from hydit_core.model.layer_weights import LayerWeights
    from hydit_core.weights.load import load_controlnet

    pipeline = hydit_core.load(device="cpu", dtype="float32")
    net = ControlNet.from_base(pipeline.dit)
    other = ControlNet(net.config)
    randomize(other, 4)
    added = {k: v for k, v in other.state_dict().items() if k.startswith(("before", "after"))}
    net.load_state_dict({**net.state_dict(), **added})
    path = host.model_path("controlnet", "random.safetensors")
    hydit_core.save_checkpoint(path, dit=net.state_dict(), info=pipeline.info)
    host.refresh()
    net, _ = load_controlnet(path)
    image = Image.fromarray((picture(5, (160, 128))[0] * 255).byte().numpy())
    weights = "0.7, 0.4"
    given = {"weights": LayerWeights.parse(weights), "start": 0.1, "end": 0.8}
    drawn = {"seed": 7, "steps": 12, "cfg": 3.0, "width": 160, "height": 128}
    expected = np.asarray(pipeline("a red apple", controls=[ControlInput(net, image, **given)], **drawn)[0])

    g = text_to_image("a red apple", save=False, **drawn)
    loader = g.add("HyDiTControlNetLoader", _defaults=True, control_net_name=path.name)
    applied = g.add(
        APPLY, _defaults=True, positive=["2", 0], negative=["3", 0], control_net=loader, vae=["1", 2],
        image=host.give(g, torch.from_numpy(np.asarray(image).astype(np.float32) / 255)[None]),
        start_percent=0.1, end_percent=0.8, layer_weights=weights,
    )  # fmt: skip
    plain = host.values(g, Node("6"))[0]
    g.set("5", positive=applied.out(0), negative=applied.out(1))
    found, plain = ((v[0] * 255).round().numpy().astype(int) for v in (host.values(g, Node("6"))[0], plain))
    difference = np.abs(found - expected).max()
    print(f"{difference}/255")
    assert difference <= 2 and expected.std() > 20
    assert np.abs(found - plain).mean() > 5


# -- between runs --------------------------------------------------------------------------------------------


def test_an_interrupted_run_changes_nothing(host, model, control, native):
    """The same CONDITIONING, still in the cache, is sampled with more pictures afterwards."""
    for net in (control, native):
        g = Graph()
        applied = add_apply(host, g, net, image=picture(batch=2), mask=torch.rand(2, 64, 96).round())
        short = add_steered(host, g, model, applied, cfg=1.0)
        g.add("PreviewAny", source=short)
        stopped = host.run(g, on_progress=lambda *_: host.interrupt())
        assert stopped.interrupted
        long = g.copy()
        given = {"latent_image": host.give(long, {"samples": torch.zeros(2, 4, 8, 12)}).out(0), "cfg": 3.0}
        long.set(short, **given)
        again = host.values(long, short, keep_cache=True)[0]["samples"]
        (conditioning,) = host.values(long, Out(applied, 0), keep_cache=True)
        inner = conditioning[0][1]["control"].inner
        assert inner.cond_hint is None and inner.model_sampling_current is None
        assert torch.equal(host.values(long, short)[0]["samples"], again)


def test_nothing_given_is_altered(host, model, control, native):
    for net in (control, native):
        positive, negative, image, mask = prompt(1), prompt(2, 9), picture(), torch.rand(1, 64, 96)
        tensors = [positive[0][0], negative[0][0], *positive[0][1].values(), *negative[0][1].values()]
        tensors += [image, mask]
        before = [tensor.clone() for tensor in tensors]
        given = {"positive": positive, "negative": negative, "image": image, "mask": mask}
        state = {key: value for key, value in vars(net).items() if key != "control_model_wrapped"}
        steered(host, model, net, layer_weights="decay", strength=0.5, **given)
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
        assert "control" not in positive[0][1] and set(positive[0][1]) == set(prompt(1)[0][1])
        assert all(vars(net)[key] is value for key, value in state.items())


def test_copies_are_independent_and_models_are_counted_once(host, model, control):
    g = Graph()
    applied = add_apply(host, g, control, after=add_apply(host, g, control, STOCK))
    (conditioning,) = host.values(g, Out(applied, 0))
    weighted = conditioning[0][1]["control"]
    assert weighted.get_models() == [control.control_model_wrapped] * 2
    copied = weighted.copy()
    assert copied.inner is not weighted.inner and copied.previous_controlnet is None
    assert copied.get_models() == [control.control_model_wrapped]
    assert (copied.weights, copied.inner.strength) == (weighted.weights, weighted.inner.strength)
    copied.inner.cond_hint = torch.zeros(1)
    assert weighted.inner.cond_hint is None
    copied.cleanup()
    assert copied.inner.cond_hint is None
    # Two halves of 24 tokens of width 64, three layers, 4 bytes; the stock one before it counts nothing
    assert weighted.inference_memory_requirements(torch.float32) == 2 * 24 * 64 * 3 * 4
    assert weighted.inference_memory_requirements(torch.float16) == 2 * 24 * 64 * 3 * 2
