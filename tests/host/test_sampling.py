"""What HyDiTKSampler, HyDiTSampler and HyDiTScheduler draw inside ComfyUI."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from graphs import Graph, Node, text_to_image
from sampling_graphs import NEGATIVE, POSITIVE, SEED, custom, error, ksampler, latent, picture, prompts, run
from sampling_models import CONFIG_V11, diffusers_latents, native_model, our_model
from torch import Tensor

SCHEDULERS = {
    "ddpm": (DDPMScheduler, {"clip_sample": False, "variance_type": "fixed_small"}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
}


def scheduler(name: str, beta_end: float = 0.018) -> Any:
    cls, options = SCHEDULERS[name]
    return cls(
        beta_start=0.00085,
        beta_end=beta_end,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        steps_offset=1,
        **options,
    )


@pytest.fixture(scope="module")
def models(host, tmp_path_factory):
    """Both kinds of MODEL on the same random weights."""
    return {"ours": our_model(host, tmp_path_factory.mktemp("dit")), "native": native_model(host)}


@pytest.fixture
def model(models):
    return models["ours"]


# -- against diffusers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("kind", ["ours", "native"])
def test_ten_steps_equal_diffusers(host, models, kind, sampler):
    for size in ((128, 128), (160, 96)):
        samples = run(host, ksampler(host, models[kind], latent(size=size), sampler=sampler))
        generator = torch.Generator().manual_seed(SEED)
        expected = diffusers_latents(scheduler(sampler), POSITIVE, NEGATIVE, generator, size=size)
        start = torch.randn(expected.shape, generator=torch.Generator().manual_seed(SEED))
        # A network without effect would make any two samplers agree.
        assert error(expected, start) > 0.5
        found = error(samples * 0.13025, expected)
        print(f"{kind} {sampler} {size}: {found:.1e} of std")
        assert found <= 1e-4


def test_a_model_with_size_condition_equals_diffusers(host, tmp_path):
    """v1.1: other betas, and the sizes that Tencent's inference states: 1024x1024, then the latent's own."""
    samples = run(host, ksampler(host, our_model(host, tmp_path, CONFIG_V11), latent(), sampler="ddpm"))
    generator = torch.Generator().manual_seed(SEED)
    expected = diffusers_latents(
        scheduler("ddpm", beta_end=0.03), POSITIVE, NEGATIVE, generator, config=CONFIG_V11
    )
    assert error(samples * 0.13025, expected) <= 1e-4


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_guidance_rescale_equals_diffusers(host, models, sampler):
    expected = diffusers_latents(
        scheduler(sampler), POSITIVE, NEGATIVE, torch.Generator().manual_seed(SEED), rescale=0.7
    )
    for kind in models:
        made = ksampler(host, models[kind], latent(), sampler=sampler, guidance_rescale=0.7)
        assert error(run(host, made) * 0.13025, expected) <= 1e-4
    plain = run(host, ksampler(host, models["ours"], latent(), sampler=sampler, guidance_rescale=0.0))
    assert error(plain * 0.13025, expected) > 1e-2


def test_a_batch_of_pictures_equals_diffusers_with_one_generator_each(host, model):
    generators = [torch.Generator().manual_seed(SEED + i) for i in range(2)]
    expected = diffusers_latents(scheduler("ddpm"), POSITIVE, NEGATIVE, generators, batch=2)
    samples = run(host, ksampler(host, model, latent(2), sampler="ddpm"))
    assert error(samples * 0.13025, expected) <= 1e-4


def test_custom_sampling_of_a_batch_equals_diffusers_with_one_generator(host, model):
    """The stock noise node draws the batch with one generator; step noise goes on with it."""
    generator = torch.Generator().manual_seed(SEED)
    expected = diffusers_latents(scheduler("ddpm"), POSITIVE, NEGATIVE, generator, batch=2)
    parts = ("HyDiTSampler", {"sampler": "ddpm"}), ("HyDiTScheduler", {"spacing": "leading", "steps": 10})
    samples = run(host, custom(host, model, latent(2), *parts))
    assert error(samples * 0.13025, expected) <= 1e-4


def test_ddim_with_eta_equals_diffusers_ddpm(host, model):
    generator = torch.Generator().manual_seed(SEED)
    expected = diffusers_latents(scheduler("ddpm"), POSITIVE, NEGATIVE, generator)
    sampler = "HyDiTSampler", {"sampler": "ddim", "eta": 1.0}
    samples = run(host, custom(host, model, latent(), sampler, ("HyDiTScheduler", {"steps": 10})))
    assert error(samples * 0.13025, expected) <= 1e-4


# -- seeds and batches ---------------------------------------------------------------------------------------


def test_pictures_of_a_batch_are_those_of_their_seeds(host, model):
    both = run(host, ksampler(host, model, latent(2), sampler="ddpm"))
    for i in range(2):
        alone = run(host, ksampler(host, model, latent(), sampler="ddpm", seed=SEED + i))
        assert error(both[i : i + 1], alone) <= 1e-5
    assert error(both[:1], both[1:]) > 0.5


def test_batch_index_says_which_seed_a_picture_has(host, model):
    third = run(host, ksampler(host, model, latent(batch_index=[3]), sampler="ddpm"))
    assert torch.equal(third, run(host, ksampler(host, model, latent(), sampler="ddpm", seed=SEED + 3)))
    bad = host.run(ksampler(host, model, latent(batch_index=[0, 1]))[0])
    assert not bad.ok


@pytest.mark.parametrize("sampler, spacing", [("ddpm", "leading"), ("dpmpp_2m", "linspace")])
def test_custom_sampling_equals_the_one_node(host, model, sampler, spacing):
    one = run(host, ksampler(host, model, latent(), sampler=sampler))
    parts = ("HyDiTSampler", {"sampler": sampler}), ("HyDiTScheduler", {"spacing": spacing, "steps": 10})
    g, node = custom(host, model, latent(), *parts)
    assert torch.equal(one, run(host, (g, node)))

    given = g.prompt[node.id]["inputs"]
    names = "model", "positive", "negative", "cfg"
    guider = g.add("CFGGuider", **{name: given[name] for name in names})
    noise = g.add("RandomNoise", noise_seed=SEED)
    names = "sampler", "sigmas", "latent_image"
    advanced = g.add("SamplerCustomAdvanced", noise=noise, guider=guider, **{n: given[n] for n in names})
    assert torch.equal(one, run(host, (g, advanced)))


def test_the_same_graph_twice_gives_the_same_bits(host, model):
    made = ksampler(host, model, latent(2), sampler="ddpm", guidance_rescale=0.5)
    assert torch.equal(run(host, made), run(host, made))


def test_generators_are_found_by_the_noise_they_drew(host):
    start_generators = host.module("nodes.host.sampling").start_generators
    shape = (2, 4, 8, 8)
    whole = torch.Generator().manual_seed(SEED)
    noise = torch.randn(shape, generator=whole)
    found = start_generators(noise, SEED)
    assert torch.equal(torch.randn(shape, generator=found), torch.randn(shape, generator=whole))
    # Rounded on its way, as --fp16-intermediates does
    assert isinstance(start_generators(noise.half().float(), SEED), torch.Generator)

    each = [torch.Generator().manual_seed(SEED + i) for i in range(2)]
    found = start_generators(torch.stack([torch.randn(shape[1:], generator=g) for g in each]), SEED)
    for one, other in zip(found, each, strict=True):
        assert torch.equal(torch.randn(9, generator=one), torch.randn(9, generator=other))

    # Noise of another origin, here the third picture of a batch: nothing of the batch's noise comes again.
    batch = torch.randn(8, *shape[1:], generator=torch.Generator().manual_seed(SEED))
    found = start_generators(batch[2:3], SEED)
    step = torch.randn(8, *shape[1:], generator=found)
    likeness = (step.flatten(1) @ batch.flatten(1).T) / step[0].numel()
    assert likeness.abs().max() < 0.35
    again = start_generators(batch[2:3], SEED)
    assert torch.equal(torch.randn(8, *shape[1:], generator=again), step)


# -- the headless pipeline on the embedded model -------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline():
    import hydit_core

    return hydit_core.load(device="cpu", dtype="float32")


def image_of(host: Any, g: Graph, node: str = "6") -> np.ndarray:
    pixels = host.values(g, Node(node))[0]
    return np.asarray((pixels * 255).round().clamp(0, 255).to(torch.uint8)).astype(int)


@pytest.mark.parametrize(
    "settings",
    [{}, {"sampler": "ddpm", "steps": 12, "cfg": 4.0, "guidance_rescale": 0.7}, {"cfg": 1.0}],
    ids=["own", "ddpm", "no-guidance"],
)
def test_one_seed_gives_the_picture_of_generate(host, pipeline, settings):
    g = text_to_image("a red apple", batch_size=2, seed=7, steps=0, cfg=0.0, save=False, sampler={**settings})
    found = image_of(host, g)
    expected = pipeline("a red apple", seed=7, batch=2, **settings)
    for one, other in zip(found, expected, strict=True):
        difference = np.abs(one - np.asarray(other).astype(int)).max()
        print(f"{settings}: {difference}/255")
        assert np.asarray(other).std() > 20
        assert difference <= 2
    assert np.abs(found[0] - found[1]).max() > 50


def test_image_to_image_equals_generate(host, pipeline):
    start = pipeline("a green car", seed=3)[0]
    expected = pipeline("a red apple", seed=7, init_image=start, strength=0.6, steps=20)[0]
    g = text_to_image("a red apple", seed=7, steps=20, cfg=0.0, save=False, sampler={"denoise": 0.6})
    pixels = torch.from_numpy(np.asarray(start).astype(np.float32) / 255)[None]
    encoded = g.add("VAEEncode", pixels=host.give(g, pixels), vae=["1", 2])
    g.set("5", latent_image=encoded.out())
    difference = np.abs(image_of(host, g)[0] - np.asarray(expected).astype(int)).max()
    print(f"img2img: {difference}/255")
    assert difference <= 2
    assert np.abs(np.asarray(expected).astype(int) - np.asarray(start).astype(int)).max() > 50


def test_models_own_preset_is_what_the_file_recommends(host, pipeline):
    g = text_to_image(seed=7, steps=0, cfg=0.0)
    result = host.run(g).check()
    defaults = pipeline.info.defaults
    assert result.progress[-1] == ("5", defaults.steps, defaults.steps)


# -- the host's own ways -------------------------------------------------------------------------------------


def seen_by_network(host: Any, made: tuple[Graph, Node], model: Any) -> list[Tensor]:
    """What the network is given at each step, in x_t scaling."""
    seen: list[Tensor] = []

    def watch(apply: Any, args: dict[str, Any]) -> Tensor:
        sigma = args["timestep"].view(-1, 1, 1, 1)
        seen.append(args["input"] / (sigma**2 + 1).sqrt())
        return apply(args["input"], args["timestep"], **args["c"])

    watched = model.clone()
    watched.set_model_unet_function_wrapper(watch)
    g, node = made
    g.set(node, model=host.give(g, watched).out())
    host.values(g, node)
    return seen


def test_an_empty_latent_starts_from_unit_noise(host, model):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(SEED))
    first = seen_by_network(host, ksampler(host, model, latent()), model)[0]
    assert (first[:1] - noise).abs().max() < 1e-5
    # Stock scaling at this step is smaller by 1.3e-3: the difference that matters here.
    stock = custom(
        host,
        model,
        latent(),
        ("KSamplerSelect", {"sampler_name": "euler"}),
        ("HyDiTScheduler", {"steps": 10}),
    )
    assert (seen_by_network(host, stock, model)[0][:1] - noise).abs().max() > 1e-3


@pytest.mark.parametrize("masked", [False, True])
def test_pictures_and_masks_start_and_end_as_in_the_host(host, model, masked):
    """With the host's euler, which is the same method, on our sigmas."""
    image = picture()
    if masked:
        image["noise_mask"] = torch.zeros(1, 128, 128)
        image["noise_mask"][:, 32:96, 64:] = 1
    scheduler = "HyDiTScheduler", {"steps": 10, "denoise": 0.7}
    stock = run(
        host, custom(host, model, image, ("KSamplerSelect", {"sampler_name": "euler"}), scheduler, cfg=3.0)
    )
    ours = run(host, ksampler(host, model, image, sampler="euler", denoise=0.7, cfg=3.0))
    assert error(ours, stock) <= 1e-5
    if masked:
        kept = torch.ones(16, 16, dtype=torch.bool)
        kept[4:12, 8:] = False
        changed = [(samples - image["samples"])[..., kept].abs().max() for samples in (ours, stock)]
        assert changed[0] <= changed[1] < 1e-4  # rounding
        assert error(ours[..., ~kept], image["samples"][..., ~kept]) > 0.3


