"""Our MODEL with ComfyUI's nodes, hooks and other models."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from graphs import Graph
from model_runs import add_ksampler, error, ksampler, load_state, network_calls, prompt
from safetensors.torch import save_file
from sampling_models import CONFIG, CONFIG_V11, INFO, features, native_model, our_model, weights
from tiny_models import randomize
from torch import Tensor

from hydit_core.model.dit import DiT

LAYER = "blocks.1.attn1.Wqkv"


def other_weights() -> dict[str, Tensor]:
    dit = DiT(CONFIG)
    randomize(dit, 11)
    return dit.state_dict()


@pytest.fixture(scope="module")
def ours(host, tmp_path_factory):
    return our_model(host, tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module")
def native(host):
    return native_model(host)


@pytest.fixture(scope="module")
def load(host):
    return partial(load_state, host)


@pytest.fixture(scope="module")
def reference(host, ours):
    """What the plain model makes; nothing that a test does may change it."""
    return ksampler(host, ours)


@pytest.fixture(autouse=True)
def _nothing_stays(host, ours, reference):
    yield
    assert torch.equal(ksampler(host, ours), reference)


def through(host: Any, model: Any, *nodes: tuple[str, dict[str, Any]], **settings: Any) -> Tensor:
    """KSampler on a MODEL that went through nodes, each with its other inputs."""
    g = Graph()
    link = host.give(g, model)
    for class_type, inputs in nodes:
        link = g.add(class_type, model=link, **inputs)
    return host.values(g, add_ksampler(host, g, link, **settings))[0]["samples"]


# -- sampling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m", "ddim", "uni_pc", "heun"])
def test_stock_samplers(host, ours, native, sampler):
    settings = {"sampler_name": sampler, "steps": 4, "latent_image": torch.zeros(2, 4, 8, 6)}
    assert error(ksampler(host, ours, **settings), ksampler(host, native, **settings)) < 1e-4


def test_img2img_and_masks(host, ours, native):
    g = torch.Generator().manual_seed(5)
    latent = {
        "samples": torch.randn(1, 4, 8, 12, generator=g) / 0.13025,
        "noise_mask": torch.rand(1, 1, 64, 96, generator=g).round(),
    }
    settings = {"latent_image": latent, "denoise": 0.6, "steps": 4}
    assert error(ksampler(host, ours, **settings), ksampler(host, native, **settings)) < 1e-4


@pytest.mark.parametrize(
    ("class_type", "inputs"),
    [
        ("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": True}),
        ("ModelSamplingDiscrete", {"sampling": "eps", "zsnr": False}),
        ("RescaleCFG", {"multiplier": 0.7}),
        ("RenormCFG", {"cfg_trunc": 100.0, "renorm_cfg": 1.0}),
    ],
)
def test_sampling_patches(host, ours, native, reference, class_type, inputs):
    found = through(host, ours, (class_type, inputs))
    assert error(found, through(host, native, (class_type, inputs))) < 1e-4
    assert not torch.allclose(found, reference, rtol=0.01)


def test_same_graph_gives_the_same_bits(host, ours):
    settings = {"sampler_name": "euler_ancestral"}
    assert torch.equal(ksampler(host, ours, **settings), ksampler(host, ours, **settings))


def test_two_models_in_one_graph(host, ours, load, reference):
    second = load(other_weights())
    alone = ksampler(host, second)
    g = Graph()
    first_node = add_ksampler(host, g, host.give(g, ours))
    second_node = add_ksampler(host, g, host.give(g, second))
    both = [value["samples"] for value in host.values(g, first_node, second_node)]
    assert torch.equal(both[0], reference) and torch.equal(both[1], alone)
    assert error(alone, reference) > 0.1


# -- conditioning --------------------------------------------------------------------------------------------


def regional(host: Any, g: Graph) -> Any:
    area = {"width": 64, "height": 72, "x": 32, "y": 16, "strength": 0.8}
    left = g.add("ConditioningSetArea", conditioning=host.give(g, prompt(1)), **area)
    mask = (torch.arange(128) < 48).float().expand(1, 96, 128)
    masked = g.add(
        "ConditioningSetMask", conditioning=host.give(g, prompt(3, 8)), mask=host.give(g, mask), strength=1.0,
        set_cond_area="default",
    )  # fmt: skip
    both = g.add("ConditioningCombine", conditioning_1=left, conditioning_2=masked)
    return g.add("ConditioningCombine", conditioning_1=both, conditioning_2=host.give(g, prompt(4)))


def averaged(host: Any, g: Graph) -> Any:
    pair = {"conditioning_to": host.give(g, prompt(1)), "conditioning_from": host.give(g, prompt(3, 8))}
    return g.add("ConditioningAverage", conditioning_to_strength=0.4, **pair)


def timed(host: Any, g: Graph) -> Any:
    first = g.add("ConditioningSetTimestepRange", conditioning=host.give(g, prompt(1)), start=0.0, end=0.5)
    rest = g.add("ConditioningSetTimestepRange", conditioning=host.give(g, prompt(3)), start=0.5, end=1.0)
    return g.add("ConditioningCombine", conditioning_1=first, conditioning_2=rest)


def zeroed(host: Any, g: Graph) -> Any:
    return g.add("ConditioningZeroOut", conditioning=host.give(g, prompt(1)))


@pytest.mark.parametrize("make", [regional, averaged, timed, zeroed])
def test_conditioning_nodes(host, ours, native, make):
    results = []
    for model in (ours, native):
        g = Graph()
        latent = torch.zeros(1, 4, 12, 16)
        node = add_ksampler(host, g, host.give(g, model), positive=make(host, g), latent_image=latent)
        results.append(host.values(g, node)[0]["samples"])
    assert error(*results) < 1e-4
    assert error(results[0], ksampler(host, ours, latent_image=latent)) > 0.01


def test_prompts_of_different_lengths(host, ours):
    """A prompt of twice the rows beside a short one: each runs alone, both count."""
    long = prompt(3)
    for name, value in list(long[0][1].items()):
        long[0][1][name] = torch.cat((value, value), dim=1)
    long[0][0] = torch.cat((long[0][0], long[0][0]), dim=1)
    with network_calls(host) as calls:
        both = ksampler(host, ours, positive=[*prompt(1), *long], steps=1)
    assert sorted(call["context"].shape[:2] for call in calls) == [(1, 24), (2, 12)]
    assert error(both, ksampler(host, ours, positive=prompt(1), steps=1)) > 0.01
    assert error(both, ksampler(host, ours, positive=long, steps=1)) > 0.01


# -- other weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", ["ours and ours", "ours and native", "native and ours"])
def test_merges(host, ours, native, load, tmp_path, kinds):
    """The weights of both, those that belong to no layer included (which ComfyUI leaves out of its own)."""
    first, second = weights(), other_weights()
    other = native_model(host, CONFIG, second) if kinds == "ours and native" else load(second)
    base = native if kinds == "native and ours" else ours
    merged = {key: 0.25 * first[key] + 0.75 * second[key] for key in first}
    if base is native:
        merged.update({key: first[key] for key in ("text_embedding_padding", "pooler.positional_embedding")})
    g = Graph()
    node = g.add("ModelMergeSimple", model1=host.give(g, base), model2=host.give(g, other), ratio=0.25)
    model, latent = host.values(g, node, add_ksampler(host, g, node))
    assert error(latent["samples"], ksampler(host, load(merged))) < 1e-4
    if base is ours:
        host.comfy_module("comfy.sd").save_checkpoint(str(tmp_path / "merged.safetensors"), model)
        saved = host.module("hydit_core.weights.bundle").bundle(tmp_path / "merged.safetensors").dit
        assert all(torch.allclose(saved.get(key), value, atol=1e-6) for key, value in merged.items())


LORA_NAMES = {
    "kohya": ("lora_unet_blocks_1_attn1_Wqkv.{}", "lora_down.weight", "lora_up.weight", "alpha"),
    "peft": (f"base_model.model.{LAYER}.{{}}", "lora_A.weight", "lora_B.weight", "alpha"),
    "comfy": (f"diffusion_model.{LAYER}.{{}}", "lora_A.weight", "lora_B.weight", "alpha"),
}


def lora(host: Any, style: str, rank: int = 4, alpha: float = 2.0) -> tuple[str, Tensor]:
    """A LoRA of one layer among ComfyUI's files, and what it adds to the layer at strength 1."""
    g = torch.Generator().manual_seed(8)
    down, up = torch.randn(rank, 64, generator=g), torch.randn(192, rank, generator=g)
    name, *parts = LORA_NAMES[style]
    tensors = dict(zip((name.format(part) for part in parts), (down, up, torch.tensor(alpha)), strict=True))
    path = host.model_path("loras", f"{style}.safetensors")
    save_file(tensors, path)
    host.refresh()
    return path.name, alpha / rank * up @ down


