"""ControlNets in the graph: batches, chains, branches, and what runs leave behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from control_models import (
    APPLY,
    STEERED,
    STOCK,
    Out,
    Vae,
    add_apply,
    add_steered,
    control_calls,
    native_control,
    open_control,
    picture,
    residuals,
    save_control,
    steered,
)
from graphs import Graph
from model_runs import error, ksampler, network_calls, prompt
from sampling_models import our_model


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
def neutral(host, model, control):
    return steered(host, model, control)


@pytest.fixture(scope="module", autouse=True)
def _nothing_stays(host, model, control, neutral):
    """Whatever the tests did, the same graph gives the same bits afterwards."""
    yield
    assert torch.equal(steered(host, model, control), neutral)


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
    assert second.previous_controlnet is None
    assert first.previous_controlnet.control_model.weights == (0, 0, 1)
    assert torch.isfinite(host.values(g, add_steered(host, g, model, after))[0]["samples"]).all()


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
        used = conditioning[0][1]["control"]
        assert used.cond_hint is None and used.model_sampling_current is None
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
    for given in ({}, {"layer_weights": "1, 0, 2", "mask": torch.ones(64, 96)}):
        g = Graph()
        applied = add_apply(host, g, control, after=add_apply(host, g, control, STOCK), **given)
        (conditioning,) = host.values(g, Out(applied, 0))
        attached = conditioning[0][1]["control"]
        assert type(attached) is type(control)
        assert attached.get_models() == [control.control_model_wrapped] * 2
        copied = attached.copy()
        assert copied.previous_controlnet is None and copied.get_models() == [control.control_model_wrapped]
        for name in ("control_model", "cond_hint_original", "strength", "vae", "latent_format"):
            assert getattr(copied, name) is getattr(attached, name), name
        copied.cond_hint = torch.zeros(1)
        assert attached.cond_hint is None
        copied.cleanup()
        assert copied.cond_hint is None


def test_a_copy_for_another_gpu(host, model, control, neutral):
    """As ComfyUI asks for it where several share the work (the newest versions do)."""
    if not hasattr(control, "deepclone_multigpu"):
        pytest.skip(f"ComfyUI {host.version} has no such copies")
    g = Graph()
    (conditioning,) = host.values(g, Out(add_apply(host, g, control, layer_weights="1, 0, 2"), 0))
    weighted, device = conditioning[0][1]["control"], torch.device("cpu")
    other = weighted.deepclone_multigpu(device, autoregister=True)
    assert weighted.get_instance_for_device(device) is other and other.control_model.weights == (1, 0, 2)
    mine, theirs = control.control_model.state_dict(), other.control_model.network.state_dict()
    assert other.control_model.network is not control.control_model
    assert all(torch.equal(mine[key], value) for key, value in theirs.items())
    assert weighted.get_models() == [other.control_model_wrapped, control.control_model_wrapped]


def test_hooks_of_a_control_net_are_kept(host, control):
    """What a node attached to it, to be in force while it is used."""
    hooks, hooked = host.comfy_module("comfy.hooks"), control.copy()
    hooked.extra_hooks = hooks.HookGroup()
    hooked.extra_hooks.add(hooks.WrapperHook({}))
    g = Graph()
    (conditioning,) = host.values(g, Out(add_apply(host, g, hooked, after=add_apply(host, g, control)), 0))
    weighted = conditioning[0][1]["control"]
    for one in (weighted, weighted.copy()):
        assert [hook.hooks for hook in one.get_extra_hooks()] == [hooked.extra_hooks.hooks]