def test_a_mask_on_an_empty_latent_keeps_the_hosts_scaling(host, model):
    mask = torch.zeros(1, 128, 128)
    mask[:, 64:] = 1
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(SEED))
    first = seen_by_network(host, ksampler(host, model, latent(noise_mask=mask)), model)[0]
    sigma = host.module("nodes.host.sampling").model_sigmas(model, "leading", 10)[0]
    assert (first[:1] - noise * sigma / (1 + sigma**2).sqrt()).abs().max() < 1e-5


def test_denoise_keeps_the_last_steps(host, model):
    sigmas = host.module("nodes.host.sampling").model_sigmas
    whole = sigmas(model, "leading", 50)
    assert len(whole) == 51 and whole[-1] == 0
    assert torch.equal(sigmas(model, "leading", 50, 0.35), whole[-18:])  # int(17.5) steps
    g, node = ksampler(host, model, picture(), denoise=0.35)
    host.values(g, node)
    assert host.progress[-1][1:] == (3, 3)


def test_stock_sampling_is_not_changed(host, model):
    def stock() -> Tensor:
        g = Graph()
        inputs = prompts(host, g, model, latent())
        settings = {"seed": SEED, "steps": 5, "cfg": 6.0, "sampler_name": "euler", "scheduler": "normal"}
        return run(host, (g, g.add("KSampler", _defaults=True, **inputs, **settings)))

    before = stock()
    options = repr(model.model_options)
    run(host, ksampler(host, model, latent(), guidance_rescale=0.7))
    assert torch.equal(stock(), before)
    assert repr(model.model_options) == options