@pytest.mark.parametrize("node", ["LoraLoaderModelOnly", "LoraLoader"])
@pytest.mark.parametrize("style", LORA_NAMES)
def test_loras(host, ours, load, reference, style, node):
    """The sampled picture is that of W + strength * alpha / rank * up @ down."""
    name, change = lora(host, style)
    changed = weights()
    changed[f"{LAYER}.weight"] = changed[f"{LAYER}.weight"] + 0.5 * change
    g = Graph()
    inputs = {"lora_name": name, "strength_model": 0.5}
    if node == "LoraLoader":
        inputs |= {"clip": host.give(g, None), "strength_clip": 1.0}
    loader = g.add(node, model=host.give(g, ours), **inputs)
    model, latent = host.values(g, loader, add_ksampler(host, g, loader))
    assert error(latent["samples"], ksampler(host, load(changed))) < 1e-4
    assert error(latent["samples"], reference) > 0.01
    (key,) = model.patches
    assert key == f"diffusion_model.{LAYER}.weight"
    host.comfy_module("comfy.model_management").load_models_gpu([model])
    patched = model.model.diffusion_model.get_submodule(LAYER).weight
    assert torch.allclose(patched, changed[f"{LAYER}.weight"], atol=1e-5)


def test_lora_of_one_prompt(host, ours, load, reference):
    """ComfyUI's hooks patch weights only while that prompt runs."""
    name, change = lora(host, "kohya")
    changed = weights()
    changed[f"{LAYER}.weight"] = changed[f"{LAYER}.weight"] + change
    g = Graph()
    hook = g.add("CreateHookLoraModelOnly", lora_name=name, strength_model=1.0)
    positive = g.add(
        "ConditioningSetProperties", cond_NEW=host.give(g, prompt(1)), strength=1.0, set_cond_area="default",
        hooks=hook,
    )  # fmt: skip
    node = add_ksampler(host, g, host.give(g, ours), positive=positive, cfg=1.0)
    found = host.values(g, node)[0]["samples"]
    assert error(found, ksampler(host, load(changed), cfg=1.0)) < 1e-4
    assert error(found, ksampler(host, ours, cfg=1.0)) > 0.01


