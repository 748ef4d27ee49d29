"""What the sampling nodes refuse and advise, and HyDiTEmptyLatent."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import pytest
import torch
from graphs import Graph
from sampling_graphs import POSITIVE, custom, ksampler, latent, message, picture, prompts, run
from sampling_models import conditioning, native_model, our_model


@pytest.fixture(scope="module")
def models(host, tmp_path_factory):
    """Both kinds of MODEL on the same random weights."""
    return {"ours": our_model(host, tmp_path_factory.mktemp("dit")), "native": native_model(host)}


@pytest.fixture
def model(models):
    return models["ours"]


def test_latents_that_do_not_fit_are_refused(host, model):
    for samples, expected in (
        (torch.ones(1, 16, 8, 8), "16 channels, this model's have 4"),
        (torch.zeros(0, 4, 8, 8), "shape (0, 4, 8, 8)"),
        (torch.zeros(1, 4, 0, 8), "shape (1, 4, 0, 8)"),
        (torch.ones(1, 4, 3, 8, 8), "shape (1, 4, 3, 8, 8)"),
    ):
        text = message(host, ksampler(host, model, {"samples": samples}))
        assert expected in text and "HyDiTEmptyLatent" in text
    assert torch.isfinite(run(host, ksampler(host, model, latent(), steps=2))).all()


def test_empty_latents_of_other_models_are_made_to_fit(host, model):
    g, node = ksampler(host, model, latent())
    other = g.add("EmptySD3LatentImage", width=128, height=128, batch_size=1)
    g.set(node, latent_image=other.out())
    assert torch.equal(run(host, (g, node)), run(host, ksampler(host, model, latent())))


def test_settings_out_of_range_are_refused(host, model):
    for settings, expected in (
        ({"cfg": 0.5}, "cfg 0.5: use 1"),
        ({"denoise": 0.05}, "denoise 0.05 of 10 steps leaves no step: use 0.1 to 1, or 0 for none"),
        ({"steps": 1000}, "1000 steps with 'leading' spacing: use 1 to 999"),
        ({"seed": 2**64 - 1}, "seed"),
    ):
        assert expected in message(host, ksampler(host, model, latent(2), **settings))


@pytest.fixture
def foreign(host):
    """A MODEL of another family, without weights."""
    base, patcher = host.comfy_module("comfy.model_base"), host.comfy_module("comfy.model_patcher")
    config = host.comfy_module("comfy.supported_models").SD15({"disable_unet_model_creation": True})
    config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    model = base.BaseModel(config)
    model.diffusion_model = torch.nn.Linear(1, 1)
    model.diffusion_model.dtype = torch.float32
    return patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def test_models_of_other_families_are_refused(host, foreign):
    assert "HunyuanDiT" in message(host, ksampler(host, foreign, latent()))
    g = Graph()
    scheduler = g.add("HyDiTScheduler", _defaults=True, model=host.give(g, foreign))
    assert "HunyuanDiT" in message(host, (g, scheduler))
    sampler = "HyDiTSampler", {"sampler": "ddim"}
    sigmas = "BasicScheduler", {"scheduler": "normal", "steps": 4, "denoise": 1.0}
    assert "HunyuanDiT" in message(host, custom(host, foreign, latent(), sampler, sigmas))


def test_eta_of_another_sampler_is_refused(host):
    g = Graph()
    assert "eta 0.5 belongs to the ddim" in message(host, (g, g.add("HyDiTSampler", sampler="ddpm", eta=0.5)))


@contextlib.contextmanager
def broken(model: Any, name: str):
    weight = dict(model.model.diffusion_model.named_parameters())[name]
    kept = weight.data.clone()
    weight.data[0, 0] = float("inf")
    try:
        yield
    finally:
        weight.data.copy_(kept)


@pytest.mark.parametrize("kind", ["ours", "native"])
def test_values_that_overflow_name_the_block(host, models, kind):
    model = models[kind]
    made = ksampler(host, model, latent())
    with broken(model, "blocks.2.mlp.fc2.weight"):
        text = message(host, made)
    assert "step 1: the DiT's values are not finite in torch.float32, first in blocks.2.mlp.fc2" in text
    assert "bfloat16" in text
    assert torch.isfinite(run(host, ksampler(host, model, latent(), steps=2))).all()


def test_a_conditioning_that_is_not_finite_is_named(host, model):
    g, node = ksampler(host, model, latent())
    text = {**POSITIVE, "t5": POSITIVE["t5"] * float("nan")}
    g.set(node, positive=host.give(g, conditioning(text)).out())
    assert "in its input encoder_hidden_states_t5" in message(host, (g, node))


def test_guidance_that_is_not_finite_is_not_the_networks_fault(host, model):
    """Such as Perp-Neg with equal prompts, which divides zero by zero."""
    perp_neg = model.clone()
    perp_neg.set_model_sampler_cfg_function(
        lambda args: (args["cond"] - args["cond"]) / (args["cond"] - args["cond"]).norm()
    )
    text = message(host, ksampler(host, perp_neg, latent()))
    assert text.startswith("step 1: guidance turned the DiT's values, which are finite, into values")
    assert "Perp-Neg" in text and "dtype" not in text
    with broken(model, "blocks.2.mlp.fc2.weight"):  # the network first, where it is both
        assert "the DiT's values are not finite" in message(host, ksampler(host, perp_neg, latent()))
    sampler = "HyDiTSampler", {"sampler": "ddpm"}
    sigmas = "HyDiTScheduler", {"steps": 4}
    assert "guidance turned" in message(host, custom(host, perp_neg, latent(), sampler, sigmas))


def test_latents_that_are_not_finite_are_named(host, model):
    start = picture()
    start["samples"][0, 0, 0, 0] = float("nan")
    text = message(host, ksampler(host, model, start, denoise=0.5))
    assert "step 1 begins with latents that are not finite, which it was given" in text


@pytest.mark.parametrize("last", [False, True])
def test_a_sampler_that_is_not_finite_is_named(host, model, monkeypatch, last):
    module = host.module("nodes.host.sampling")

    def odd(model, x, sigmas, extra_args, callback, disable, **_):
        for i, sigma in enumerate(sigmas[:-1]):
            denoised = model(x, sigma * x.new_ones(len(x)), **extra_args)
            callback({"i": i, "x": x, "sigma": sigma, "denoised": denoised})
            x = denoised * (float("inf") if i == (len(sigmas) - 2 if last else 0) else 1)
        return x

    monkeypatch.setitem(module.SAMPLERS, "ddim", odd)
    text = message(host, ksampler(host, model, latent(), steps=4, sampler="ddim"))
    assert "latents" in text and "the sampler made" in text and "guidance" not in text
    assert text.startswith("the last step's" if last else "step 2 begins with")


# -- no denoising --------------------------------------------------------------------------------------------


def test_denoise_of_0_gives_the_latent_back_as_the_stock_node(host, model):
    image = picture(2)
    found = run(host, ksampler(host, model, image, denoise=0.0))
    assert torch.equal(found, image["samples"])
    g = Graph()
    stock = g.add(
        "KSampler", **prompts(host, g, model, image), seed=1, steps=4, cfg=5.0, sampler_name="ddim",
        scheduler="normal", denoise=0.0,
    )  # fmt: skip
    assert torch.equal(host.values(g, stock)[0]["samples"], found)
    sampler, sigmas = ("HyDiTSampler", {"sampler": "ddpm"}), ("HyDiTScheduler", {"steps": 4, "denoise": 0.0})
    assert torch.equal(run(host, custom(host, model, image, sampler, sigmas)), found)


# -- empty latents and advice --------------------------------------------------------------------------------


def test_empty_latent_is_as_the_hosts(host):
    g = Graph()
    size = {"width": 1280, "height": 768, "batch_size": 3}
    ours, stock = host.values(g, g.add("HyDiTEmptyLatent", **size), g.add("EmptyLatentImage", **size))
    assert ours.keys() == stock.keys()
    assert ours["samples"].dtype == stock["samples"].dtype and torch.equal(ours["samples"], stock["samples"])
    assert ours.get("downscale_ratio_spacial") == stock.get("downscale_ratio_spacial")
    g = Graph()
    bad = g.add("HyDiTEmptyLatent", width=1001, height=1000, batch_size=1)
    assert "try 1000x1000" in message(host, (g, bad))


def test_the_result_says_nothing_of_empty_latents_any_more(host, model):
    g, node = ksampler(host, model, latent(batch_index=[2], downscale_ratio_spacial=8))
    result = host.values(g, node)[0]
    assert "downscale_ratio_spacial" not in result and result["batch_index"] == [2]


def test_poor_choices_are_told_in_the_log(host, model, caplog):
    caplog.set_level(logging.WARNING)
    run(host, ksampler(host, model, latent(size=(32, 32)), steps=1, preset="v1.1", denoise=1.0))
    assert "32x32 is far below the size that this model was made for (128x128)" in caplog.text
    assert "preset v1.1 is meant for another release than this model (v1.2)" in caplog.text
    caplog.clear()
    run(host, ksampler(host, model, latent(), steps=4, denoise=0.5))
    assert "denoise 0.5 of an empty latent" in caplog.text
    made = ksampler(host, model, latent(size=(32, 32)), steps=1)
    made[0].add("PreviewAny", source=made[1])
    said = host.run(made[0]).check().outputs[made[1].id]["hydit_notes"]
    assert "32x32 is far below the size" in said[0]
    caplog.clear()
    run(host, ksampler(host, model, latent(), steps=1))
    assert not [record for record in caplog.records if "HyDiT" in record.getMessage()]


def test_presets_bring_what_was_published(host, model):
    """Steps are what a user sees; the settings themselves are hydit_core's, tested there."""
    choose = {"distilled": 25, "diffusers": 50, "model's own": 10}
    for preset, steps in choose.items():
        g, node = ksampler(
            host, model, latent(size=(32, 32)), preset=preset, steps=0, cfg=1.0, sampler="ddpm"
        )
        host.values(g, node)
        assert host.progress[-1][1:] == (steps, steps)