def test_the_models_own_sigmas_are_used(host, model):
    """ModelSamplingDiscrete upstream: zero terminal SNR; LCM's table has 50 sigmas."""
    g = Graph()
    given = host.give(g, model)
    nodes = {
        kind: g.add("ModelSamplingDiscrete", model=given, sampling=kind, zsnr=zsnr)
        for kind, zsnr in (("v_prediction", True), ("lcm", False))
    }
    taps = [
        g.add("HyDiTScheduler", model=source, spacing="trailing", steps=4, denoise=1.0)
        for source in (given, *nodes.values())
    ]
    plain, zsnr, lcm = host.values(g, *taps)
    table = model.get_model_object("model_sampling").sigmas
    assert torch.equal(plain, torch.cat([table[[999, 749, 499, 249]], torch.zeros(1)]))
    assert zsnr[0] > 4000 and zsnr[-1] == 0
    assert torch.allclose(lcm[:1], plain[:1]) and len(lcm) == 5 and (lcm.diff() < 0).all()
    rescaled = ksampler(host, model, latent(), sampler="ddim", spacing="trailing", guidance_rescale=0.5)
    rescaled[0].set(rescaled[1], model=_patched(host, rescaled[0], model))
    assert torch.isfinite(run(host, rescaled)).all()


def _patched(host: Any, g: Graph, model: Any) -> list[Any]:
    return g.add("ModelSamplingDiscrete", model=host.give(g, model), sampling="x0", zsnr=False).out()