@pytest.mark.parametrize("dtype", ["fp16", "fp8_e4m3fn"])
def test_lora_on_short_weights(host, load, dtype):
    name, change = lora(host, "kohya")
    changed = weights()
    changed[f"{LAYER}.weight"] = changed[f"{LAYER}.weight"] + change
    short = load(weights(), weight_dtype=dtype)
    found = through(host, short, ("LoraLoaderModelOnly", {"lora_name": name, "strength_model": 1.0}))
    expected = ksampler(host, load(changed))
    assert float((found - expected).std() / expected.std()) < (0.01 if dtype == "fp16" else 0.25)


def test_streamed_weights(host, load, reference):
    """Low memory: layers are cast at use and patched on the way, the result is the same."""
    name, change = lora(host, "kohya")
    g = Graph()
    given = {"lora_name": name, "strength_model": 1.0}
    (model,) = host.values(g, g.add("LoraLoaderModelOnly", model=host.give(g, load(weights())), **given))
    changed = weights()
    changed[f"{LAYER}.weight"] = changed[f"{LAYER}.weight"] + change
    model.patch_model(device_to=torch.device("cpu"), lowvram_model_memory=1)
    try:
        layer = model.model.diffusion_model.get_submodule(LAYER)
        assert layer.comfy_cast_weights and len(layer.weight_function) == 1
        assert torch.equal(layer.weight, weights()[f"{LAYER}.weight"])
        text = features(1)
        given = {
            "context": text["bert"],
            "text_embedding_mask": text["bert_mask"],
            "encoder_hidden_states_t5": text["t5"],
            "text_embedding_mask_t5": text["t5_mask"],
        }
        x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([500.0])
        with torch.no_grad():
            found = model.model.diffusion_model(x, t, **given)
            expected = load(changed).model.diffusion_model(x, t, **given)
        assert error(found, expected) < 1e-5
    finally:
        model.unpatch_model(torch.device("cpu"))


