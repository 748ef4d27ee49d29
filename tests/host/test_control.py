"""ControlNets in the graph: the numbers, against ComfyUI's own node and network and hydit_core's pipeline."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from control_models import (
    APPLY,
    STEERED,
    STEERED_V11,
    STOCK,
    add_apply,
    add_steered,
    control_calls,
    control_weights,
    native_control,
    open_control,
    picture,
    residuals,
    save_control,
    steered,
)
from graphs import Graph, Node, text_to_image
from model_runs import error, ksampler, prompt
from PIL import Image
from sampling_models import native_model, our_model, weights

import hydit_core
from hydit_core.control import ControlInput
from hydit_core.embedded import embedded_controlnets
from hydit_core.layer_weights import LayerWeights
from hydit_core.model.controlnet import ControlNet
from hydit_core.weights.load import load_controlnet

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


@pytest.mark.parametrize("weights", ["uniform(1)", "0.6, 1.2"])
def test_one_seed_gives_the_picture_of_generate(host, weights):
    """The ControlNet that comes with hydit, in the graph and in hydit_core.Pipeline."""
    pipeline = hydit_core.load(device="cpu", dtype="float32")
    (path,) = embedded_controlnets()
    net, _ = load_controlnet(path, dtype=torch.float32)
    drawn = {"seed": 7, "steps": 12, "cfg": 3.0, "width": 160, "height": 128}
    start = np.asarray(pipeline("a green car", **{**drawn, "seed": 3})[0])
    g = text_to_image("a red apple", save=False, **drawn)
    image = host.give(g, torch.from_numpy(start.astype(np.float32) / 255)[None])
    edges = g.add("Canny", image=image, low_threshold=0.2, high_threshold=0.5)
    loader = g.add("HyDiTControlNetLoader", _defaults=True, control_net_name=f"[embedded] {path.stem}")
    applied = g.add(
        APPLY, _defaults=True, positive=["2", 0], negative=["3", 0], control_net=loader, image=edges,
        vae=["1", 2], start_percent=0.05, end_percent=0.9, layer_weights=weights,
    )  # fmt: skip
    steered = g.copy().set("5", positive=applied.out(0), negative=applied.out(1))
    white, plain = host.values(g, edges, Node("6"))
    found = host.values(steered, Node("6"))[0]
    assert set(white.unique().tolist()) == {0.0, 1.0}

    hint = Image.fromarray((white[0] * 255).byte().numpy())
    control = ControlInput(net, hint, LayerWeights.parse(weights), start=0.05, end=0.9)
    expected = np.asarray(pipeline("a red apple", controls=[control], **drawn)[0]).astype(int)
    found, plain = ((image[0] * 255).round().numpy() for image in (found, plain))
    difference = np.abs(found - expected).max()
    print(f"{weights}: {difference}/255")
    assert difference <= 2 and expected.std() > 20
    assert np.abs(found - plain).mean() > 5