def test_a_guidance_function_upstream_is_kept(host, model):
    """RescaleCFG at 0 is plain guidance: ours on top of it is ours alone. At 0.6 it shows through.

    One on top of the other leaves (1 - 0.6) (1 - 0.5) of the plain guidance, as ours at 0.8 does.
    """
    alone = run(host, ksampler(host, model, latent(), guidance_rescale=0.7))
    results = {}
    for multiplier, rescale in ((0.0, 0.7), (0.6, 0.0), (0.6, 0.5)):
        g, node = ksampler(host, model, latent(), guidance_rescale=rescale)
        upstream = g.add("RescaleCFG", model=host.give(g, model), multiplier=multiplier)
        results[multiplier, rescale] = run(host, (g.set(node, model=upstream.out()), node))
    assert error(results[0.0, 0.7], alone) <= 1e-4
    # And theirs at 0.6 is what ours at 0.6 is: ours at 0 leaves it alone.
    same = run(host, ksampler(host, model, latent(), guidance_rescale=0.6))
    assert error(results[0.6, 0.0], same) <= 1e-4
    both = run(host, ksampler(host, model, latent(), guidance_rescale=0.8))
    assert error(results[0.6, 0.5], both) <= 1e-4
    assert error(results[0.6, 0.5], run(host, ksampler(host, model, latent(), guidance_rescale=0.5))) > 1e-2


def test_an_interrupt_stops_at_the_step_and_leaves_a_working_host(host, model):
    made = ksampler(host, model, latent())
    expected = run(host, made)
    calls: list[int] = []

    def stop(apply: Any, args: dict[str, Any]) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            host.interrupt()
        return apply(args["input"], args["timestep"], **args["c"])

    watched = model.clone()
    watched.set_model_unet_function_wrapper(stop)
    g, node = ksampler(host, model, latent())
    g.set(node, model=host.give(g, watched).out())
    g.add("HyDiTTestCapture", value=node)
    result = host.run(g)
    assert result.interrupted and not result.ok
    assert len(calls) == 3
    assert torch.equal(run(host, made), expected)