# -- accelerations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", ["EasyCache", "LazyCache"])
def test_caches_skip_forwards(host, ours, node):
    settings = {"steps": 12, "sampler_name": "euler"}
    plain = ksampler(host, ours, **settings)
    inputs = {"reuse_threshold": 0.3, "start_percent": 0.1, "end_percent": 0.95, "verbose": False}
    blocks = []
    hook = ours.model.diffusion_model.blocks[0].register_forward_hook(lambda *_: blocks.append(1))
    try:
        cached = through(host, ours, (node, inputs), **settings)
    finally:
        hook.remove()
    assert 2 <= len(blocks) <= 8, "12 steps"
    assert torch.isfinite(cached).all() and not torch.equal(cached, plain)
    # A threshold of zero skips nothing and changes nothing
    assert torch.equal(through(host, ours, (node, {**inputs, "reuse_threshold": 0.0}), **settings), plain)


def compile_node(host: Any, model: Any, backend: str) -> Any:
    return host.nodes.NODE_CLASS_MAPPINGS["TorchCompileModel"].execute(model, backend)[0]


def test_torch_compile_traces(host, ours, reference):
    """The whole network is one graph, traced once for all steps and both halves of guidance."""
    graphs = []

    def replay(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    assert error(ksampler(host, compile_node(host, ours, replay)), reference) < 1e-5
    assert len(graphs) == 1
    assert not any(node.target is torch.view_as_complex for node in graphs[0].graph.nodes)


@pytest.mark.slow
def test_torch_compile_node(host, load):
    model = load(weights(replace(CONFIG, depth=2)))
    settings = {"cfg": 1.0, "steps": 1}
    torch._dynamo.reset()
    compiled = through(host, model, ("TorchCompileModel", {"backend": "inductor"}), **settings)
    assert error(compiled, ksampler(host, model, **settings)) < 1e-4


def test_block_replacement(host, ours, reference):
    """The hook that ComfyUI's own model has: one block's inputs by name, the original to call or not."""
    seen: list[dict[str, Any]] = []

    def same(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Tensor]:
        seen.append(args)
        return extra["original_block"](args)

    model = ours.clone()
    for block in (0, 3):
        model.set_model_patch_replace(same, "dit", "double_block", block)
    assert torch.equal(ksampler(host, model), reference)
    assert len(seen) == 2 * 3
    first, last = seen[:2]
    assert first["skip"] is None and last["skip"].shape == last["img"].shape == (2, 24, 64)
    assert first["txt"].shape == (2, 28, 32) and first["vec"].shape == (2, 64)
    assert [part.shape for part in first["pe"]] == [(24, 16)] * 2

    skipping = ours.clone()
    skipping.set_model_patch_replace(lambda args, extra: {"img": args["img"]}, "dit", "double_block", 1)
    native = native_model(host)
    native.set_model_patch_replace(lambda args, extra: {"img": args["img"]}, "dit", "double_block", 1)
    found = ksampler(host, skipping)
    assert error(found, ksampler(host, native)) < 1e-4 and error(found, reference) > 0.01


def test_network_wrappers(host, ours, reference):
    """What EasyCache and its like use: (x, t, context, ..., control, transformer_options) by position."""
    seen: list[tuple[Any, ...]] = []

    def halved(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(args)
        return 0.5 * executor(*args, **kwargs)

    model = ours.clone()
    kinds = host.comfy_module("comfy.patcher_extension").WrappersMP
    model.add_wrapper_with_key(kinds.DIFFUSION_MODEL, "test", halved)
    assert error(ksampler(host, model), reference) > 0.1
    assert len(seen) == 3 and seen[0][0].shape == (2, 4, 8, 12) and len(seen[0][-1]["uuids"]) == 2


# -- attention -----------------------------------------------------------------------------------------------


def test_attention_override(host, ours, reference):
    """In transformer_options, as KJNodes' attention nodes set it."""
    seen: list[tuple[Any, dict[str, Any]]] = []

    def override(function: Any, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((args, kwargs))
        return function(*args, **kwargs)

    model = ours.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    assert torch.equal(ksampler(host, model, steps=1), ksampler(host, ours, steps=1))
    assert len(seen) == 2 * CONFIG.depth
    (q, k, v, heads), options = seen[1][0], seen[1][1]
    assert q.shape == (2, 4, 24, 16) and k.shape == v.shape == (2, 4, 28, 16) and heads == 4
    assert options["skip_reshape"] and options["attn_precision"] == torch.float32
    assert options["transformer_options"]["cond_or_uncond"]

    model.model_options["transformer_options"]["optimized_attention_override"] = (
        lambda function, *args, **kwargs: torch.zeros_like(function(*args, **kwargs))
    )
    assert error(ksampler(host, model), reference) > 0.1


def test_attention_replaced_for_all(host, ours, reference, monkeypatch):
    """Older nodes replace the function of ComfyUI's module."""
    attention = host.comfy_module("comfy.ldm.modules.attention")
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_basic)
    found = ksampler(host, ours)
    assert error(found, reference) < 1e-4 and not torch.equal(found, reference)


def test_precision_of_scores(host, tmp_path, monkeypatch):
    """float32 for v1.2, whose scores overflow float16, and the backend's own for older models: as native."""
    seen = []
    attention = host.comfy_module("comfy.ldm.modules.attention")
    original = attention.optimized_attention

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs["attn_precision"])
        return original(*args, **kwargs)

    monkeypatch.setattr(attention, "optimized_attention", noted)
    ksampler(host, our_model(host, tmp_path, CONFIG_V11), steps=1)
    assert set(seen) == {None}
    seen.clear()
    ksampler(host, our_model(host, tmp_path), steps=1)
    assert set(seen) == {torch.float32}


# -- control -------------------------------------------------------------------------------------------------


def test_info_of_what_goes_through_nodes(host, ours):
    g = Graph()
    merged = g.add("ModelMergeSimple", model1=host.give(g, ours), model2=host.give(g, ours), ratio=0.5)
    node = g.add("RescaleCFG", model=merged, multiplier=0.5)
    (model,) = host.values(g, node)
    info = host.module("nodes.host.model").model_info(model)
    assert (info.version, info.defaults.steps) == (INFO.version, INFO.defaults.steps)
